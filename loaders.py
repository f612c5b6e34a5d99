"""Loaders: batches of augmented images.

Small images live as uint8 tensors on the training device and are cropped, flipped, normalised and cut out in batches;
every random number comes from one CPU generator, so the sequence is the same on every device. Large images (ImageNet)
are read and augmented by worker processes, each sample under a seed of its own.
"""

import os
import re
import resource
import signal
import threading
from functools import partial

import torch

from data import Files
from support import distributed
from support.devices import memory_format
from support.files import UserError
from support.images import open_image, to_size


def make_loader(split, batch_size, augmentation, device, *, workers=0, cutout=0, **settings):
    """Return the loader that `split` (Images or Files) needs; batches larger than the split are cut to it."""
    batch_size = min(batch_size, len(split))
    if isinstance(split, Files):
        return FileLoader(split, batch_size, augmentation, device, workers=workers, **settings)
    return Loader(split, batch_size, augmentation, device, cutout=cutout, **settings)


def share_of(batch, shared, training):
    """Return this process's share of a batch, if batches are `shared` out; never an empty one in training."""
    if not shared or (training and len(batch) < distributed.world_size()):
        return slice(None)
    return slice(distributed.rank(), None, distributed.world_size())


def images_per_process(loader) -> int:
    """Return how many images of a full training batch this process gets."""
    batch = range(loader.batch_size)
    return len(batch[share_of(batch, True, True)])


class Loader:
    """Batches (x, y) of in-memory images: x float32 (B, 3, H, W) normalised, in the layout of the device; y int64 (B,).

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
            x = rows.view(-1, self.height, self.width, 3).permute(0, 3, 1, 2)
            yield x.contiguous(memory_format=memory_format(device)), self.labels[batch]


def inside(center, length, size):
    """Tell which of `size` pixels lie in [c - length // 2, c + length // 2) of each center c of (N,): (N, size)."""
    distance = torch.arange(size, device=center.device) - center.view(-1, 1)
    return (distance >= -(length // 2)) & (distance < length // 2)


def check_descriptors(workers: int) -> None:
    """Raise UserError where a process may open too few files for so many `workers`: loading would wait for ever.

    A training and a test loader together have been seen to need 12 and 10 a worker. The limit is raised where that is
    allowed.
    """
    needed = len(os.listdir("/dev/fd")) + 24 + 10 * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"--workers {workers} needs {needed} open files, but the limit is {hard}: "
                "raise it (ulimit -n), or give fewer (--workers 0: none)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class FileLoader:
    """Batches (x, y) of image files with the ImageNet transforms, read by `workers` processes.

    An epoch's order and a seed for each sample's augmentation are drawn from `generator` when its iteration starts: the
    result does not depend on the workers. The next iteration leaves out its first `skip` batches: they are not read.
    """

    skip = 0

    def __init__(
        self, split, batch_size, augmentation, device, *, generator=None, augment=False, workers=0, shared=True
    ):
        if workers:
            check_descriptors(workers)
        self.device, self.generator, self.shared, self.augment = device, generator, shared, augment
        self.batch_size, self.size = batch_size, len(split)
        self.image_shape = (3, *split.image_size)
        self.batches = []  # what this process has to do of an epoch: lists of (index, seed)
        self.loader = torch.utils.data.DataLoader(
            _Samples(split, imagenet_transform(augmentation, augment, split.image_size[0])),
            batch_sampler=self.batches,
            num_workers=workers,
            worker_init_fn=_leave_group,
            collate_fn=partial(_collate, self.image_shape),
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
        try:
            batches = iter(self.loader)
            if threading.current_thread() is threading.main_thread():
                # Of a lost worker torch tells by an exception wherever this process is; here it is noticed as well.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                x, y = (t.to(self.device, non_blocking=True) for t in batch)
                yield x.contiguous(memory_format=memory_format(self.device)), y
        except (RuntimeError, OSError, EOFError) as error:
            reason = str(error).strip()
            lost = "DataLoader worker .pid|shared memory|unable to write to file"
            if isinstance(error, RuntimeError) and not re.search(lost, reason):
                raise
            raise UserError(
                "a process that reads images was lost, most often for want of memory or of shared memory (/dev/shm; "
                f"docker run --shm-size=2g): give fewer, --workers 0 for none ({reason.rpartition(chr(10))[2]})"
            ) from error


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


def _collate(image_shape, samples):
    if not samples:  # the last batch can have fewer images than there are processes
        return torch.empty(0, *image_shape), torch.empty(0, dtype=torch.int64)
    bad = next((sample for sample in samples if isinstance(sample, UserError)), None)
    return bad if bad is not None else torch.utils.data.default_collate(samples)


def imagenet_transform(augmentation, augment, side=224):
    """Return what turns a PIL image into an input (3, side, side) of a network for ImageNet."""
    from torchvision.transforms import v2

    if augment:
        steps = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.2)]
    else:
        steps = [v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)]
    return normalised(steps, augmentation)


def small_transform(augmentation, image_size):
    """Return what turns a PIL image into an input (3, height, width), as `data.read_resized` and a Loader do."""
    height, width = image_size
    return normalised([lambda image: to_size(image, width, height)], augmentation)


def normalised(steps, augmentation):
    from torchvision.transforms import v2

    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(augmentation.mean, augmentation.std)]
    return v2.Compose([*steps, *last])
