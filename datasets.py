"""The data sets that --dataset offers. Everything the program knows about a data set is in its entry in DATASETS.

To add a data set, add an entry. The entry names a function that loads the images, unless the images
are in class folders. Every command takes its choices for --dataset from the entries.
"""

import argparse
import functools
import importlib.util
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import image_folder
import imagenet16
import seed_roles
from augment import Augmentation, Normalisation, measure_normalisation
from splits import Files, Images, Split, check_classes, split_train, stratified_order, subsample
from support import distributed, seeds
from support.files import UserError, no_empty_folders

DOWNLOAD_TIMEOUT = 30  # seconds without an answer from the server


# ---- loading


def load_cifar(name: str, root: str | os.PathLike, split: str, workers: int | None = None) -> Images:
    """Read "cifar10" or "cifar100" through torchvision, which checks the files; download them if they are missing."""
    import torchvision

    kind = getattr(torchvision.datasets, name.upper())
    with distributed.one_after_the_other():
        try:
            source = kind(root, train=split == "train", download=False)
        except RuntimeError:  # torchvision's answer to missing or damaged files
            download_cifar(name, root, kind)
            source = kind(root, train=split == "train", download=False)
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    return Images(images, torch.tensor(source.targets), list(source.classes), name)


def download_cifar(name: str, root: str | os.PathLike, kind: type) -> None:
    """Download the files of torchvision's class `kind` to `root`.

    Raises UserError if the download fails, or if nothing arrives for DOWNLOAD_TIMEOUT seconds.
    """
    archive = Path(root, kind.filename)
    was_there = archive.exists()
    distributed.say(f"{name} is not in {root}: downloading about 170 MB to it")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets no timeout
    try:
        with no_empty_folders(root):
            try:
                kind(root, download=True)
            except BaseException:
                if not was_there:
                    archive.unlink(missing_ok=True)  # an incomplete archive
                raise
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} is not in {root} and cannot be downloaded ({reason}): put the folder {kind.base_folder} there, "
            "as torchvision unpacks it, give another folder with --data, or try --dataset digits"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def load_digits(root: str | os.PathLike | None, split: str, workers: int | None = None) -> Images:
    """Read the 1,797 handwritten digits that scikit-learn ships: grey, 8x8 pixels.

    1,437 digits are for training and 360 for testing. The division is stratified, and it is always
    the same.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    # We read scikit-learn's file ourselves, because importing scikit-learn takes seconds.
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")  # (1797, 65)
    pixels = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8)  # the file's values are 0 to 16
    grey = torch.from_numpy(pixels).view(-1, 1, 8, 8)
    images = grey.expand(-1, 3, -1, -1).contiguous()  # (N, 3, 8, 8)
    labels = torch.from_numpy(table[:, 64]).long()
    digits = Images(images, labels, [str(digit) for digit in range(10)], "digits")
    order = stratified_order(digits.labels, torch.Generator().manual_seed(0))
    return digits.subset(order[:1437] if split == "train" else order[1437:])


# ---- the registry


class BenchmarkSplit(NamedTuple):
    """How NAS-Bench-201 (Dong & Yang, 2020) divides a data set for a search."""

    # The keys of the two lists in the benchmark's split file. If training images are divided, the
    # first list trains and the second validates. If test images are divided, the first list
    # validates.
    keys: tuple[str, str]
    # Number of test images that validate if the split is seeded. None: the training images are
    # halved.
    validation_images: int | None = None


@dataclass(frozen=True)
class DataSet:
    """One choice of --dataset."""

    commands: tuple[str, ...]  # the commands that offer the data set
    # load(root, "train" or "test", workers) returns Images. None: the images are in
    # ROOT/FOLDER/CLASS/.
    load: Callable[[str, str, int | None], Images] | None = None
    # Without `load`: possible names of the folder of test images. The first one that exists is
    # used.
    test_folders: tuple[str, ...] = ("test", "val")
    folder: str = "../data"  # default of --data, as in the published commands
    recipe: str | None = "cifar"  # the recipe of train.py; None: "cifar" for small images, else "imagenet"
    normalisation: Normalisation | None = None  # None: measured on the training images
    nas201_normalisation: Normalisation | None = None  # NAS-Bench-201's, if it differs from `normalisation`
    pad: int = 4  # pixels added to each side before the random crop
    flip: bool = True  # flip a random half of the training images from left to right
    max_cutout: int = 1000  # largest side of the square that cutout erases, in pixels
    # Whether the DARTS search divides the training images in file order. Otherwise the order is
    # random and stratified.
    halves_in_file_order: bool = False
    nas201_split: BenchmarkSplit | None = None  # None: a search of NAS-Bench-201 halves the training images


def of_bytes(mean: tuple[float, ...], std: tuple[float, ...]) -> Normalisation:
    """Return the normalisation for a mean and std of pixels in [0, 255], which is how NAS-Bench-201 gives them."""
    return Normalisation(tuple(value / 255 for value in mean), tuple(value / 255 for value in std))


S1_SEARCH = "train_search.py"
S2_SEARCH = "python -m nas201.train_search"
TRAIN = "train.py"
IMAGENET_NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

DATASETS = {
    "cifar10": DataSet(
        commands=(S1_SEARCH, S2_SEARCH, TRAIN, "test_cifar.py"),
        load=functools.partial(load_cifar, "cifar10"),
        normalisation=Normalisation((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
        nas201_normalisation=of_bytes((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
        halves_in_file_order=True,
        nas201_split=BenchmarkSplit(("train", "valid")),
    ),
    "cifar100": DataSet(
        commands=(S1_SEARCH, S2_SEARCH, TRAIN, "test_cifar100.py"),
        load=functools.partial(load_cifar, "cifar100"),
        normalisation=Normalisation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        nas201_normalisation=of_bytes((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
        halves_in_file_order=True,
        nas201_split=BenchmarkSplit(("xvalid", "xtest"), validation_images=5000),
    ),
    "imagenet": DataSet(
        commands=(TRAIN, "test_imagenet.py"),
        test_folders=("val",),
        folder="../data/imagenet",
        recipe="imagenet",
        normalisation=IMAGENET_NORMALISATION,
    ),
    "ImageNet16-120": DataSet(
        commands=(S2_SEARCH, TRAIN, "test_imagenet.py"),
        load=imagenet16.load_imagenet16,
        folder="../data/ImageNet16",
        normalisation=of_bytes((122.68, 116.66, 104.01), (63.22, 61.26, 65.09)),
        pad=2,
        nas201_split=BenchmarkSplit(("xvalid", "xtest"), validation_images=3000),
    ),
    "folder": DataSet(
        commands=(S1_SEARCH, S2_SEARCH, TRAIN, "test_cifar.py", "test_cifar100.py", "test_imagenet.py"),
        recipe=None,
    ),
    "digits": DataSet(
        commands=(S1_SEARCH, S2_SEARCH, TRAIN, "test_cifar.py", "test_cifar100.py"),
        load=load_digits,
        pad=1,
        flip=False,
        max_cutout=4,
    ),
}


def find(name: str) -> DataSet:
    """Return the data set with this name. Raises UserError if there is none."""
    if not isinstance(name, str) or name not in DATASETS:
        raise UserError(f"unknown data set {name!r:.80}: give one of {', '.join(DATASETS)}")
    return DATASETS[name]


def offered_by(command: str) -> list[str]:
    """Return the names of the data sets that a command offers; the first is its default."""
    return [name for name, dataset in DATASETS.items() if command in dataset.commands]


def add_data_arguments(group: argparse._ArgumentGroup, command: str, *, folder: str | None = None) -> None:
    """Add the flags --dataset, --data and --image_cache to a command.

    `folder` is the default of --data. If it is None, the default depends on the data set: see
    `find_folder`.
    """
    names = offered_by(command)
    text = 'data set to use; "folder" is your own images, in DATA/train/CLASS/ and DATA/test/CLASS/'
    group.add_argument("--dataset", default=names[0], choices=names, help=text)
    text = "folder of the data set; CIFAR is downloaded to this folder if it is not there"
    if folder is None:
        others = [f"; {DATASETS[name].folder} for {name}" for name in names if DATASETS[name].folder != DataSet.folder]
        text += f" (default: {DataSet.folder}{''.join(others)})"
    group.add_argument("--data", default=folder, metavar="DIR", help=text)
    text = (
        f"if a folder has {image_folder.CACHED:,} images or more, cache the decoded images in {image_folder.CACHE} "
        "next to the class folders"
    )
    group.add_argument("--image_cache", action=argparse.BooleanOptionalAction, default=True, help=text)


def default_folder(command: str, name: str) -> str:
    """Return the default folder of a data set. Raises UserError if the command does not offer the data set."""
    if name not in offered_by(command):
        raise UserError(f"unknown data set {name!r:.80}: give one of {', '.join(offered_by(command))}")
    return DATASETS[name].folder


def find_folder(name: str, folder: str | None) -> str:
    """Return the folder of a data set: `folder`, or the data set's default folder if `folder` is None."""
    return folder or find(name).folder


