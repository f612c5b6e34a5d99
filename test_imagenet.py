"""Test the weights of a network for large images on ImageNet (DATA/val/CLASS/) or on your own image folder.

Networks of NAS-Bench-201 can be tested on ImageNet16-120.
Example: python test_imagenet.py --arch EvNASA --model_path EvNAS_A_imagenet_model_best.pth.tar
"""

from support.cli import command

from collections.abc import Sequence

import retrained
from recipes import IMAGENET


@command
def main(argv: Sequence[str] | None = None) -> dict:
    return retrained.test("test_imagenet.py", __doc__, argv, recipe=IMAGENET, batch_size=128)


if __name__ == "__main__":
    main()
