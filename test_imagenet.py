"""Test weights of a retrained cell on DATA/val/CLASS/ or an own folder, with the ImageNet network and transforms."""

from functools import partial

from support.cli import command
from testing import test
from utils import IMAGENET

datasets = ["imagenet", "ImageNet16-120", "folder"]
main = command(partial(test, "test_imagenet.py", datasets, recipe=IMAGENET, batch_size=128))

if __name__ == "__main__":
    main()
