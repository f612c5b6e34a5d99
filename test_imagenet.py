"""Test weights of a retrained cell on the images of DATA/val/CLASS/ with the ImageNet network and transforms."""

from evaluation import test
from utils import command

DEFAULTS = dict(data="../data/imagenet", batch_size=128, report_freq=100, init_channels=48, layers=14)


@command
def main(argv=None):
    return test("test_imagenet.py", "imagenet", argv, datasets=["imagenet"], defaults=DEFAULTS)


if __name__ == "__main__":
    main()
