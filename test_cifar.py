"""Test weights of a retrained cell on CIFAR-10, an own image folder or the digits."""

from support.cli import command

from functools import partial

from retrained import test

main = command(partial(test, "test_cifar.py", ["cifar10", "folder", "digits"]))

if __name__ == "__main__":
    main()
