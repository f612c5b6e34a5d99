"""Data sets and splits: reading them, and which images train and which validate. `loaders` makes batches of them."""

import hashlib
import os
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support import distributed
from support.files import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
SMALL = 64  # pixels; up to here a folder's images are kept in memory and get the CIFAR recipe


@dataclass
class Images:
    """One split in memory: images uint8 (N, 3, H, W), labels int64 (N,), class names by label, `source` see `Files`."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: list
    source: str = ""

    def __len__(self):
        return len(self.labels)

    @property
    def image_size(self):
        return list(self.images.shape[2:])

    def subset(self, indices):
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass
class Files:
    """One split on disk: paths (N), labels int64 (N,), class names by label.

    `source` says where the split comes from: the name of a standard data set, or the SHA-256 of a folder's file names
    and sizes. A subset keeps it. `image_size` (height, width) is what a network sees of each image.
    """

    paths: list
    labels: torch.Tensor
    classes: list
    source: str = ""
    image_size = [224, 224]

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        return replace(self, paths=[self.paths[i] for i in indices.tolist()], labels=self.labels[indices])


@dataclass(frozen=True)
class Augmentation:
    """How a data set's images are normalised (mean and std of the three channels, in [0, 1]) and augmented."""

    mean: tuple
    std: tuple
    pad: int = 4  # of the random crop, pixels
    flip: bool = True
    max_cutout: int = 1000  # pixels


