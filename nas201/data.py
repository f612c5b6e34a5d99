"""Choose the training images and the validation images of a search on NAS-Bench-201.

CIFAR-100 and ImageNet16-120 have no validation split of their own. For these data sets, the
benchmark validates on half of the test images, and so does a search here.
"""

import argparse
import functools
import os
from pathlib import Path

import numpy as np
import torch

import datasets
import image_folder
import seed_roles
import splits
from datasets import DATASETS, SearchData
from support import seeds
from support.files import UserError, read_json

FIXED = [name for name, dataset in DATASETS.items() if dataset.nas201_split]  # data sets that the benchmark splits


def search_splits(args: argparse.Namespace) -> SearchData:
    """Read and divide the images for a search on args.dataset. Raises UserError.

    For cifar10, folder and digits, the training images are split into two halves, for training and
    for validation. For cifar100 and ImageNet16-120, all training images are for training, and a
    part of the test images is for validation.

    `args.split` is "fixed" (the benchmark's own split) or "seeded". If `args.split` is None, it is
    set to the data set's default. `args.split_file` names an index file to use instead.
    """
    if args.split_file and args.split:
        raise UserError("--split_file and --split both say how to divide the images: leave one out")
    rule = DATASETS[args.dataset].nas201_split
    if rule is None and (args.split_file or args.split == "fixed"):
        raise UserError(f"--split_file and --split fixed are for {', '.join(FIXED)}, not for {args.dataset}")
    if not args.split_file:
        args.split = args.split or ("fixed" if rule else "seeded")
    generator = seeds.generator(args, seed_roles.SPLIT)
    settings = dict(workers=args.workers, image_size=args.image_size, cache=args.image_cache)
    read = functools.partial(datasets.load_images, args.dataset, args.data, **settings)
    train = read("train")
    test = read("test") if rule and rule.validation_images else None
    image_folder.check_in_memory(train)
    augmentation = datasets.augmentation(args.dataset, train, nas201=True)
    if args.split != "seeded":
        divided = train if test is None else test
        if args.split_file:
            first, second = read_split(args.split_file, rule.keys, len(divided))
        else:
            first, second = fixed_split(args.dataset)
        # Of CIFAR-10's training images, the first list trains and the second validates. Of the test
        # images of the other data sets, the first list validates and the second is not used.
        valid = divided.subset(second if test is None else first)
        train = train.subset(first) if test is None else train
    elif test is not None:
        valid = splits.subsample(test, rule.validation_images, generator)
    else:
        train, valid = splits.split_train(train, 0.5, False, generator)
        splits.check_classes(training=train, validation=valid)
    train = splits.subsample(train, args.train_samples, generator)
    valid = splits.subsample(valid, args.valid_samples, generator)
    return SearchData(train, valid, augmentation)


def fixed_split(dataset: str) -> list[torch.Tensor]:
    """Return the benchmark's own split as two index tensors (int64), as `read_split` does.

    splits.npz has one bit per image, in the data set's order: 1 for the first list, 0 for the
    second. The bits come from the index files of AutoDL-Projects (MIT licence).
    """
    with np.load(Path(__file__).with_name("splits.npz")) as file:
        bits = torch.from_numpy(np.unpackbits(file[dataset]))
    return [torch.nonzero(bits == value).flatten() for value in (1, 0)]


def read_split(path: str | os.PathLike, keys: tuple[str, str], count: int) -> list[torch.Tensor]:
    """Read a split file of the benchmark and return two index tensors (int64).

    The file is JSON such as {"train": ["int", ["0", "5", ...]], "valid": ["int", [...]]}, with the
    two names in `keys`. Raises UserError unless the indices are distinct whole numbers from 0 to
    `count` - 1.
    """
    content = read_json(path)
    lists = [read_indices(content, key, path, count) for key in keys]
    common = set(lists[0]) & set(lists[1])
    if common:
        raise UserError(
            f'{path}: "{keys[0]}" and "{keys[1]}" overlap, both have index {min(common)}. Remove it from one of them.'
        )
    return [torch.tensor(indices) for indices in lists]


def read_indices(content: object, key: str, path: str | os.PathLike, count: int) -> list[int]:
    """Return one list of a split file whose JSON content is `content`. Raises UserError."""
    entry = content.get(key) if isinstance(content, dict) else None
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == "int" and isinstance(entry[1], list)):
        raise UserError(f'{path} has no "{key}": ["int", [...]], which a split file of this data set has')
    where = f'{path}, "{key}"'
    for value in entry[1]:
        if not (type(value) in (int, str) and str(value).isdecimal() and len(str(value)) < 10):
            raise UserError(f"{where}: {str(value)[:40]!r} is not an index")
    indices = [int(value) for value in entry[1]]
    if not indices:
        raise UserError(f"{where} has no index")
    if max(indices) >= count:
        raise UserError(f"{where}: index {max(indices)} is too large for {count} images")
    if len(set(indices)) < len(indices):
        raise UserError(f"{where} has an index twice")
    return indices
