"""Test weights of a retrained cell on CIFAR-100, an own image folder or the digits."""

from evaluation import test
from utils import command

DEFAULTS = dict(data="../data", batch_size=96, report_freq=50, init_channels=36, layers=20)


@command
def main(argv=None):
    return test("test_cifar100.py", "cifar100", argv, datasets=["cifar100", "folder", "digits"], defaults=DEFAULTS)


if __name__ == "__main__":
    main()
