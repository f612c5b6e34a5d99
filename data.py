"""Data sets and splits: reading them, and which images train and which validate. `loaders` makes batches of them."""

import argparse
import collections
import hashlib
import math
import os
import socket
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

import image_folder
import memory
import seed_roles
from support import distributed, seeds
from support.files import UserError, no_empty_folders
from support.images import load_cache, open_image, save_cache, to_rgb, to_size

SMALL = 64  # pixels; up to here a folder's images are kept in memory and get the CIFAR recipe
CACHED = 5_000  # images of a folder; where so many are read into memory, they are kept in a file and decoded once
CACHE = ".evnas-images.npz"  # that file, beside the class folders
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
SHARE = 0.9  # of a folder's images; where so many have one small size, an image of another is a mistake


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
    image_size: list = field(default_factory=lambda: [224, 224])

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

# Where the published commands look for a data set, if not in ../data.
FOLDERS = {"imagenet": "../data/imagenet", "ImageNet16-120": "../data/ImageNet16"}


def describe(**splits):
    """Describe the splits of a run (name=Images or Files) for JSON; two runs on the same data have the same.

    {"classes": [names], "image_size": [height, width], "images": {split: count}, "per_class": {split: [fewest, most]},
    "source": {split: see `Files`}}. Where the data lie does not count, nor what is in files whose names and sizes are
    the same.
    """
    one = next(iter(splits.values()))
    counts = {name: torch.bincount(split.labels, minlength=len(one.classes)) for name, split in splits.items()}
    return {
        "classes": one.classes,
        "image_size": one.image_size,
        "images": {name: len(split) for name, split in splits.items()},
        "per_class": {name: [count.min().item(), count.max().item()] for name, count in counts.items()},
        "source": {name: split.source for name, split in splits.items()},
    }


def counts_text(description):
    """Return a line on the images of each split of a description, and on how they are shared out among the classes."""
    ranges = {name: " to ".join(map(str, sorted(set(pair)))) for name, pair in description["per_class"].items()}
    words = {"train": "training", "valid": "validation"}
    parts = [
        f"{count} {words.get(name, name)} images ({ranges[name]} a class)"
        for name, count in description["images"].items()
    ]
    size = "{1}x{0}".format(*description["image_size"])
    return f"{' and '.join(parts)} of {len(description['classes'])} classes, {size} pixels"


# ---- reading


def add_data_arguments(group, default, text):
    """Add --data, and how a folder's images are read."""
    group.add_argument("--data", default=default, help=text)
    text = f"keep what is read of {CACHED:,} images or more in a file {CACHE} beside their folders"
    group.add_argument("--image_cache", action=argparse.BooleanOptionalAction, default=True, help=text)


def load(dataset, root, split, workers=None, image_size=None, in_memory=None, cache=True):
    """Read split "train" or "test" of cifar10, cifar100, digits, folder or imagenet: Images, or Files if large.

    Of image files, `in_memory` says whether they are read now, as Images (None: if they are small, and of one size),
    and `image_size` to how many pixels a side they are resized and cropped, now or later. `workers` threads read them
    (default: one a core), with `cache` once: see `read_once`. Raises UserError naming what is missing or unreadable.
    """
    if dataset not in ("folder", "imagenet"):
        check_small(dataset, image_size, in_memory)
    if dataset in ("cifar10", "cifar100"):
        return load_cifar(dataset, root, split)
    if dataset == "digits":
        return load_digits(split)
    files = scan_folder(root, split, imagenet=dataset == "imagenet")
    if image_size:
        files = replace(files, image_size=[image_size, image_size])
    if in_memory is None and (image_size or dataset == "imagenet"):
        in_memory = dataset == "folder" and image_size <= SMALL
    if in_memory is False:
        return files
    read = read_resized if image_size else read_small
    return read_once(files, read, workers) if cache and len(files) >= CACHED else read(files, workers)


