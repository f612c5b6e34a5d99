"""Test the weights of a network for ImageNet on DATA/val/CLASS/, ImageNet16-120 or your own image folder."""

from collections.abc import Sequence

import retrained
from recipes import IMAGENET
from support.cli import command


@command
def main(argv: Sequence[str] | None = None) -> dict:
    return retrained.test("test_imagenet.py", argv, recipe=IMAGENET, batch_size=128)


if __name__ == "__main__":
    main()
