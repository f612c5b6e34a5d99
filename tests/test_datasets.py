"""Data sets: the registry, CIFAR, digits and folders, and how a DARTS search divides them."""

import re
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

import datasets
from augment import Augmentation
from datasets import DATASETS
from splits import Files, Images
from support.files import UserError


def search_args(**changed):
    args = {
        "data": ".",
        "seed": 18,
        "seed_scheme": 2,
        "image_size": None,
        "image_cache": True,
        "train_portion": 0.5,
        "train_samples": None,
        "valid_samples": None,
    }
    return Namespace(**{**args, **changed})


# ---- the registry


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train_search.py", ["cifar10", "cifar100", "folder", "digits"]),
        ("python -m nas201.train_search", ["cifar10", "cifar100", "ImageNet16-120", "folder", "digits"]),
        ("train.py", ["cifar10", "cifar100", "imagenet", "ImageNet16-120", "folder", "digits"]),
        ("test_cifar.py", ["cifar10", "folder", "digits"]),
        ("test_cifar100.py", ["cifar100", "folder", "digits"]),
        ("test_imagenet.py", ["imagenet", "ImageNet16-120", "folder"]),
    ],
)
def test_offered_by_is_what_each_command_has_always_offered(command, expected):
    assert datasets.offered_by(command) == expected


def test_new_data_set_needs_one_entry(monkeypatch):
    grey = Images(torch.full((8, 3, 8, 8), 128, dtype=torch.uint8), torch.arange(8) % 2, ["a", "b"], "grey")
    entry = datasets.DataSet(commands=("train_search.py",), load=lambda root, split, workers: grey)
    monkeypatch.setitem(DATASETS, "grey", entry)
    assert "grey" in datasets.offered_by("train_search.py")
    train, valid, augmentation = datasets.search_splits(search_args(dataset="grey"))
    assert torch.bincount(train.labels).tolist() == torch.bincount(valid.labels).tolist() == [2, 2]
    assert augmentation.mean == pytest.approx([128 / 255] * 3)


def test_published_commands_find_each_data_set():
    folders = {name: datasets.find_folder(name, None) for name in DATASETS}
    assert folders.pop("imagenet") == "../data/imagenet"
    assert folders.pop("ImageNet16-120") == "../data/ImageNet16"
    assert set(folders.values()) == {"../data"}
    assert datasets.find_folder("imagenet", "elsewhere") == "elsewhere"


@pytest.mark.parametrize("name", ["cifar", None, ["cifar10"]])
def test_unknown_data_set_is_refused(name):
    with pytest.raises(UserError, match=re.escape(repr(name))):
        datasets.load_images(name, ".", "train")


@pytest.mark.parametrize("name", ["digits", "cifar10", "ImageNet16-120"])
def test_image_size_is_refused_except_for_folders(name):
    with pytest.raises(UserError, match=f"--image_size.* {name}"):
        datasets.load_images(name, None, "train", image_size=32)
    with pytest.raises(UserError, match=name):
        datasets.list_files(name, None, "train")


@pytest.mark.parametrize(
    ("name", "image_size", "recipe", "expected"),
    [
        ("folder", None, None, False),  # the sizes of the files decide
        ("folder", 64, None, False),
        ("folder", 96, None, True),
        ("folder", 96, "cifar", False),
        ("folder", 32, "imagenet", True),
        ("imagenet", None, None, True),
        ("imagenet", 32, None, True),
        ("imagenet", 32, "nas201", False),
        ("digits", None, None, False),
    ],
)
def test_stays_on_disk_follows_from_recipe_data_set_and_size(name, image_size, recipe, expected):
    assert datasets.stays_on_disk(name, image_size, recipe) == expected


# ---- normalisation and augmentation


def test_augmentation_of_cifar_is_the_papers():
    mean = (0.49139968, 0.48215827, 0.44653124)
    std = (0.24703233, 0.24348505, 0.26158768)
    assert datasets.augmentation("cifar10") == Augmentation(mean, std, pad=4, flip=True)
    of_cifar100 = datasets.augmentation("cifar100")
    assert of_cifar100.mean == (0.5071, 0.4867, 0.4408)
    assert of_cifar100.std == (0.2675, 0.2565, 0.2761)


