"""Loaders, which iterate over the batches of augmented images of an epoch.

Small images are kept as uint8 tensors on the training device and are augmented a batch at a time.
Every random number comes from one CPU generator, so the batches are the same on every device. Large
images (ImageNet) are read and augmented by worker processes. Each image is augmented with its own
seed.
"""

import os
import re
import resource
import signal
import threading
from collections.abc import Iterator
from functools import partial

import torch

import augment as augmenting
from augment import Augmentation, Transform
from splits import Files, Images, Split
from support import distributed
from support.devices import memory_format
from support.files import UserError
from support.images import open_image

Batch = tuple[torch.Tensor, torch.Tensor]  # images, float32 (B, 3, H, W), and labels, int64 (B,)


def make_loader(
    split: Split,
    batch_size: int,
    augmentation: Augmentation,
    device: torch.device,
    *,
    generator: torch.Generator | None = None,
    augment: bool = False,
    cutout: int = 0,
    workers: int = 0,
    shared: bool = True,
) -> "Loader | FileLoader":
    """Return the loader for a split: a Loader for Images, a FileLoader for Files.

    If `batch_size` is larger than the split, a batch holds the whole split. Only a Loader uses
    `cutout`, and only a FileLoader uses `workers`. The two classes explain the arguments.
    """
    batch_size = min(batch_size, len(split))
    settings = dict(generator=generator, augment=augment, shared=shared)
    if isinstance(split, Files):
        return FileLoader(split, batch_size, augmentation, device, workers=workers, **settings)
    return Loader(split, batch_size, augmentation, device, cutout=cutout, **settings)


class Batches:
    """Base class of both loaders: the size of the split and of its batches, and this process's share of each batch.

    Under torchrun each process gets its share of every batch. With `shared=False` each process gets
    the whole batch. The next epoch leaves out its first `skip` batches, but draws the random
    numbers of all batches.
    """

    skip = 0

    def __init__(
        self, split: Split, batch_size: int, generator: torch.Generator | None, augment: bool, shared: bool
    ) -> None:
        self.size = len(split)  # images
        self.batch_size = batch_size  # images of all processes together
        self.generator = generator
        self.augment = augment
        self.shared = shared
        self.image_shape = (3, *split.image_size)

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)  # rounded up

    @property
    def full_batch(self) -> int:
        """The number of images of a full batch that this process gets."""
        return len(range(self.batch_size)[self.share_of(self.batch_size)])

    def share_of(self, count: int) -> slice:
        """Return which of the `count` images of a batch are for this process.

        A training batch with fewer images than there are processes goes to all of them, because a
        step needs at least one image.
        """
        if not self.shared or (self.augment and count < distributed.world_size()):
            return slice(None)
        return slice(distributed.rank(), None, distributed.world_size())

    def shares(self) -> Iterator[range]:
        """Yield, for each batch of the next epoch, the positions of this process's images in the epoch's order."""
        first = self.skip * self.batch_size
        self.skip = 0
        for start in range(first, self.size, self.batch_size):
            batch = range(start, min(start + self.batch_size, self.size))
            yield batch[self.share_of(len(batch))]


