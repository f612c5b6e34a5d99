"""Test the weights of a retrained network on CIFAR-10, your own image folder or the digits."""

from collections.abc import Sequence

import retrained
from support.cli import command


@command
def main(argv: Sequence[str] | None = None) -> dict:
    return retrained.test("test_cifar.py", argv)


if __name__ == "__main__":
    main()
