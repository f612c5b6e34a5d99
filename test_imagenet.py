"""Test weights of a retrained cell on DATA/val/CLASS/ or an own folder, with the ImageNet network and transforms."""

from functools import partial

from recipes import IMAGENET
from retrained import test
from support.cli import command

main = command(partial(test, "test_imagenet.py", default=IMAGENET, batch_size=128))

if __name__ == "__main__":
    main()