def test_augmentation_of_the_benchmark_has_its_own_normalisation():
    assert datasets.augmentation("cifar10", nas201=True).mean == (125.3 / 255, 123.0 / 255, 113.9 / 255)
    assert datasets.augmentation("ImageNet16-120", nas201=True) == datasets.augmentation("ImageNet16-120")
    assert datasets.augmentation("ImageNet16-120").pad == 2
    assert datasets.augmentation("imagenet", nas201=True) == datasets.augmentation("imagenet")


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_augmentation_is_measured_on_the_training_images(name):
    pixels = torch.randint(256, (20, 3, 8, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = datasets.augmentation(name, Images(pixels, torch.zeros(20), ["one"]))
    values = pixels.double().numpy() / 255
    assert found.mean == pytest.approx(values.mean((0, 2, 3)), abs=1e-9)
    assert found.std == pytest.approx(values.std((0, 2, 3)), abs=1e-9)
    special = (1, False, 4) if name == "digits" else (4, True, 1000)
    assert (found.pad, found.flip, found.max_cutout) == special


def test_augmentation_saved_with_a_network_is_used_again():
    about = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    assert datasets.augmentation("folder", None, about) == Augmentation((0.1, 0.2, 0.3), (1, 2, 3))


def test_augmentation_of_files_is_imagenets():
    files = Files([], torch.zeros(0), ["one"])
    assert datasets.augmentation("folder", files) == datasets.augmentation("imagenet")


# ---- CIFAR


@pytest.fixture
def cifar(monkeypatch):
    """Sixty images that torchvision seems to read, of three classes."""
    pixels = np.random.RandomState(0).randint(0, 256, (60, 32, 32, 3)).astype(np.uint8)
    source = SimpleNamespace(data=pixels, targets=[i % 3 for i in range(60)], classes=["a", "b", "c"])
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(torchvision.datasets, name, lambda root, train, download: source)
    return source


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_halved_in_file_order(cifar, name):
    train, valid, _ = datasets.search_splits(search_args(dataset=name))
    expected = torch.from_numpy(cifar.data.transpose(0, 3, 1, 2))
    assert torch.equal(train.images, expected[:30])
    assert torch.equal(valid.images, expected[30:])
    assert train.labels.tolist() == cifar.targets[:30]
    assert (train.classes, train.source) == (["a", "b", "c"], name)


def test_samples_are_drawn_from_the_halves(cifar):
    train, valid, _ = datasets.search_splits(search_args(dataset="cifar10", train_samples=12, valid_samples=6))
    assert torch.bincount(train.labels).tolist() == [4, 4, 4]
    assert torch.bincount(valid.labels).tolist() == [2, 2, 2]
    number_of = {image.tobytes(): i for i, image in enumerate(cifar.data.transpose(0, 3, 1, 2))}
    assert max(number_of[image.numpy().tobytes()] for image in train.images) < 30
    assert min(number_of[image.numpy().tobytes()] for image in valid.images) >= 30


# ---- digits


def test_digits_are_grey_images_of_ten_classes():
    train = datasets.load_images("digits", None, "train")
    assert train.images.shape == (1437, 3, 8, 8)
    assert train.classes == [str(i) for i in range(10)]
    assert (train.images == train.images[:, :1]).all()
    assert (train.images.min(), train.images.max()) == (0, 255)


def test_digits_are_divided_always_the_same():
    train = datasets.load_images("digits", None, "train")
    test = datasets.load_images("digits", None, "test")
    assert (len(train), len(test)) == (1437, 360)
    counts = torch.bincount(train.labels) + torch.bincount(test.labels)
    assert (torch.bincount(test.labels) - counts * (360 / 1797)).abs().max() <= 1
    in_train = {image.numpy().tobytes() for image in train.images}
    assert not in_train & {image.numpy().tobytes() for image in test.images}
    assert test.labels[:12].tolist() == [5, 3, 0, 7, 8, 9, 6, 4, 5, 1, 2, 3]


def test_digits_in_a_search_are_stratified():
    train, valid, _ = datasets.search_splits(search_args(dataset="digits"))
    assert (len(train), len(valid)) == (718, 719)
    assert (torch.bincount(train.labels) - torch.bincount(valid.labels)).abs().max() <= 1


# ---- folders of images


def test_imagenet_is_listed_and_tested_on_val(make_images):
    root = make_images("val", 2, [(32, 32)])
    make_images("test", 1, [(32, 32)])
    files = datasets.list_files("imagenet", root, "test")
    assert isinstance(files, Files)
    assert len(files) == 6


def test_folder_is_tested_on_test_or_else_val(make_images):
    root = make_images("val", 2, [(32, 16)])
    assert len(datasets.load_images("folder", root, "test")) == 6
    make_images("test", 1, [(32, 16)])
    assert len(datasets.load_images("folder", root, "test")) == 3


def test_class_too_small_for_both_halves_is_refused(make_images):
    root = make_images("train", 4, [(8, 8)])
    for i in range(1, 4):
        (root / f"train/bee/{i}.jpg").unlink()
    with pytest.raises(UserError, match="class bee "):
        datasets.search_splits(search_args(dataset="folder", data=root))
