"""Data sets, splits and the loaders that augment them.

Small images live as uint8 tensors on the training device and are cropped, flipped, normalised and cut out in batches;
every random number comes from one CPU generator, so the sequence is the same on every device. Large images (ImageNet)
are read and augmented by worker processes, each sample under a seed of its own.
"""

import os
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import utils
from safeio import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
SMALL = 64  # pixels; up to here a folder's images are kept in memory and get the CIFAR recipe


@dataclass
class Images:
    """One split in memory: images uint8 (N, 3, H, W), labels int64 (N,), the class names by label."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: list

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        return Images(self.images[indices], self.labels[indices], self.classes)


@dataclass
class Files:
    """One split on disk: paths (N), labels int64 (N,), the class names by label."""

    paths: list
    labels: torch.Tensor
    classes: list

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        return Files([self.paths[i] for i in indices.tolist()], self.labels[indices], self.classes)


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
    return Images(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), files.labels, files.classes)


def load_cifar(dataset, root, split):
    """CIFAR-10 or -100 through torchvision, which checks the files and downloads them where they are missing."""
    import torchvision

    kind = getattr(torchvision.datasets, dataset.upper())
    try:
        with utils.one_after_the_other():
            source = kind(root, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{dataset} is not in {root} and cannot be downloaded: {error}") from error
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(source.targets), list(source.classes))


def load_digits(split):
    """1,797 handwritten digits, grey 8x8, that scikit-learn ships; a fixed stratified split into 1,437 and 360."""
    from sklearn.datasets import load_digits as load_sklearn

    bunch = load_sklearn()
    grey = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))  # values 0..16
    images = grey.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    digits = Images(images, torch.from_numpy(bunch.target).long(), [str(name) for name in bunch.target_names])
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
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"class folder {folder / name} has no images")
        paths += found
        labels += [label] * len(found)
    return Files(paths, torch.tensor(labels), classes)


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


# ---- loaders


def make_loader(split, batch_size, augmentation, device, *, workers=0, cutout=0, **settings):
    """The loader that `split` (Images or Files) needs; batches larger than the split are cut to it."""
    batch_size = min(batch_size, len(split))
    if isinstance(split, Files):
        return FileLoader(split, batch_size, augmentation, device, workers=workers, **settings)
    return Loader(split, batch_size, augmentation, device, cutout=cutout, **settings)


def share_of(batch, shared, training):
    """This process's share of a batch, if batches are `shared` out; never an empty one in training."""
    if not shared or (training and len(batch) < utils.world_size()):
        return slice(None)
    return slice(utils.rank(), None, utils.world_size())


