"""Data sets and splits of the NAS-Bench-201 searches; loaders and augmentation are those of the root module `data`.

CIFAR-100 and ImageNet16-120 have no validation split of their own: the benchmark validates on half of the images that
others test on, and so does a search here.
"""

import contextlib
import hashlib
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

import data
from data import Augmentation, Images
from nas201 import benchmark
from safeio import UserError, atomic_write, read_bytes, read_json, restricted_unpickle

DATASETS = ("cifar10", "cifar100", "ImageNet16-120", "folder", "digits")


def _augmentation(mean, std, pad=4):
    return Augmentation(tuple(v / 255 for v in mean), tuple(v / 255 for v in std), pad)


AUGMENTATION = {
    "cifar10": _augmentation((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": _augmentation((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "ImageNet16-120": _augmentation((122.68, 116.66, 104.01), (63.22, 61.26, 65.09), pad=2),
}
# Without index files: a stratified half of the training images, or so many of the test images.
VALIDATION = {"cifar100": 5000, "ImageNet16-120": 3000}
SPLIT_KEYS = {"cifar10": ("train", "valid"), "cifar100": ("xvalid", "xtest"), "ImageNet16-120": ("xvalid", "xtest")}


# ---- splits


def search_splits(args):
    """(train, validation, Augmentation) of a search on args.dataset. Raises UserError.

    cifar10, folder and digits share out the training images; cifar100 and ImageNet16-120 train on all of them and
    validate on a part of the test images. args.split_file names the benchmark's own index file for that.
    """
    if args.split_file and args.dataset not in SPLIT_KEYS:
        raise UserError(f"--split_file is for {', '.join(SPLIT_KEYS)}; {args.dataset} is split by --seed")
    generator = torch.Generator().manual_seed(args.seed)
    if args.dataset == "ImageNet16-120":
        train, test = load_imagenet16(args.data, args.workers).values()
    else:
        train = data.load(args.dataset, args.data, "train", args.workers)
        test = data.load(args.dataset, args.data, "test") if args.dataset in VALIDATION else train
    data.check_in_memory(train)
    augment = AUGMENTATION.get(args.dataset) or data.augmentation(args.dataset, train)
    if args.split_file:
        first, second = read_split(args.split_file, SPLIT_KEYS[args.dataset], len(test))
        train, valid = (train.subset(first), train.subset(second)) if test is train else (train, test.subset(first))
    elif args.dataset in VALIDATION:
        valid = data.draw(test, VALIDATION[args.dataset], generator)
    else:
        train, valid = data.halves(train, 0.5, False, generator)
    return data.draw(train, args.train_samples, generator), data.draw(valid, args.valid_samples, generator), augment


def read_split(path, keys, count):
    """Two index tensors, int64, from {"train": ["int", ["0", "5", ..]], "valid": [..]}; the keys are `keys`.

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


# ---- ImageNet16-120: ImageNet at 16x16 pixels, the first 120 classes (Chrabaszcz et al. 2017; Dong & Yang 2020)

_FILES = (*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data")
_SUMS = """
    27846dcaa50de8e21a7d1a35f30f0e91 c7254a054e0e795c69120a5727050e3f 4333d3df2e5ffb114b05d2ffc19b1e87
    1620cdf193304f4a92677b695d70d10f 348b3c2fdbb3940c4e9e834affd3b18d 6e765307c242a1b3d7d5ef9139b48945
    564926d8cbf8fc4818ba23d2faac7564 f4755871f718ccb653440b9dd0ebac66 bb6dd660c38c58552125b1a92f86b5d4
    8f03f34ac4b42271a294f91bf480f29b 3410e3017fdaefba8d5073aaa65e4bd6
"""
MD5 = dict(zip(_FILES, _SUMS.split(), strict=True))
CLASSES, SIZES = 120, {"train": 151_700, "test": 6_000}
CACHE = "ImageNet16-120.cache.npz"  # in the data folder


class _Array:
    """Stands in for numpy.ndarray in the batches: its state goes through frombuffer, which cannot lie about memory."""

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _version, shape, dtype, fortran, raw = state
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw  # Python 2 wrote its bytes as text
        self.array = np.frombuffer(raw, dtype.code).reshape(shape, order="F" if fortran else "C")


_BATCH_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): benchmark.Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


def load_imagenet16(root, workers=None):
    """{"train": Images, "test": Images} (151,700 and 6,000 of 16x16) from the eleven files in `root`.

    The first time every MD5 is checked and the 120 classes are picked; a cache in `root`, where that can be written,
    then stands for the files until the size or the time of one changes. Raises UserError naming the file.
    """
    root = Path(root)
    try:
        sources = np.array([[(root / name).stat().st_size, (root / name).stat().st_mtime_ns] for name in MD5])
    except OSError as error:
        raise UserError(f"ImageNet16-120 is not in {root}: cannot read {error.filename}: {error.strerror}") from error
    try:
        with np.load(root / CACHE, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception:  # no cache, or a damaged one, which raises nearly anything: it is made anew
        arrays = {}
    if not np.array_equal(arrays.get("sources"), sources):
        with ThreadPool(workers) as pool:
            batches = pool.map(partial(_read_batch, root), MD5)
        arrays = {"sources": sources}
        for split, part in (("train", batches[:-1]), ("test", batches[-1:])):
            images, labels = (np.concatenate(parts) for parts in zip(*part, strict=True))
            if len(labels) != SIZES[split]:
                raise UserError(f"{root}: {len(labels)} {split} images of {CLASSES} classes instead of {SIZES[split]}")
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        with contextlib.suppress(UserError), atomic_write(root / CACHE) as file:  # a read-only folder: no cache
            np.savez(file, **arrays)
    classes = [str(label) for label in range(1, CLASSES + 1)]
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {split: Images(tensors[f"{split}_images"], tensors[f"{split}_labels"], classes) for split in SIZES}


def _read_batch(root, name):
    """Images uint8 (n, 3, 16, 16) and labels int64 (n,) from 0 of the first 120 classes in file ROOT/NAME."""
    path = root / name
    content = read_bytes(path)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != MD5[name]:
        raise UserError(f"{path} has the MD5 {md5} instead of {MD5[name]}: it is damaged or another file")
    batch = restricted_unpickle(content, _BATCH_ALLOWED, path, encoding="latin-1")
    batch = batch if isinstance(batch, dict) else {}
    images, labels = getattr(batch.get("data"), "array", None), batch.get("labels")
    if images is None or images.dtype != np.uint8 or images.shape[1:] != (3 * 16 * 16,):
        raise UserError(f"{path} has no data of 16x16 images, uint8 (N, 768)")
    whole = isinstance(labels, list) and all(type(label) is int and 1 <= label <= 1000 for label in labels)
    if not whole or len(labels) != len(images):
        raise UserError(f"{path} has no list of {len(images)} labels in 1..1000")
    labels = np.array(labels, dtype=np.int64)
    kept = labels <= CLASSES
    return images[kept].reshape(-1, 3, 16, 16), labels[kept] - 1
