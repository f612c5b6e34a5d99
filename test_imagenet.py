"""Test weights of a retrained cell on the images of DATA/val/CLASS/ with the ImageNet network and transforms."""

from functools import partial

from support.cli import command
from testing import IMAGENET, test

main = command(partial(test, "test_imagenet.py", ["imagenet"], defaults=IMAGENET))

if __name__ == "__main__":
    main()