class Loader:
    """Batches (x, y) of in-memory images: x float32 (B, 3, H, W) normalised, channels-last; y int64 (B,).

    With `augment`, each sample gets its own crop offset and flip, and a cutout of `cutout` pixels if that is not 0.
    An epoch's random numbers are drawn from `generator` (CPU) when its iteration starts. Under torchrun each process
    gets its share of every batch, or with `shared=False` the whole of it. The next iteration leaves out its first
    `skip` batches, but draws as ever.
    """

    skip = 0

    def __init__(
        self, split, batch_size, augmentation, device, *, generator=None, augment=False, cutout=0, shared=True
    ):
        self.augmentation, self.augment, self.generator, self.shared = augmentation, augment, generator, shared
        self.batch_size, self.size = batch_size, len(split)
        self.cutout = min(cutout, augmentation.max_cutout) if augment else 0
        self.image_shape = split.images.shape[1:]
        _, self.height, self.width = self.image_shape
        pad = augmentation.pad if augment else 0
        padded = torch.nn.functional.pad(split.images, (pad, pad, pad, pad)).to(device)
        # Every crop of every image as a channels-last view: (N, 2 * pad + 1, 2 * pad + 1, 3, H, W)
        pixels = padded.permute(0, 2, 3, 1).contiguous()
        self.windows = pixels.unfold(1, self.height, 1).unfold(2, self.width, 1)
        self.labels = split.labels.to(device)
        # Of a row of pixels, (W * 3,): long rows are several times as fast as a broadcast over three channels.
        mean, std = (torch.tensor(v, device=device).repeat(self.width) for v in (augmentation.mean, augmentation.std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __len__(self):
        return -(-self.size // self.batch_size)

    def __iter__(self):
        n, device = self.size, self.labels.device
        crops = self.windows.shape[1]
        random_int = lambda high: torch.randint(high, (n,), generator=self.generator).to(device)  # noqa: E731
        order = torch.arange(n) if self.generator is None else torch.randperm(n, generator=self.generator)
        order = order.to(device)
        if self.augment:
            top, left = random_int(crops), random_int(crops)
            flip = random_int(2).bool() if self.augmentation.flip else None
            if self.cutout:
                hole_y = inside(random_int(self.height), self.cutout, self.height)
                hole_x = inside(random_int(self.width), self.cutout, self.width).repeat_interleave(3, dim=1)
        first, self.skip = self.skip * self.batch_size, 0
        for start in range(first, n, self.batch_size):
            draws = slice(start, start + self.batch_size)
            share = share_of(order[draws], self.shared, self.augment)
            batch = order[draws][share]
            if not self.augment:
                x = self.windows[batch, 0, 0]
            else:
                x = self.windows[batch, top[draws][share], left[draws][share]]  # (B, 3, H, W) uint8
                if flip is not None:
                    x = torch.where(flip[draws][share].view(-1, 1, 1, 1), x.flip(3), x)
            rows = x.permute(0, 2, 3, 1).reshape(-1, self.height, self.width * 3)
            rows = rows.to(torch.float32).mul_(self.scale).add_(self.shift)
            if self.cutout:
                rows.masked_fill_(hole_y[draws][share].unsqueeze(2) & hole_x[draws][share].unsqueeze(1), 0.0)
            yield rows.view(-1, self.height, self.width, 3).permute(0, 3, 1, 2), self.labels[batch]


def inside(center, length, size):
    """Which of `size` pixels lie in [c - length // 2, c + length // 2), for each of the centers (N,): (N, size)."""
    distance = torch.arange(size, device=center.device) - center.view(-1, 1)
    return (distance >= -(length // 2)) & (distance < length // 2)


class FileLoader:
    """Batches (x, y) of image files with the ImageNet transforms, read by `workers` processes.

    An epoch's order and a seed for each sample's augmentation are drawn from `generator` when its iteration starts: the
    result does not depend on the workers. The next iteration leaves out its first `skip` batches: they are not read.
    """

    image_shape, skip = (3, 224, 224), 0

    def __init__(
        self, split, batch_size, augmentation, device, *, generator=None, augment=False, workers=0, shared=True
    ):
        self.device, self.generator, self.shared, self.augment = device, generator, shared, augment
        self.batch_size, self.size = batch_size, len(split)
        self.batches = []  # what this process has to do of an epoch: lists of (index, seed)
        self.loader = torch.utils.data.DataLoader(
            _Samples(split, imagenet_transform(augmentation, augment)),
            batch_sampler=self.batches,
            num_workers=workers,
            worker_init_fn=_leave_group,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # or the loader would draw from the global state
        )

    def __len__(self):
        return -(-self.size // self.batch_size)

    def __iter__(self):
        order = seeds = torch.arange(self.size)
        if self.generator is not None:
            order = torch.randperm(self.size, generator=self.generator)
            seeds = torch.randint(2**62, (self.size,), generator=self.generator)
        samples = list(zip(order.tolist(), seeds.tolist(), strict=True))
        first, self.skip = self.skip * self.batch_size, 0
        batches = (samples[i : i + self.batch_size] for i in range(first, self.size, self.batch_size))
        self.batches[:] = [batch[share_of(batch, self.shared, self.augment)] for batch in batches]
        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            x, y = (t.to(self.device, non_blocking=True) for t in batch)
            yield x.contiguous(memory_format=torch.channels_last), y


class _Samples(torch.utils.data.Dataset):
    def __init__(self, split, transform):
        self.split, self.transform = split, transform

    def __getitem__(self, index_and_seed):
        index, seed = index_and_seed
        try:
            image = open_image(self.split.paths[index])
        except UserError as error:  # carried to the main process: raised here it would arrive as a traceback
            return error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image), self.split.labels[index]


def _leave_group(worker):
    """Give a worker process a group of its own: Ctrl-C and torchrun's signals are for the process it reads for."""
    os.setpgrp()


def _collate(samples):
    if not samples:  # the last batch can have fewer images than there are processes
        return torch.empty(0, *FileLoader.image_shape), torch.empty(0, dtype=torch.int64)
    bad = next((sample for sample in samples if isinstance(sample, UserError)), None)
    return bad if bad is not None else torch.utils.data.default_collate(samples)


def imagenet_transform(augmentation, augment):
    from torchvision.transforms import v2

    if augment:
        steps = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.2)]
    else:
        steps = [v2.Resize(256), v2.CenterCrop(224)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(augmentation.mean, augmentation.std)]
    return v2.Compose(steps)
