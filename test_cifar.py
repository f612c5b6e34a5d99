"""Test the weights of a retrained network on CIFAR-10, on your own image folder or on scikit-learn's digits.

Example: python test_cifar.py --dir runs/eval-EXP-20260101-120000
"""

from support.cli import command

from collections.abc import Sequence

import retrained


@command
def main(argv: Sequence[str] | None = None) -> dict:
    return retrained.test("test_cifar.py", __doc__, argv)


if __name__ == "__main__":
    main()