AUGMENTATION = {
    "cifar10": Augmentation((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": Augmentation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": Augmentation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def describe(**splits):
    """What the splits of a run (name=Images or Files) are, as JSON has it: two runs on the same data have the same.

    {"classes": [names], "image_size": [height, width], "images": {split: count}, "source": {split: see `Files`}}. Where
    the data lie does not count, nor what is in files whose names and sizes are the same.
    """
    one = next(iter(splits.values()))
    return {
        "classes": one.classes,
        "image_size": one.image_size,
        "images": {name: len(split) for name, split in splits.items()},
        "source": {name: split.source for name, split in splits.items()},
    }


# ---- reading


def load(dataset, root, split, workers=None):
    """Split "train" or "test" of cifar10, cifar100, digits, folder or imagenet below `root`: Images, or Files if large.

    A folder's images are read by `workers` threads (default: one a core). Raises UserError naming what is missing or
    unreadable.
    """
    if dataset in ("cifar10", "cifar100"):
        return load_cifar(dataset, root, split)
    if dataset == "digits":
        return load_digits(split)
    files = scan_folder(root, split, imagenet=dataset == "imagenet")
    if dataset == "imagenet" or not all_small(files):
        return files
    with ThreadPool(workers) as pool:  # decoding releases the interpreter lock
        arrays = pool.map(lambda path: np.asarray(open_image(path)), files.paths, chunksize=256)
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Images(images, files.labels, files.classes, files.source)


def load_cifar(dataset, root, split):
    """CIFAR-10 or -100 through torchvision, which checks the files and downloads them where they are missing."""
    import torchvision

    kind = getattr(torchvision.datasets, dataset.upper())
    try:
        with distributed.one_after_the_other():
            source = kind(root, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{dataset} is not in {root} and cannot be downloaded: {error}") from error
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(source.targets), list(source.classes), dataset)


def load_digits(split):
    """1,797 handwritten digits, grey 8x8, that scikit-learn ships; a fixed stratified split into 1,437 and 360."""
    from sklearn.datasets import load_digits as load_sklearn

    bunch = load_sklearn()
    grey = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))  # values 0..16
    images = grey.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    classes = [str(name) for name in bunch.target_names]
    digits = Images(images, torch.from_numpy(bunch.target).long(), classes, "digits")
    order = stratified_order(digits.labels, torch.Generator().manual_seed(0))
    return digits.subset(order[:1437] if split == "train" else order[1437:])


def scan_folder(root, split, imagenet=False):
    """Files of ROOT/train/CLASS/*, or of ROOT/test (else ROOT/val; ImageNet: val alone), classes sorted by name."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data directory {root} does not exist")
    names = ["train"] if split == "train" else ["val"] if imagenet else ["test", "val"]
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"data directory {root} has no folder {' or '.join(names)}")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders")
    paths, labels, digest = [], [], hashlib.sha256()
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"class folder {folder / name} has no images")
        for path in found:
            digest.update(b"%s/%s %d\n" % (os.fsencode(name), os.fsencode(path.name), file_size(path)))
        paths += found
        labels += [label] * len(found)
    return Files(paths, torch.tensor(labels), classes, digest.hexdigest())


def file_size(path):
    try:
        return path.stat().st_size
    except OSError as error:  # a link to nothing
        raise UserError(f"cannot read image {path}: {error.strerror}") from error


def open_image(path, use=lambda image: image.convert("RGB")):
    """`use` of the opened image: by default its RGB form, grey repeated over the channels. Raises UserError."""
    try:
        with Image.open(path) as image:
            return use(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path}: {error}") from error


def all_small(files):
    """Whether all images have one size of at most SMALL pixels a side. Ends at the first that does not."""
    sizes = (open_image(path, lambda image: image.size) for path in files.paths)  # reads the headers alone
    first = next(sizes)
    return max(first) <= SMALL and all(size == first for size in sizes)


def augmentation(dataset, train=None, about=None):
    """The Augmentation of `dataset`.

    For folder and digits, mean and std come from `about` (what was saved with weights), else from the `train` images.
    """
    if dataset in AUGMENTATION:
        return AUGMENTATION[dataset]
    if about and about.get("mean") and about.get("std"):
        mean, std = about["mean"], about["std"]
    elif isinstance(train, Files):
        return AUGMENTATION["imagenet"]
    else:
        # Over all pixels, channel by channel, through a histogram of the 256 values: exact, and no float copy.
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in train.images.unbind(1)]).double()
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = counts @ values / counts.sum(1)
        std = (counts @ values**2 / counts.sum(1) - mean**2).clamp_min(1e-6).sqrt()
    special = {"pad": 1, "flip": False, "max_cutout": 4} if dataset == "digits" else {}
    return Augmentation(tuple(map(float, mean)), tuple(map(float, std)), **special)


# ---- splits


def stratified_order(labels, generator):
    """A permutation of 0..N-1 whose every prefix holds the same share of each class, to within half an image."""
    permutation = torch.randperm(len(labels), generator=generator)
    shuffled = labels[permutation]
    by_class = torch.sort(shuffled, stable=True)
    counts = torch.bincount(shuffled)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(shuffled)
    rank[by_class.indices] = torch.arange(len(labels)) - starts[by_class.values]  # place within its class
    place = (rank.double() + 0.5) / counts[shuffled]
    return permutation[torch.sort(place, stable=True).indices]


def draw(split, count, generator):
    """`count` images of a split, classes in proportion; all of them if count is None. Raises UserError if too few."""
    if count is None:
        return split
    if count > len(split):
        raise UserError(f"{count} images are asked for, but the split has {len(split)}")
    return split.subset(stratified_order(split.labels, generator)[:count].sort().values)


def halves(train, portion, in_file_order, generator):
    """The training images as (train, validation): the first `portion` in file order, or a stratified permutation's."""
    order = torch.arange(len(train)) if in_file_order else stratified_order(train.labels, generator)
    count = int(portion * len(train))
    return train.subset(order[:count]), train.subset(order[count:])


def search_splits(args):
    """(train, validation, Augmentation) of a search on the training images of args.dataset. Raises UserError."""
    images = load(args.dataset, args.data, "train")
    check_in_memory(images)
    generator = torch.Generator().manual_seed(args.seed)
    train, valid = halves(images, args.train_portion, args.dataset in ("cifar10", "cifar100"), generator)
    augment = augmentation(args.dataset, images)
    return draw(train, args.train_samples, generator), draw(valid, args.valid_samples, generator), augment


def check_in_memory(images):
    """Raises UserError for images that a network of the CIFAR family cannot take."""
    if isinstance(images, Files):
        raise UserError(f"the images must all have one size of at most {SMALL} pixels a side")
    height, width = images.images.shape[2:]
    if height % 4 or width % 4:
        raise UserError(f"the images are {width}x{height}; both sides must be multiples of 4")


def check_batch(batch_size, train):
    if batch_size > len(train):
        raise UserError(f"--batch_size {batch_size} is larger than the training split of {len(train)} images")
