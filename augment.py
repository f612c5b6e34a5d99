"""How images become inputs of a network: normalised, and in training cropped, flipped and cut out at random.

Images in memory are augmented a batch at a time, by `crop`, `flip` and `cutout` with the random
numbers of `draw`. Image files are augmented one by one, by the transforms of torchvision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image

from support.images import to_size

Transform = Callable[[Image.Image], torch.Tensor]  # from a PIL image to an input (3, H, W)


class Normalisation(NamedTuple):
    """Mean and standard deviation of the three channels, of pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Augmentation:
    """How the images of a data set are normalised, and how training images are augmented."""

    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    pad: int = 4  # pixels added to each side before the random crop
    flip: bool = True  # left to right, half of the images
    max_cutout: int = 1000  # largest side of the square that cutout erases, in pixels


def measure_normalisation(images: torch.Tensor) -> Normalisation:
    """Return the mean and standard deviation of images, uint8 (N, 3, H, W), over all pixels of each channel."""
    # Through a histogram of the 256 values: exact, and without a copy in floating point.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = counts @ values / counts.sum(1)
    std = (counts @ values**2 / counts.sum(1) - mean**2).clamp_min(1e-6).sqrt()
    return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))


# ---- batches of images in memory


class Draws(NamedTuple):
    """The random numbers that augment N images; None for what is not done to them."""

    top: torch.Tensor  # int64 (N,), first row of the crop
    left: torch.Tensor  # int64 (N,), first column of the crop
    flip: torch.Tensor | None  # bool (N,)
    hole_rows: torch.Tensor | None  # bool (N, H), the rows that cutout erases
    hole_columns: torch.Tensor | None  # bool (N, 3 * W), the columns, once for each channel

    def of(self, images: slice) -> "Draws":
        """Return the draws of some of the images."""
        return Draws(*(None if draws is None else draws[images] for draws in self))


def draw(
    count: int,
    image_size: tuple[int, int],
    augmentation: Augmentation,
    cutout_length: int,
    generator: torch.Generator,
    device: torch.device,
) -> Draws:
    """Draw the random numbers for `count` images of (height, width) pixels.

    They come from a CPU generator, in a fixed order, and so are the same on every device. Without
    cutout, `cutout_length` is 0.
    """

    def integers(high: int) -> torch.Tensor:
        return torch.randint(high, (count,), generator=generator).to(device)

    height, width = image_size
    offsets = 2 * augmentation.pad + 1
    top = integers(offsets)
    left = integers(offsets)
    flips = integers(2).bool() if augmentation.flip else None
    rows = columns = None
    if cutout_length:
        rows = inside(integers(height), cutout_length, height)
        columns = inside(integers(width), cutout_length, width).repeat_interleave(3, dim=1)
    return Draws(top, left, flips, rows, columns)


def inside(center: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """Return which of `size` pixels are in [c - length // 2, c + length // 2), for each center c of (N,): (N, size)."""
    distance = torch.arange(size, device=center.device) - center.view(-1, 1)
    return (distance >= -(length // 2)) & (distance < length // 2)


def crop(windows: torch.Tensor, draws: Draws, images: torch.Tensor) -> torch.Tensor:
    """Return the crops that are drawn for `images`, int64 (B,): (B, 3, H, W).

    `windows` has every crop of every padded image, (N, 2 * pad + 1, 2 * pad + 1, 3, H, W).
    """
    return windows[images, draws.top, draws.left]


def flip(batch: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Flip the drawn images of a batch (B, 3, H, W) from left to right."""
    if draws.flip is None:
        return batch
    return torch.where(draws.flip.view(-1, 1, 1, 1), batch.flip(3), batch)


def cutout(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Set the drawn square of each normalised image to 0, in place.

    A batch is given as rows of pixels, (B, H, 3 * W): see `normalise`.
    """
    if draws.hole_rows is None:
        return rows
    hole = draws.hole_rows.unsqueeze(2) & draws.hole_columns.unsqueeze(1)  # (B, H, 3 * W)
    return rows.masked_fill_(hole, 0.0)


def normalise(rows: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Normalise rows of pixels, uint8 (B, H, 3 * W) to float32, by a scale and a shift (3 * W).

    Long rows are several times as fast as a broadcast over three channels.
    """
    return rows.to(torch.float32).mul_(scale).add_(shift)


# ---- single images


def imagenet_transform(augmentation: Augmentation, augment: bool, side: int = 224) -> Transform:
    """Return the transform of the ImageNet recipe to (3, side, side), for training (`augment`) or for testing."""
    from torchvision.transforms import v2

    if augment:
        steps = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.2)]
    else:
        steps = [v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)]
    return with_normalisation(steps, augmentation)


def small_transform(augmentation: Augmentation, image_size: tuple[int, int]) -> Transform:
    """Return the transform to (3, height, width) that gives what a Loader makes of a resized image."""
    height, width = image_size
    return with_normalisation([lambda image: to_size(image, width, height)], augmentation)


def with_normalisation(steps: list[Callable], augmentation: Augmentation) -> Transform:
    """Return `steps`, which take and return PIL images, followed by the conversion to a normalised tensor."""
    from torchvision.transforms import v2

    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(augmentation.mean, augmentation.std)]
    return v2.Compose([*steps, *last])
