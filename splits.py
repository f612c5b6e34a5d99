"""Splits of a data set, such as the training images: their types, their descriptions, and how to divide them.

`Images` are decoded images in memory. `Files` are paths of images that are read batch by batch.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import class_names
from support.files import UserError


@dataclass
class Images:
    """A split in memory: decoded images, their labels, and the names of the classes."""

    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,), indices into `classes`
    classes: list[str]
    source: str = ""  # see `Files`

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> list[int]:
        """[height, width] in pixels."""
        return list(self.images.shape[2:])

    def subset(self, indices: torch.Tensor) -> "Images":
        """Return the images at `indices`, int64, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass
class Files:
    """A split on disk: the paths of its images, their labels, and the names of the classes."""

    paths: list[Path]  # (N)
    labels: torch.Tensor  # int64 (N,), indices into `classes`
    classes: list[str]
    # The name of a standard data set, or the SHA-256 of a folder's file names and file sizes. A
    # subset of a split has the source of the split.
    source: str = ""
    image_size: list[int] = field(default_factory=lambda: [224, 224])  # [height, width] that the network sees

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: torch.Tensor) -> "Files":
        """Return the files at `indices`, int64, in that order."""
        return replace(self, paths=[self.paths[i] for i in indices.tolist()], labels=self.labels[indices])


Split = Images | Files


# ---- descriptions


def describe(**splits: Split) -> dict:
    """Describe the splits of a run, given as name=split, for a JSON file.

    Two runs on the same data have the same description:
    {"classes": [names], "image_size": [height, width], "images": {split: count},
    "per_class": {split: [fewest, most]}, "source": {split: see `Files`}}.
    A description depends on the names and sizes of the files. It does not depend on the path of the
    data, nor on the contents of the files.
    """
    first = next(iter(splits.values()))
    counts = {name: torch.bincount(split.labels, minlength=len(first.classes)) for name, split in splits.items()}
    return {
        "classes": first.classes,
        "image_size": first.image_size,
        "images": {name: len(split) for name, split in splits.items()},
        "per_class": {name: [count.min().item(), count.max().item()] for name, count in counts.items()},
        "source": {name: split.source for name, split in splits.items()},
    }


def counts_text(description: dict) -> str:
    """Return a line for the log: the number of images in each split of a description, in total and per class."""
    words = {"train": "training", "valid": "validation"}
    parts = []
    for name, count in description["images"].items():
        fewest, most = description["per_class"][name]
        per_class = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        parts.append(f"{count} {words.get(name, name)} images ({per_class} per class)")
    height, width = description["image_size"]
    return f"{' and '.join(parts)}, {len(description['classes'])} classes, {width}x{height} pixels"


def check_alike(name: str, description: dict, other_name: str, other_description: dict) -> None:
    """Raise UserError if two descriptions (see `describe`) differ in classes or in image size.

    `name` and `other_name`, such as "the training images", are for the message.
    """
    class_names.check_same_classes(name, description["classes"], other_name, other_description["classes"])
    size = description["image_size"]
    other_size = other_description["image_size"]
    if size != other_size:
        raise UserError(
            f"the image sizes differ: {size_text(size)} in {name}, {size_text(other_size)} in {other_name}. "
            "Give --image_size to resize them all."
        )


def size_text(image_size: list[int]) -> str:
    """Return (height, width) as text. For 224x224 a note is added, because Files of any size are cropped to it."""
    height, width = image_size
    note = " (cropped from images that are large or of different sizes)" if height == width == 224 else ""
    return f"{width}x{height} pixels{note}"


def check_sides(image_size: list[int], step: int) -> None:
    """Raise UserError unless both sides of images of (height, width) pixels are multiples of `step`."""
    height, width = image_size
    if height % step or width % step:
        raise UserError(
            f"the images are {width}x{height} pixels, but both sides must be multiples of {step}. "
            "Resize them, for example with --image_size."
        )


# ---- dividing


def stratified_order(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a random permutation (N,) in which every prefix has the same share of each class.

    For each prefix there is a share t: the prefix has a share t of the images of every class, to
    within half an image. `labels` are int64 (N,).
    """
    permutation = torch.randperm(len(labels), generator=generator)
    shuffled = labels[permutation]
    by_class = torch.sort(shuffled, stable=True)
    counts = torch.bincount(shuffled)
    starts = counts.cumsum(0) - counts  # where each class begins, if images are sorted by class
    rank = torch.empty_like(shuffled)  # number of each image within its class
    rank[by_class.indices] = torch.arange(len(labels)) - starts[by_class.values]
    # Spread the images of each class evenly over (0, 1), then sort all images by their place there.
    place = (rank.double() + 0.5) / counts[shuffled]
    return permutation[torch.sort(place, stable=True).indices]


def subsample(split: Split, count: int | None, generator: torch.Generator) -> Split:
    """Draw `count` images with the classes in proportion, and keep their order. If `count` is None, return all images.

    Raises UserError if the split has fewer images.
    """
    if count is None:
        return split
    if count > len(split):
        raise UserError(f"{count} images are asked for, but the split has {len(split)}: ask for fewer")
    return split.subset(stratified_order(split.labels, generator)[:count].sort().values)


def split_train(train: Split, portion: float, in_file_order: bool, generator: torch.Generator) -> tuple[Split, Split]:
    """Divide the training images into (training, validation); `portion` is the share that trains.

    The images for training are the first ones, in file order or in a stratified random order.
    """
    order = torch.arange(len(train)) if in_file_order else stratified_order(train.labels, generator)
    count = int(portion * len(train))
    return train.subset(order[:count]), train.subset(order[count:])


def check_classes(**splits: Split) -> None:
    """Raise UserError if a class has no image in a split. Splits are given as name=split; empty splits are allowed."""
    for name, split in splits.items():
        counts = torch.bincount(split.labels, minlength=len(split.classes))
        if len(split) and counts.min() == 0:
            missing = counts.argmin()
            total = sum((other.labels == missing).sum().item() for other in splits.values())
            raise UserError(
                f"class {split.classes[missing]} has too few images ({total}): {' and '.join(splits)} need at least "
                f"one each, and {name} got none. Add images to the class, or remove it."
            )