class Loader(Batches):
    """Batches of images in memory: x float32 (B, 3, H, W), normalised, in the layout of the device; y int64 (B,).

    With `augment`, each image gets its own crop and flip. If `cutout` is not 0, each image also
    gets a cutout of this many pixels a side. The random numbers of an epoch are drawn from
    `generator` (CPU) when its iteration starts. Without a generator the images come in order.
    """

    def __init__(
        self,
        split: Images,
        batch_size: int,
        augmentation: Augmentation,
        device: torch.device,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        cutout: int = 0,
        shared: bool = True,
    ) -> None:
        super().__init__(split, batch_size, generator, augment, shared)
        self.augmentation = augmentation
        self.cutout = min(cutout, augmentation.max_cutout) if augment else 0
        if augment and cutout > self.cutout:
            distributed.say(f"--cutout erases at most {self.cutout}x{self.cutout} pixels of these images")
        self.height, self.width = split.image_size
        pad = augmentation.pad if augment else 0
        padded = torch.nn.functional.pad(split.images, (pad, pad, pad, pad)).to(device)
        pixels = padded.permute(0, 2, 3, 1).contiguous()
        # Every crop of every image, as a view: (N, 2 * pad + 1, 2 * pad + 1, 3, H, W)
        self.windows = pixels.unfold(1, self.height, 1).unfold(2, self.width, 1)
        self.labels = split.labels.to(device)
        mean = torch.tensor(augmentation.mean, device=device).repeat(self.width)  # (3 * W,), see augment.normalise
        std = torch.tensor(augmentation.std, device=device).repeat(self.width)
        self.scale = 1 / (255 * std)
        self.shift = -mean / std

    @property
    def memory(self) -> int:
        """The number of bytes that the images take on the device."""
        return self.windows.untyped_storage().nbytes()

    def __iter__(self) -> Iterator[Batch]:
        order, draws = self.draw_epoch()
        for share in self.shares():
            places = slice(share.start, share.stop, share.step)
            images = order[places]
            yield self.batch(images, draws and draws.of(places)), self.labels[images]

    def draw_epoch(self) -> tuple[torch.Tensor, augmenting.Draws | None]:
        """Draw the order of the images, int64 (N,), and, with `augment`, the random numbers that augment them."""
        device = self.labels.device
        order = torch.arange(self.size)
        if self.generator is not None:
            order = torch.randperm(self.size, generator=self.generator)
        draws = None
        if self.augment:
            image_size = (self.height, self.width)
            draws = augmenting.draw(self.size, image_size, self.augmentation, self.cutout, self.generator, device)
        return order.to(device), draws

    def batch(self, images: torch.Tensor, draws: augmenting.Draws | None) -> torch.Tensor:
        """Return the inputs (B, 3, H, W) for the indices `images`, int64 (B,), augmented if `draws` is given."""
        if draws is None:
            x = self.windows[images, 0, 0]  # (B, 3, H, W) uint8
        else:
            x = augmenting.flip(augmenting.crop(self.windows, draws, images), draws)
        rows = x.permute(0, 2, 3, 1).reshape(-1, self.height, self.width * 3)  # (B, H, 3 * W)
        rows = augmenting.normalise(rows, self.scale, self.shift)
        if draws is not None:
            rows = augmenting.cutout(rows, draws)
        x = rows.view(-1, self.height, self.width, 3).permute(0, 3, 1, 2)  # (B, 3, H, W)
        return x.contiguous(memory_format=memory_format(self.labels.device))


class FileLoader(Batches):
    """Batches (x, y) of image files with the ImageNet transforms, read by `workers` processes.

    When the iteration of an epoch starts, `generator` draws the order of the images, and a seed for
    the augmentation of each image. So the batches do not depend on the number of workers. Batches
    that are left out (`skip`) are not read.
    """

    memory = 0  # bytes of the images that are kept on the device

    def __init__(
        self,
        split: Files,
        batch_size: int,
        augmentation: Augmentation,
        device: torch.device,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        workers: int = 0,
        shared: bool = True,
    ) -> None:
        if workers:
            check_descriptors(workers)
        super().__init__(split, batch_size, generator, augment, shared)
        self.device = device
        self.batches = []  # this process's share of an epoch: lists of (index, seed)
        self.loader = torch.utils.data.DataLoader(
            Samples(split, augmenting.imagenet_transform(augmentation, augment, split.image_size[0])),
            batch_sampler=self.batches,
            num_workers=workers,
            worker_init_fn=leave_process_group,
            collate_fn=partial(collate, self.image_shape),
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # without `generator`, a DataLoader draws from the global one
        )

    def __iter__(self) -> Iterator[Batch]:
        order = torch.arange(self.size)
        seeds = order
        if self.generator is not None:
            order = torch.randperm(self.size, generator=self.generator)
            seeds = torch.randint(2**62, (self.size,), generator=self.generator)
        samples = list(zip(order.tolist(), seeds.tolist(), strict=True))
        self.batches[:] = [[samples[place] for place in share] for share in self.shares()]
        try:
            batches = iter(self.loader)
            if threading.current_thread() is threading.main_thread():
                # torch reports a lost worker with a signal handler, which raises an exception
                # wherever this process is at that moment. We switch the handler off, so that the
                # exception comes from the next batch and is caught below.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for batch in batches:
                if isinstance(batch, UserError):
                    # Not `raise batch`: an error that is also a local variable refers to itself, so
                    # it would stay in memory, and with it the worker processes.
                    raise UserError(str(batch))
                x = batch[0].to(self.device, non_blocking=True)
                y = batch[1].to(self.device, non_blocking=True)
                yield x.contiguous(memory_format=memory_format(self.device)), y
        except (RuntimeError, OSError, EOFError) as error:
            reason = str(error).strip()
            lost = "DataLoader worker .pid|shared memory|unable to write to file"
            if isinstance(error, RuntimeError) and not re.search(lost, reason):
                raise
            last_line = reason.rpartition("\n")[2]
            raise UserError(
                "a process that reads images died, usually because memory or shared memory (/dev/shm) ran out "
                f"({last_line}). Use fewer --workers (0: none), or give a container more shared memory (docker run "
                "--shm-size=2g)."
            ) from error


