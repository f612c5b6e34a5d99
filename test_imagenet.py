"""Test weights of a retrained cell on DATA/val/CLASS/ or an own folder, with the ImageNet network and transforms."""

from support.cli import command

from functools import partial

from recipes import IMAGENET
from retrained import test

datasets = ["imagenet", "ImageNet16-120", "folder"]
main = command(partial(test, "test_imagenet.py", datasets, default=IMAGENET, batch_size=128))

if __name__ == "__main__":
    main()
