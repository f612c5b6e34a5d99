"""ImageNet16-120: ImageNet at 16x16 pixels, the first 120 classes (Chrabaszcz et al. 2017; Dong & Yang 2020)."""

import hashlib
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

from data import Images
from nas201.sources import Dtype
from support.files import UserError, read_bytes, restricted_unpickle
from support.images import load_cache, save_cache

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
    ("numpy", "dtype"): Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


def load_imagenet16(root, workers=None):
    """Read {"train": Images, "test": Images} (151,700 and 6,000 of 16x16) from the eleven files in `root`.

    The first time every MD5 is checked and the 120 classes are picked; a cache in `root`, where that can be written,
    then stands for the files until the size or the time of one changes. Raises UserError naming the file.
    """
    root = Path(root)
    try:
        sources = np.array([[(root / name).stat().st_size, (root / name).stat().st_mtime_ns] for name in MD5])
    except OSError as error:
        raise UserError(f"ImageNet16-120 is not in {root}: cannot read {error.filename}: {error.strerror}") from error
    arrays = load_cache(root / CACHE, sources.tobytes(), sum(SIZES.values()) * (3 * 16 * 16 + 8))
    if not arrays:
        with ThreadPool(workers) as pool:
            batches = pool.map(partial(_read_batch, root), MD5)
        for split, part in (("train", batches[:-1]), ("test", batches[-1:])):
            images, labels = (np.concatenate(parts) for parts in zip(*part, strict=True))
            if len(labels) != SIZES[split]:
                raise UserError(f"{root}: {len(labels)} {split} images of {CLASSES} classes instead of {SIZES[split]}")
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        save_cache(root / CACHE, sources.tobytes(), **arrays)
    classes = [str(label) for label in range(1, CLASSES + 1)]
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {
        split: Images(tensors[f"{split}_images"], tensors[f"{split}_labels"], classes, "ImageNet16-120")
        for split in SIZES
    }


def _read_batch(root, name):
    """Read images, uint8 (n, 3, 16, 16), and labels, int64 (n,), of the first 120 classes from file ROOT/NAME."""
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