def load_images(
    name: str,
    root: str | os.PathLike | None,
    split: str,
    *,
    image_size: int | None = None,
    workers: int | None = None,
    cache: bool = True,
) -> Split:
    """Read the split "train" or "test" of a data set into memory.

    With `image_size`, the images of a folder are resized and cropped to this many pixels a side.
    Without `image_size`, images that are large or of different sizes are not read: Files are
    returned. For `workers` and `cache` see `image_folder.read_images`. Raises UserError, which
    names the file that is missing or unreadable.
    """
    dataset = find(name)
    if dataset.load is None:
        files = list_files(name, root, split, image_size=image_size)
        return image_folder.read_images(files, resize=image_size is not None, workers=workers, cache=cache)
    if image_size:
        raise not_a_folder(name)
    return dataset.load(root, split, workers)


def list_files(name: str, root: str | os.PathLike, split: str, *, image_size: int | None = None) -> Files:
    """List the image files of the split "train" or "test" of a folder, which are then read batch by batch.

    The network sees images of `image_size` pixels a side (default: 224). Raises UserError for a
    data set that is not a folder of images.
    """
    dataset = find(name)
    if dataset.load is not None:
        raise not_a_folder(name)
    files = image_folder.list_files(root, ["train"] if split == "train" else dataset.test_folders)
    return replace(files, image_size=[image_size, image_size]) if image_size else files


