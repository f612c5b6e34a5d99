"""Turn images into inputs of a network: normalise them and, in training, crop, flip and cut out at random.

Images in memory are augmented a batch at a time, by `crop`, `flip` and `cutout` with random numbers
from `draw`. Image files are augmented one by one, by the transforms of torchvision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image

from support.images import to_size

Transform = Callable[[Image.Image], torch.Tensor]  # from a PIL image to an input (3, H, W)


class Normalisation(NamedTuple):
    """Mean and standard deviation of each of the three channels, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Augmentation:
    """How the images of a data set are normalised, and how training images are augmented."""

    mean: tuple[float, float, float]  # of each channel, for pixels in [0, 1]
    std: tuple[float, float, float]
    pad: int = 4  # pixels added to each side before the random crop
    flip: bool = True  # flip a random half of the images from left to right
    max_cutout: int = 1000  # largest side of the square that cutout erases, in pixels


def measure_normalisation(images: torch.Tensor) -> Normalisation:
    """Return the mean and standard deviation of images, uint8 (N, 3, H, W), over all pixels of each channel."""
    # A histogram of the 256 pixel values gives exact sums, without a floating-point copy of the
    # images.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = counts @ values / counts.sum(1)
    std = (counts @ values**2 / counts.sum(1) - mean**2).clamp_min(1e-6).sqrt()
    return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))


# ---- batches of images in memory


class Draws(NamedTuple):
    """The random numbers that augment N images. A field is None if that augmentation is switched off."""

    top: torch.Tensor  # int64 (N,), first row of the crop
    left: torch.Tensor  # int64 (N,), first column of the crop
    flip: torch.Tensor | None  # bool (N,), whether the image is flipped
    hole_rows: torch.Tensor | None  # bool (N, H), the rows that cutout erases
    hole_columns: torch.Tensor | None  # bool (N, 3 * W), the columns that cutout erases, each repeated for 3 channels

    def of(self, images: slice) -> "Draws":
        """Return the random numbers of the images in this slice."""
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

    `generator` is on the CPU and draws in a fixed order, so the numbers are the same on every
    device. A `cutout_length` of 0 switches cutout off.
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
    """Return a mask (N, size) of the pixels that are within `length // 2` of each center.

    Row i marks the pixels in [c - length // 2, c + length // 2), where c is `center[i]`.
    """
    distance = torch.arange(size, device=center.device) - center.view(-1, 1)
    return (distance >= -(length // 2)) & (distance < length // 2)


def crop(windows: torch.Tensor, draws: Draws, images: torch.Tensor) -> torch.Tensor:
    """Return the randomly drawn crop of each image, (B, 3, H, W).

    `images` are indices, int64 (B,). `windows` has every possible crop of every padded image:
    (N, 2 * pad + 1, 2 * pad + 1, 3, H, W).
    """
    return windows[images, draws.top, draws.left]


def flip(batch: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Flip the images of a batch (B, 3, H, W) that `draws` selects, from left to right."""
    if draws.flip is None:
        return batch
    return torch.where(draws.flip.view(-1, 1, 1, 1), batch.flip(3), batch)


def cutout(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Set the randomly drawn square of each normalised image to 0, in place.

    `rows` are the images in the layout (B, H, 3 * W), see `normalise`.
    """
    if draws.hole_rows is None:
        return rows
    hole = draws.hole_rows.unsqueeze(2) & draws.hole_columns.unsqueeze(1)  # (B, H, 3 * W)
    return rows.masked_fill_(hole, 0.0)


def normalise(rows: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Normalise rows of pixels, uint8 (B, H, 3 * W), to float32: pixel * scale + shift, both (3 * W,).

    A row holds W pixels, each with its three channels. Arithmetic on such long rows is several
    times as fast as broadcasting over three channels.
    """
    return rows.to(torch.float32).mul_(scale).add_(shift)


# ---- single images


def imagenet_transform(augmentation: Augmentation, augment: bool, side: int = 224) -> Transform:
    """Return the ImageNet recipe's transform from a PIL image to a tensor (3, side, side).

    With `augment` it is the random transform of training, otherwise the transform of testing.
    """
    from torchvision.transforms import v2

    if augment:
        steps = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.2)]
    else:
        steps = [v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)]
    return with_normalisation(steps, augmentation)


def small_transform(augmentation: Augmentation, image_size: tuple[int, int]) -> Transform:
    """Return the transform from a PIL image to a tensor (3, height, width).

    A Loader without augmentation computes the same tensor from the resized image.
    """
    height, width = image_size
    return with_normalisation([lambda image: to_size(image, width, height)], augmentation)


def with_normalisation(steps: list[Callable], augmentation: Augmentation) -> Transform:
    """Return the transform that applies `steps` to a PIL image and then converts it to a normalised tensor."""
    from torchvision.transforms import v2

    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(augmentation.mean, augmentation.std)]
    return v2.Compose([*steps, *last])
