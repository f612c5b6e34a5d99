"""Data sets and splits of the NAS-Bench-201 searches; loaders and augmentation are those of the root module `data`.

CIFAR-100 and ImageNet16-120 have no validation split of their own: the benchmark validates on half of the images that
others test on, and so does a search here.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import seed_roles
from data import Augmentation
from nas201.imagenet16 import load_imagenet16
from support import seeds
from support.files import UserError, read_json

DATASETS = ("cifar10", "cifar100", "ImageNet16-120", "folder", "digits")


def _augmentation(mean, std, pad=4):
    return Augmentation(tuple(v / 255 for v in mean), tuple(v / 255 for v in std), pad)


AUGMENTATION = {
    "cifar10": _augmentation((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": _augmentation((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "ImageNet16-120": _augmentation((122.68, 116.66, 104.01), (63.22, 61.26, 65.09), pad=2),
}
# With a seeded split: a stratified half of the training images, or so many of the test images.
VALIDATION = {"cifar100": 5000, "ImageNet16-120": 3000}
SPLIT_KEYS = {"cifar10": ("train", "valid"), "cifar100": ("xvalid", "xtest"), "ImageNet16-120": ("xvalid", "xtest")}


def load(dataset, root, split, workers=None, image_size=None, in_memory=None, cache=True):
    """Read a split as `data.load` does, of ImageNet16-120 too: it tests on all 6,000 validation images."""
    if dataset != "ImageNet16-120":
        return data.load(dataset, root, split, workers, image_size, in_memory, cache)
    data.check_small(dataset, image_size, in_memory)
    return load_imagenet16(root, workers)[split]


# ---- splits


def search_splits(args):
    """Return (train, validation, Augmentation) of a search on args.dataset. Raises UserError.

    cifar10, folder and digits share out the training images; cifar100 and ImageNet16-120 train on all of them and
    validate on a part of the test images. args.split and args.split_file say on which; args.split None is settled.
    """
    if args.split_file and args.split:
        raise UserError("--split_file and --split both say how to split: leave one out")
    if args.dataset not in SPLIT_KEYS and (args.split_file or args.split == "fixed"):
        raise UserError(f"--split_file and --split fixed are for {', '.join(SPLIT_KEYS)}, not for {args.dataset}")
    if not args.split_file:
        args.split = args.split or ("fixed" if args.dataset in SPLIT_KEYS else "seeded")
    generator = seeds.generator(args, seed_roles.SPLIT)
    settings = dict(workers=args.workers, image_size=args.image_size, in_memory=True, cache=args.image_cache)
    read = partial(load, args.dataset, args.data, **settings)
    train = read("train")
    test = read("test") if args.dataset in VALIDATION else train
    data.check_in_memory(train)
    augment = AUGMENTATION.get(args.dataset) or data.augmentation(args.dataset, train)
    if args.split != "seeded":
        if args.split_file:
            first, second = read_split(args.split_file, SPLIT_KEYS[args.dataset], len(test))
        else:
            first, second = fixed_split(args.dataset)
        train, valid = (train.subset(first), train.subset(second)) if test is train else (train, test.subset(first))
    elif args.dataset in VALIDATION:
        valid = data.subsample(test, VALIDATION[args.dataset], generator)
    else:
        train, valid = data.split_train(train, 0.5, False, generator)
        data.check_classes(training=train, validation=valid)
    train = data.subsample(train, args.train_samples, generator)
    return train, data.subsample(valid, args.valid_samples, generator), augment


def fixed_split(dataset):
    """Return the benchmark's own split of `dataset`, as `read_split` does: two index tensors, int64, in file order.

    splits.npz has a bit an image, 1 in the first list, from the index files of AutoDL-Projects (MIT licence).
    """
    with np.load(Path(__file__).with_name("splits.npz")) as file:
        bits = torch.from_numpy(np.unpackbits(file[dataset]))
    return [torch.nonzero(bits == value).flatten() for value in (1, 0)]


def read_split(path, keys, count):
    """Read two index tensors, int64, from {"train": ["int", ["0", "5", ..]], "valid": [..]}; the keys are `keys`.

    Raises UserError for anything but distinct whole numbers from 0 to `count` - 1, each in one of the two lists.
    """
    content, lists = read_json(path), []
    for key in keys:
        where, entry = f'{path}, "{key}"', content.get(key) if isinstance(content, dict) else None
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == "int" and isinstance(entry[1], list)):
            raise UserError(f'{path} has no "{key}": ["int", [..]], as the split file of this data set has')
        for value in entry[1]:
            if not (type(value) in (int, str) and str(value).isdecimal() and len(str(value)) < 10):
                raise UserError(f"{where}: {str(value)[:40]!r} is not an index")
        indices = [int(value) for value in entry[1]]
        if not indices:
            raise UserError(f"{where}: no index")
        if max(indices) >= count:
            raise UserError(f"{where}: index {max(indices)} runs past the {count} images")
        if len(set(indices)) < len(indices):
            raise UserError(f"{where}: an index stands there twice")
        lists.append(indices)
    common = set(lists[0]) & set(lists[1])
    if common:
        raise UserError(f'{path}: "{keys[0]}" and "{keys[1]}" overlap, both have index {min(common)}')
    return [torch.tensor(indices) for indices in lists]