class Samples(torch.utils.data.Dataset):
    """The images of a split. An item is asked for by (index, seed): this seed is used to transform the image."""

    def __init__(self, split: Files, transform: Transform) -> None:
        self.split = split
        self.transform = transform

    def __getitem__(self, index_and_seed: tuple[int, int]) -> Batch | UserError:
        index, seed = index_and_seed
        try:
            image = open_image(self.split.paths[index])
        except UserError as error:
            return error  # raised here, in a worker, it would reach the main process as a traceback
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image), self.split.labels[index]


def leave_process_group(worker: int) -> None:
    """Move a worker process to its own process group, so that Ctrl-C and torchrun's signals do not reach it."""
    os.setpgrp()


def collate(image_shape: tuple[int, int, int], samples: list) -> Batch | UserError:
    """Make a batch of samples, or return the first UserError among them."""
    if not samples:  # the last batch can have fewer images than there are processes
        return torch.empty(0, *image_shape), torch.empty(0, dtype=torch.int64)
    bad = next((sample for sample in samples if isinstance(sample, UserError)), None)
    return bad if bad is not None else torch.utils.data.default_collate(samples)


# ---- checks


def check_descriptors(workers: int) -> None:
    """Raise the limit on open files to the number that `workers` processes need. With fewer, loading would hang.

    When we measured it, a training and a test loader together needed 12 files, and 10 more for each
    worker. Raises UserError if the system does not allow that many.
    """
    needed = len(os.listdir("/dev/fd")) + 24 + 10 * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"--workers {workers} needs {needed} open files, but the limit is {hard}: "
                "raise the limit (ulimit -n), or use fewer --workers (--workers 0: none)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_batch(batch_size: int, train: Split, auxiliary: bool = False) -> None:
    """Raise UserError if the split is smaller than a training batch, or a batch has too few values for BatchNorm."""
    if batch_size > len(train):
        raise UserError(
            f"--batch_size {batch_size} is larger than the training split of {len(train)} images: "
            f"give {len(train)} or less"
        )
    check_statistics("--batch_size", batch_size, train, distributed.world_size(), auxiliary)


def check_statistics(flag: str, batch_size: int, split: Split, processes: int = 1, auxiliary: bool = False) -> None:
    """Raise UserError if BatchNorm would take statistics from one value per channel: one pixel of one image.

    `flag` is the name of the batch size on the command line. After its last reduction, a network
    has only one pixel left of the smallest images that it can take. The auxiliary head has only one
    pixel left of every image.
    """
    last = len(split) % batch_size or batch_size
    smallest = [4, 4] if isinstance(split, Images) else [32, 32]
    sizes = (batch_size, last)
    one_image = 1 in sizes or 1 in [size // processes for size in sizes]
    if one_image and (auxiliary or split.image_size == smallest):
        height, width = split.image_size
        what = "--auxiliary" if auxiliary else f"a network for {width}x{height} pixels"
        raise UserError(
            f"{what} cannot train on one image, or take statistics from it, but with {flag} {batch_size} a batch of "
            f"the {len(split)} images has only one: choose another {flag}"
        )