def not_a_folder(name: str) -> UserError:
    """Return the error for --image_size or --recipe imagenet with a data set that is not a folder of images."""
    return UserError(
        f"--image_size and --recipe imagenet are for folders of images, not for {name}: leave them out, or give "
        "--dataset folder"
    )


def stays_on_disk(name: str, image_size: int | None, recipe: str | None) -> bool:
    """Return whether images are read batch by batch (`list_files`) rather than into memory (`load_images`).

    `recipe` decides. If it is None, the recipe of the data set decides. Your own images have no
    such recipe: they stay on disk if `image_size` is large.
    """
    recipe = recipe or find(name).recipe
    if recipe:
        return recipe == "imagenet"
    return image_size is not None and image_size > image_folder.SMALL


def augmentation(
    name: str, train: Split | None = None, about: dict | None = None, *, nas201: bool = False
) -> Augmentation:
    """Return how the images of a data set are normalised and augmented.

    With `nas201`, NAS-Bench-201's normalisation is used if the data set has one.

    A data set without a normalisation of its own uses the first of these that is possible:
    - the normalisation that was saved with a network, "mean" and "std" in `about`;
    - ImageNet's normalisation, if `train` are Files;
    - the mean and standard deviation of the images `train`.
    """
    dataset = find(name)
    normalisation = dataset.normalisation
    if nas201 and dataset.nas201_normalisation:
        normalisation = dataset.nas201_normalisation
    elif normalisation is None and about and about.get("mean") and about.get("std"):
        normalisation = Normalisation(tuple(map(float, about["mean"])), tuple(map(float, about["std"])))
    elif normalisation is None and isinstance(train, Files):
        normalisation = IMAGENET_NORMALISATION
    elif normalisation is None:
        normalisation = measure_normalisation(train.images)
    return Augmentation(*normalisation, dataset.pad, dataset.flip, dataset.max_cutout)


# ---- a search


class SearchData(NamedTuple):
    """The images of a search, and how they are augmented."""

    train: Images
    valid: Images
    augmentation: Augmentation


def search_splits(args: argparse.Namespace) -> SearchData:
    """Read and divide the training images for a search in the DARTS space (S1). Raises UserError.

    Uses these arguments: dataset, data, image_size, image_cache, train_portion, train_samples,
    valid_samples and the seed.
    """
    images = load_images(args.dataset, args.data, "train", image_size=args.image_size, cache=args.image_cache)
    image_folder.check_in_memory(images)
    generator = seeds.generator(args, seed_roles.SPLIT)
    in_file_order = find(args.dataset).halves_in_file_order
    train, valid = split_train(images, args.train_portion, in_file_order, generator)
    check_classes(training=train, validation=valid)
    train = subsample(train, args.train_samples, generator)
    valid = subsample(valid, args.valid_samples, generator)
    return SearchData(train, valid, augmentation(args.dataset, images))