def check_small(dataset, image_size, in_memory):
    """Raise UserError where images of one small size are to be resized, or read one by one."""
    if image_size or in_memory is False:
        raise UserError(f"--image_size and --recipe imagenet are for folders of images, not for {dataset}")


def load_cifar(dataset, root, split):
    """Read CIFAR-10 or -100 through torchvision, which checks the files; download them where they are missing."""
    import torchvision

    kind = getattr(torchvision.datasets, dataset.upper())
    with distributed.one_after_the_other():
        try:
            source = kind(root, train=split == "train", download=False)
        except RuntimeError:  # so torchvision says that files are missing or damaged
            download_cifar(dataset, root, kind)
            source = kind(root, train=split == "train", download=False)
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(source.targets), list(source.classes), dataset)


def download_cifar(dataset, root, kind):
    """Download what torchvision's class `kind` reads. Raises UserError, also if nothing comes for DOWNLOAD_TIMEOUT."""
    archive = Path(root, kind.filename)
    before_us = archive.exists()
    distributed.say(f"{dataset} is not in {root}: downloading about 170 MB to it")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none, for the connection or for what comes
    try:
        with no_empty_folders(root):
            try:
                kind(root, download=True)
            except BaseException:
                if not before_us:  # what came is a part of it
                    archive.unlink(missing_ok=True)
                raise
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{dataset} is not in {root} and cannot be downloaded ({reason}): put the folder {kind.base_folder} there, "
            "as torchvision keeps it, name another folder with --data, or try --dataset digits"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def load_digits(split):
    """Read 1,797 handwritten digits, grey 8x8, that scikit-learn ships; a fixed stratified split into 1,437 and 360."""
    from sklearn.datasets import load_digits as load_sklearn

    bunch = load_sklearn()
    grey = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))  # values 0..16
    images = grey.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    classes = [str(name) for name in bunch.target_names]
    digits = Images(images, torch.from_numpy(bunch.target).long(), classes, "digits")
    order = stratified_order(digits.labels, torch.Generator().manual_seed(0))
    return digits.subset(order[:1437] if split == "train" else order[1437:])


