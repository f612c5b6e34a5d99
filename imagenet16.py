"""ImageNet16-120: the first 120 classes of ImageNet at 16x16 pixels, one of the data sets of NAS-Bench-201.

Chrabaszcz et al. (2017), "A downsampled variant of ImageNet"; Dong & Yang (2020), "NAS-Bench-201".
"""

import hashlib
import os
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

from splits import Images
from support.files import UserError, read_bytes, restricted_unpickle
from support.images import load_cache, save_cache
from support.numpy_pickles import Array, Dtype

TRAIN_FILES = [f"train_data_batch_{i}" for i in range(1, 11)]
TEST_FILES = ["val_data"]
MD5_SUMS = """
    27846dcaa50de8e21a7d1a35f30f0e91 c7254a054e0e795c69120a5727050e3f 4333d3df2e5ffb114b05d2ffc19b1e87
    1620cdf193304f4a92677b695d70d10f 348b3c2fdbb3940c4e9e834affd3b18d 6e765307c242a1b3d7d5ef9139b48945
    564926d8cbf8fc4818ba23d2faac7564 f4755871f718ccb653440b9dd0ebac66 bb6dd660c38c58552125b1a92f86b5d4
    8f03f34ac4b42271a294f91bf480f29b 3410e3017fdaefba8d5073aaa65e4bd6
"""
MD5 = dict(zip([*TRAIN_FILES, *TEST_FILES], MD5_SUMS.split(), strict=True))
CLASSES = 120
SIZES = {"train": 151_700, "test": 6_000}  # images
CACHE = "ImageNet16-120.cache.npz"  # in the data folder
ALLOWED = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Dtype,
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,
}


def load_imagenet16(root: str | os.PathLike, split: str, workers: int | None = None) -> Images:
    """Read a split: "train", 151,700 images, or "test", the 6,000 validation images.

    `root` has the eleven files of the 16x16 download. The first call checks the MD5 sum of each
    file, picks the 120 classes, and writes a cache next to the files if possible. Later calls read
    the cache until the size or the time of a file changes. `workers` threads read the files. Raises
    UserError, which names the file.
    """
    root = Path(root)
    arrays = read_splits(root, workers)
    classes = [str(label) for label in range(1, CLASSES + 1)]
    images = torch.from_numpy(arrays[f"{split}_images"])
    labels = torch.from_numpy(arrays[f"{split}_labels"])
    return Images(images, labels, classes, "ImageNet16-120")


def read_splits(root: Path, workers: int | None) -> dict[str, np.ndarray]:
    """Read both splits: "train_images", uint8 (N, 3, 16, 16), "train_labels", int64 (N,), and those of "test"."""
    try:
        status = [(root / name).stat() for name in MD5]
    except OSError as error:
        raise UserError(
            f"ImageNet16-120 is not in {root}: cannot read {error.filename} ({error.strerror}). "
            "Put its eleven files there, or give their folder with --data."
        ) from error
    key = np.array([[file.st_size, file.st_mtime_ns] for file in status]).tobytes()
    limit = sum(SIZES.values()) * (3 * 16 * 16 + 8)
    arrays = load_cache(root / CACHE, key, limit)
    if not arrays:
        with ThreadPool(workers) as pool:
            batches = dict(zip(MD5, pool.map(partial(read_batch, root), MD5), strict=True))
        for split, files in (("train", TRAIN_FILES), ("test", TEST_FILES)):
            images = np.concatenate([batches[name][0] for name in files])
            labels = np.concatenate([batches[name][1] for name in files])
            if len(labels) != SIZES[split]:
                raise UserError(
                    f"{root} has {len(labels)} {split} images of {CLASSES} classes instead of {SIZES[split]}: "
                    "download the files again"
                )
            arrays[f"{split}_images"] = images
            arrays[f"{split}_labels"] = labels
        save_cache(root / CACHE, key, **arrays)
    return arrays


def read_batch(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images, uint8 (n, 3, 16, 16), and labels, int64 (n,), of the 120 classes from the file ROOT/NAME.

    Raises UserError.
    """
    path = root / name
    content = read_bytes(path)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != MD5[name]:
        raise UserError(
            f"{path} has the MD5 {md5} instead of {MD5[name]}: it is damaged or another file. Download it again."
        )
    batch = restricted_unpickle(content, ALLOWED, path, encoding="latin-1")
    batch = batch if isinstance(batch, dict) else {}
    images = getattr(batch.get("data"), "array", None)
    if images is None or images.dtype != np.uint8 or images.shape[1:] != (3 * 16 * 16,):
        raise UserError(f"{path} has no 16x16 images (data, uint8 (N, 768)): download it again")
    labels = batch.get("labels")
    valid = isinstance(labels, list) and all(type(label) is int and 1 <= label <= 1000 for label in labels)
    if not valid or len(labels) != len(images):
        raise UserError(f"{path} has no list of {len(images)} labels in 1..1000: download it again")
    labels = np.array(labels, dtype=np.int64)
    kept = labels <= CLASSES
    return images[kept].reshape(-1, 3, 16, 16), labels[kept] - 1
