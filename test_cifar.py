"""Test weights of a retrained cell on CIFAR-10, an own image folder or the digits."""

from functools import partial

from support.cli import command
from testing import test

main = command(partial(test, "test_cifar.py", ["cifar10", "folder", "digits"]))

if __name__ == "__main__":
    main()