def scan_folder(root, split, imagenet=False):
    """List the images in ROOT/train/CLASS, or in ROOT/test (else ROOT/val; ImageNet: only val).

    Classes are in the order of their names. Which files are images: see `image_folder`. Raises
    UserError.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data directory {root} does not exist")
    names = ["train"] if split == "train" else ["val"] if imagenet else ["test", "val"]
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"data directory {root} has no folder {' or '.join(names)}")
    images = image_folder.read_classes(folder)
    classes = list(images)
    paths = []
    labels = []
    digest = hashlib.sha256()
    for label, name in enumerate(classes):
        found = images[name]
        for path in found:
            digest.update(os.fsencode(f"{name}/{path.name} {image_folder.status(path).st_size}\n"))
        paths += found
        labels += [label] * len(found)
    files = Files(paths, torch.tensor(labels), classes, digest.hexdigest())
    if len(classes) == 1:
        distributed.say(f"note: {folder} has one class alone, {classes[0]}: every answer will be right")
    single = [name for name, count in zip(classes, torch.bincount(files.labels), strict=True) if count == 1]
    if single:
        distributed.say(f"note: {len(single)} classes in {folder} have a single image, such as {single[0]}")
    return files


def size_text(path):
    return "{}x{}".format(*open_image(path).size)


def read_small(files, workers=None):
    """Return the Files in memory, as Images, if all have one size of at most SMALL pixels a side; else as they are.

    Raises UserError for the first image of another size, if at least SHARE of them have one such size.
    """

    def is_small(image):
        return max(image.size) <= SMALL  # known from the header

    # Of photographs a few headers are read, not a million.
    sample = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:100].tolist()
    sizes = [open_image(files.paths[i], lambda image: image.size) for i in sample]
    if sum(max(size) <= SMALL for size in sizes) < len(sample) / 2:
        return files
    width, height = min(sizes, key=math.prod)
    check_fits(len(files), height, width)

    def read(image):
        return np.asarray(to_rgb(image)) if is_small(image) else np.empty(0)

    arrays = read_all(files.paths, read, workers)
    (shape, count), *_ = collections.Counter(array.shape for array in arrays).most_common()
    if len(shape) == 1 or count < SHARE * len(files):
        return files
    for path, array in zip(files.paths, arrays, strict=True):
        if array.shape != shape:
            raise UserError(
                f"{path} is {size_text(path)} pixels, but {count} of {len(files)} images in {path.parents[1]} are "
                f"{shape[1]}x{shape[0]}: resize or remove it"
            )
    return to_images(files, arrays)


def read_resized(files, workers=None):
    """Return the Files in memory, as Images, resized and cropped to their image_size."""
    height, width = files.image_size
    check_fits(len(files), height, width)
    read = lambda image: np.asarray(to_size(to_rgb(image), width, height))  # noqa: E731
    return to_images(files, read_all(files.paths, read, workers))


def check_fits(count, height, width):
    """Raise UserError where so many images do not fit into memory."""
    images = {f"{count:,} images of {width}x{height} pixels": 3 * count * height * width}
    memory.check(images, torch.device("cpu"), "take fewer images, or smaller ones (--image_size)")


def read_all(paths, use, workers):
    with ThreadPool(workers) as pool:  # decoding releases the interpreter lock
        return pool.map(lambda path: open_image(path, use), paths, chunksize=256)


def to_images(files, arrays):
    """Make the Images of Files and their pixels, uint8 (H, W, 3) of each."""
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Images(images, files.labels, files.classes, files.source)


def read_once(files, read, workers):
    """Return what read(files, workers) does; Images come from a file beside the class folders, once it is there.

    It is that of an earlier call for the same files. One that is damaged does not count, nor does it where none can be
    written.
    """
    path, key = files.paths[0].parents[1] / CACHE, fingerprint(files, read)
    images = load_cache(path, key, len(files) * 3 * max(SMALL, *files.image_size) ** 2).get("images")
    if images is not None and images.dtype == np.uint8 and images.ndim == 4 and images.shape[:2] == (len(files), 3):
        return Images(torch.from_numpy(images), files.labels, files.classes, files.source)
    split = read(files, workers)
    if isinstance(split, Images):
        save_cache(path, key, images=split.images.numpy())
    return split


def fingerprint(files, read):
    """Return a digest of names, sizes and times of change of a split's files, and of how they are read."""
    digest = hashlib.sha256(f"{read.__name__} {files.image_size}\n".encode())
    for path in files.paths:
        of_file = image_folder.status(path)
        digest.update(os.fsencode(f"{path.parent.name}/{path.name} {of_file.st_size} {of_file.st_mtime_ns}\n"))
    return digest.digest()


