"""Test weights of a retrained cell on CIFAR-100, an own image folder or the digits."""

from functools import partial

from retrained import test
from support.cli import command

main = command(partial(test, "test_cifar100.py"))

if __name__ == "__main__":
    main()
