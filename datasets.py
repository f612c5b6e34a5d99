"""The data sets that --dataset names: one entry of DATASETS each, with everything that is known about it.

To add a data set, write a function that loads it, or use folders of images, and add an entry. The
choices of --dataset in every command follow from the entries.
"""

import argparse
import functools
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

DOWNLOAD_TIMEOUT = 30  # seconds without an answer


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

    Raises UserError if that fails, or if nothing arrives for DOWNLOAD_TIMEOUT seconds.
    """
    archive = Path(root, kind.filename)
    was_there = archive.exists()
    distributed.say(f"{name} is not in {root}: downloading about 170 MB to it")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none
    try:
        with no_empty_folders(root):
            try:
                kind(root, download=True)
            except BaseException:
                if not was_there:
                    archive.unlink(missing_ok=True)  # it is incomplete
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

    They are divided into 1,437 for training and 360 for testing, stratified and always the same.
    """
    from sklearn.datasets import load_digits as load_sklearn

    bunch = load_sklearn()
    grey = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))  # its values are 0 to 16
    images = grey.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()  # (N, 3, 8, 8)
    classes = [str(name) for name in bunch.target_names]
    digits = Images(images, torch.from_numpy(bunch.target).long(), classes, "digits")
    order = stratified_order(digits.labels, torch.Generator().manual_seed(0))
    return digits.subset(order[:1437] if split == "train" else order[1437:])


# ---- the registry


class BenchmarkSplit(NamedTuple):
    """How NAS-Bench-201 (Dong & Yang, 2020) divides a data set for a search."""

    keys: tuple[str, str]  # the two lists of its split file: images that train (or validate), and the others
    # With a seeded split, so many of the test images validate; None halves the training images.
    validation_images: int | None = None


@dataclass(frozen=True)
class DataSet:
    """One choice of --dataset."""

    commands: tuple[str, ...]  # the commands that offer it
    # load(root, "train" or "test", workers) returns Images; None: folders of images, ROOT/FOLDER/CLASS/.
    load: Callable[[str, str, int | None], Images] | None = None
    test_folders: tuple[str, ...] = ("test", "val")  # of folders of images; the first that exists is tested on
    folder: str = "../data"  # where it is if --data is not given, as in the published commands
    recipe: str | None = "cifar"  # the recipe of train.py; None: "cifar" for small images, else "imagenet"
    normalisation: Normalisation | None = None  # None: measured on the training images
    nas201_normalisation: Normalisation | None = None  # that of the benchmark, if it is not `normalisation`
    pad: int = 4  # pixels added to each side before the random crop
    flip: bool = True  # left to right, half of the training images
    max_cutout: int = 1000  # largest side of the square that cutout erases, in pixels
    halves_in_file_order: bool = False  # how the DARTS search divides the training images; else stratified
    nas201_split: BenchmarkSplit | None = None  # None: as in the DARTS search, in halves


def of_bytes(mean: tuple[float, ...], std: tuple[float, ...]) -> Normalisation:
    """Return a normalisation that is given for pixels in [0, 255], as the benchmark's are."""
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
    """Add --dataset, --data and --image_cache of a command.

    `folder` is the default of --data; with None it depends on the data set: see `find_folder`.
    """
    names = offered_by(command)
    text = 'data set to use; "folder" is your own images, in DATA/train/CLASS/ and DATA/test/CLASS/'
    group.add_argument("--dataset", default=names[0], choices=names, help=text)
    text = "folder of the data set; CIFAR is downloaded to it if it is missing"
    if folder is None:
        others = [f"; {DATASETS[name].folder} for {name}" for name in names if DATASETS[name].folder != DataSet.folder]
        text += f" (default: {DataSet.folder}{''.join(others)})"
    group.add_argument("--data", default=folder, metavar="DIR", help=text)
    text = (
        f"cache the decoded images of a folder in {image_folder.CACHE} next to the class folders, if there are "
        f"{image_folder.CACHED:,} or more"
    )
    group.add_argument("--image_cache", action=argparse.BooleanOptionalAction, default=True, help=text)


def default_folder(command: str, name: str) -> str:
    """Return where a data set is by default. Raises UserError if the command does not offer it."""
    if name not in offered_by(command):
        raise UserError(f"unknown data set {name!r:.80}: give one of {', '.join(offered_by(command))}")
    return DATASETS[name].folder


def find_folder(name: str, folder: str | None) -> str:
    """Return the folder of a data set: `folder`, or its own default if that is None."""
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

    Folders of images: `image_size` resizes and crops to so many pixels a side. Without it, images
    that are large or of different sizes stay Files. `workers` and `cache`: see
    `image_folder.read_images`. Raises UserError naming what is missing or unreadable.
    """
    dataset = find(name)
    if dataset.load is None:
        files = list_files(name, root, split, image_size=image_size)
        return image_folder.read_images(files, resize=image_size is not None, workers=workers, cache=cache)
    if image_size:
        raise not_a_folder(name)
    return dataset.load(root, split, workers)


def list_files(name: str, root: str | os.PathLike, split: str, *, image_size: int | None = None) -> Files:
    """List the split "train" or "test" of folders of images, to be read batch by batch.

    A network sees images of `image_size` pixels a side (default: 224). Raises UserError.
    """
    dataset = find(name)
    if dataset.load is not None:
        raise not_a_folder(name)
    files = image_folder.list_files(root, ["train"] if split == "train" else dataset.test_folders)
    return replace(files, image_size=[image_size, image_size]) if image_size else files


def not_a_folder(name: str) -> UserError:
    """Return the error of a data set of one small size that is to be resized, or read file by file."""
    return UserError(
        f"--image_size and --recipe imagenet are for folders of images, not for {name}: leave them out, or give "
        "--dataset folder"
    )


def stays_on_disk(name: str, image_size: int | None, recipe: str | None) -> bool:
    """Return whether images are read batch by batch (`list_files`) rather than into memory (`load_images`).

    The recipe decides. Without one (None) the data set does, or for your own images their size.
    """
    recipe = recipe or find(name).recipe
    if recipe:
        return recipe == "imagenet"
    return image_size is not None and image_size > image_folder.SMALL


def augmentation(
    name: str, train: Split | None = None, about: dict | None = None, *, nas201: bool = False
) -> Augmentation:
    """Return how the images of a data set are normalised and augmented.

    `nas201`: as NAS-Bench-201 does. A data set without a normalisation of its own takes the one
    that was saved with a network ("mean" and "std" in `about`), else ImageNet's for Files, else
    that of the images `train`.
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
    """What a search works on."""

    train: Images
    valid: Images
    augmentation: Augmentation


def search_splits(args: argparse.Namespace) -> SearchData:
    """Read and divide the training images for a search of the DARTS space. Raises UserError.

    `args`: dataset, data, image_size, image_cache, train_portion, train_samples, valid_samples and
    the seed.
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