def augmentation(dataset, train=None, about=None):
    """Return the Augmentation of `dataset`.

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
    """Return a permutation of 0..N-1 whose every prefix holds the same share of each class, to within half an image."""
    permutation = torch.randperm(len(labels), generator=generator)
    shuffled = labels[permutation]
    by_class = torch.sort(shuffled, stable=True)
    counts = torch.bincount(shuffled)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(shuffled)
    rank[by_class.indices] = torch.arange(len(labels)) - starts[by_class.values]  # place within its class
    place = (rank.double() + 0.5) / counts[shuffled]
    return permutation[torch.sort(place, stable=True).indices]


def subsample(split, count, generator):
    """Draw `count` images of a split, classes in proportion; all if count is None. Raises UserError if too few."""
    if count is None:
        return split
    if count > len(split):
        raise UserError(f"{count} images are asked for, but the split has {len(split)}")
    return split.subset(stratified_order(split.labels, generator)[:count].sort().values)


def split_train(train, portion, in_file_order, generator):
    """Return (train, validation) of the training images: the first `portion` in file or in stratified random order."""
    order = torch.arange(len(train)) if in_file_order else stratified_order(train.labels, generator)
    count = int(portion * len(train))
    return train.subset(order[:count]), train.subset(order[count:])


def check_classes(**splits):
    """Raise UserError for a class of which a split (name=Images) that has images has none."""
    for name, split in splits.items():
        counts = torch.bincount(split.labels, minlength=len(split.classes))
        if len(split) and counts.min() == 0:
            total = sum((other.labels == counts.argmin()).sum().item() for other in splits.values())
            where = f"class {split.classes[counts.argmin()]} has {total} of the images"
            raise UserError(f"{where}, too few: {' and '.join(splits)} need one each, and {name} got none")


def search_splits(args):
    """Return (train, validation, Augmentation) of a search on the training images of args.dataset. Raises UserError."""
    images = load(args.dataset, args.data, "train", image_size=args.image_size, in_memory=True, cache=args.image_cache)
    check_in_memory(images)
    generator = seeds.generator(args, seed_roles.SPLIT)
    train, valid = split_train(images, args.train_portion, args.dataset in ("cifar10", "cifar100"), generator)
    check_classes(training=train, validation=valid)
    augment = augmentation(args.dataset, images)
    return subsample(train, args.train_samples, generator), subsample(valid, args.valid_samples, generator), augment


def check_in_memory(images, hint="give --image_size"):
    """Raise UserError for images that a network of the CIFAR family cannot take."""
    if isinstance(images, Files):
        first = images.paths[0]
        sizes = ((path, open_image(path).size) for path in images.paths)
        odd = next((path for path, size in sizes if max(size) > SMALL or size != open_image(first).size), first)
        shown = " and ".join(f"{path} {size_text(path)}" for path in dict.fromkeys((first, odd)))
        raise UserError(f"the images must all have one size of at most {SMALL} pixels a side; here are {shown}: {hint}")
    check_sides(images.image_size, 4)


def check_sides(image_size, step):
    """Raise UserError unless the sides of images of (height, width) pixels are multiples of `step`."""
    height, width = image_size
    if height % step or width % step:
        raise UserError(f"the images are {width}x{height}; both sides must be multiples of {step}")


def check_alike(name, one, other_name, other):
    """Raise UserError where two descriptions, see `describe`, differ in their classes or the size of their images."""
    image_folder.check_same_classes(name, one["classes"], other_name, other["classes"])
    if one["image_size"] != other["image_size"]:
        both = ((name, one), (other_name, other))
        sizes = [(where, "{1}x{0}".format(*it["image_size"])) for where, it in both]
        texts = [f"in {where} {size}{' (larger or uneven ones, cut)' * (size == '224x224')}" for where, size in sizes]
        raise UserError(f"the sizes of the images differ: {', '.join(texts)} pixels; --image_size can make them one")


def check_batch(batch_size, train, auxiliary=False):
    """Raises UserError for a training batch that cannot be filled, or normalised."""
    if batch_size > len(train):
        raise UserError(f"--batch_size {batch_size} is larger than the training split of {len(train)} images")
    check_statistics("--batch_size", batch_size, train, distributed.world_size(), auxiliary)


def check_statistics(flag, batch_size, split, processes=1, auxiliary=False):
    """Raises UserError where BatchNorm, for its statistics, would get one value a channel: one pixel of one image."""
    last = len(split) % batch_size or batch_size
    one_pixel = split.image_size == ([4, 4] if isinstance(split, Images) else [32, 32])  # behind all reductions
    if (auxiliary or one_pixel) and any(1 in (size, size // processes) for size in (batch_size, last)):
        what = "--auxiliary" if auxiliary else "a network for {1}x{0} pixels".format(*split.image_size)
        made = f"{flag} {batch_size} makes such a batch of {len(split)} images"
        raise UserError(f"{what} cannot train on one image, nor be measured with its statistics alone: {made}")
