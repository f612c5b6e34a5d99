"""Test weights of a retrained cell on the images of DATA/val/CLASS/ with the ImageNet network and transforms."""

from functools import partial

from support.cli import command
from testing import test
from utils import IMAGENET

main = command(
    partial(test, "test_imagenet.py", ["imagenet", "ImageNet16-120"], recipe=IMAGENET, batch_size=128, report_freq=100)
)

if __name__ == "__main__":
    main()
