"""Test the weights of a network for ImageNet on DATA/val/CLASS/, ImageNet16-120 or your own image folder."""

from support.cli import command

from collections.abc import Sequence

import retrained
from recipes import IMAGENET

DATASETS = ["imagenet", "ImageNet16-120", "folder"]


@command
def main(argv: Sequence[str] | None = None) -> dict:
    return retrained.test("test_imagenet.py", DATASETS, argv, recipe=IMAGENET, batch_size=128)


if __name__ == "__main__":
    main()
