"""Test the weights of a retrained network on CIFAR-100, your own image folder or the digits."""

from support.cli import command

from collections.abc import Sequence

import retrained


@command
def main(argv: Sequence[str] | None = None) -> dict:
    return retrained.test("test_cifar100.py", ["cifar100", "folder", "digits"], argv)


if __name__ == "__main__":
    main()
