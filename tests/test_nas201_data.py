"""Which images a search on NAS-Bench-201 trains and validates on; the benchmark's split files."""

import dataclasses
import json
from argparse import Namespace

import pytest
import torch

import datasets
from datasets import DATASETS
from nas201.data import fixed_split, read_split, search_splits
from splits import Images
from support.files import UserError


def refused(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def search_args(**changed):
    args = {
        "dataset": "digits",
        "data": "",
        "seed": 18,
        "seed_scheme": 2,
        "train_samples": None,
        "valid_samples": None,
        "image_size": None,
        "image_cache": True,
        "split": None,
        "split_file": None,
        "workers": 2,
    }
    return Namespace(**{**args, **changed})


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark's data sets in their right sizes; the colour of an image is its number."""

    def loader(classes, train_images, test_images):
        def load(root, split, workers):
            count = train_images if split == "train" else test_images
            number = torch.arange(count)
            channels = torch.stack([number % 256, number // 256 % 256, number // 65536 * 2 + (split == "train")], 1)
            images = channels.to(torch.uint8).view(count, 3, 1, 1).expand(-1, -1, 4, 4)
            return Images(images, number % classes, [str(i) for i in range(classes)])

        return load

    sizes = {"cifar10": (10, 50_000, 10_000), "cifar100": (100, 50_000, 10_000), "ImageNet16-120": (120, 151_700, 6000)}
    for name, size in sizes.items():
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], load=loader(*size)))


TRAIN = 10**6  # is added to the numbers of training images


def numbers(split):
    """The image numbers of a split of the `benchmark` fixture, plus TRAIN for training images."""
    first, second, third = split.images[:, :, 0, 0].long().unbind(1)
    return set((first + 256 * second + 65536 * (third // 2) + TRAIN * (third % 2)).tolist())


# ---- seeded splits


def test_seeded_split_halves_the_training_images_of_cifar10(benchmark):
    train, valid, _ = search_splits(search_args(dataset="cifar10", split="seeded"))
    assert len(numbers(train)) == len(numbers(valid)) == 25_000
    assert not numbers(train) & numbers(valid)
    assert min(numbers(train) | numbers(valid)) == TRAIN  # no test image
    assert torch.bincount(valid.labels).tolist() == [2500] * 10


def test_seeded_split_follows_from_the_seed(benchmark):
    first, _, _ = search_splits(search_args(dataset="cifar10", split="seeded"))
    same, _, _ = search_splits(search_args(dataset="cifar10", split="seeded", seed=18))
    other, _, _ = search_splits(search_args(dataset="cifar10", split="seeded", seed=19))
    assert numbers(same) == numbers(first) != numbers(other)


@pytest.mark.parametrize(
    ("dataset", "train_images", "valid_images"), [("cifar100", 50_000, 5000), ("ImageNet16-120", 151_700, 3000)]
)
def test_seeded_split_validates_on_half_of_the_test_images(benchmark, dataset, train_images, valid_images):
    train, valid, _ = search_splits(search_args(dataset=dataset, split="seeded"))
    assert len(numbers(train)) == train_images
    assert len(numbers(valid)) == valid_images
    assert min(numbers(train)) == TRAIN > max(numbers(valid))


def test_samples_are_drawn_from_each_class(benchmark):
    args = search_args(dataset="cifar100", split="seeded", train_samples=300, valid_samples=200)
    train, valid, _ = search_splits(args)
    assert torch.bincount(train.labels).tolist() == [3] * 100
    assert torch.bincount(valid.labels).tolist() == [2] * 100


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "ImageNet16-120"])
def test_normalisation_is_the_benchmarks(benchmark, dataset):
    _, _, augmentation = search_splits(search_args(dataset=dataset, split="seeded"))
    assert augmentation == datasets.augmentation(dataset, nas201=True)
    first_mean = {"cifar10": 125.3, "cifar100": 129.3, "ImageNet16-120": 122.68}
    assert augmentation.mean[0] == first_mean[dataset] / 255
    assert augmentation.pad == (2 if dataset == "ImageNet16-120" else 4)


def test_digits_are_split_as_in_the_darts_search():
    ours = search_splits(search_args())
    theirs = datasets.search_splits(search_args(train_portion=0.5))
    assert ours.augmentation == theirs.augmentation
    for mine, other in ((ours.train, theirs.train), (ours.valid, theirs.valid)):
        assert torch.equal(mine.images, other.images)
        assert torch.equal(mine.labels, other.labels)


def test_folder_is_halved(make_images):
    train, valid, augmentation = search_splits(search_args(dataset="folder", data=make_images("train", 6, [(8, 8)])))
    assert torch.bincount(train.labels).tolist() == torch.bincount(valid.labels).tolist() == [3, 3, 3]
    assert augmentation.pad == 4
    assert 0 < augmentation.mean[0] < 1


def test_folder_with_sides_that_are_no_multiples_of_4_is_refused(make_images):
    folder = make_images("train", 2, [(10, 8)])
    assert "10x8" in refused(search_splits, search_args(dataset="folder", data=folder))


def test_folder_of_any_size_is_resized(make_images):
    folder = make_images("train", 4, [(41, 30), (33, 70)])
    train, valid, _ = search_splits(search_args(dataset="folder", data=folder, image_size=12))
    assert train.image_size == valid.image_size == [12, 12]
    assert len(train) == len(valid) == 6


# ---- the benchmark's own splits


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "ImageNet16-120"])
def test_split_is_the_benchmarks_own_unless_another_is_asked_for(benchmark, dataset):
    args = search_args(dataset=dataset)
    default = search_splits(args)
    fixed = search_splits(search_args(dataset=dataset, split="fixed", seed=19))
    assert args.split == "fixed"  # recorded in args.json
    assert numbers(default.train) == numbers(fixed.train)
    assert numbers(default.valid) == numbers(fixed.valid)


def test_fixed_split_of_cifar10_divides_the_training_images(benchmark):
    first, second = fixed_split("cifar10")
    train, valid, _ = search_splits(search_args(dataset="cifar10", split="fixed"))
    assert numbers(train) == {TRAIN + i for i in first.tolist()}
    assert numbers(valid) == {TRAIN + i for i in second.tolist()}


@pytest.mark.parametrize("dataset", ["cifar100", "ImageNet16-120"])
def test_fixed_split_of_the_others_chooses_test_images(benchmark, dataset):
    first, _ = fixed_split(dataset)
    train, valid, _ = search_splits(search_args(dataset=dataset, split="fixed"))
    assert min(numbers(train)) == TRAIN
    assert numbers(valid) == set(first.tolist())


def test_split_of_other_data_sets_is_seeded():
    args = search_args()
    search_splits(args)
    assert args.split == "seeded"


def test_fixed_split_of_other_data_sets_is_refused():
    assert {"--split", "digits"} <= set(refused(search_splits, search_args(split="fixed")).split())
    assert {"--split_file", "digits"} <= set(refused(search_splits, search_args(split_file="split.txt")).split())


def test_split_and_split_file_together_are_refused():
    args = search_args(dataset="cifar10", split="seeded", split_file="x.txt")
    assert {"--split_file", "--split"} <= set(refused(search_splits, args).split())


@pytest.mark.parametrize(
    ("dataset", "name", "count", "first_seven"),
    [
        ("cifar10", "nas201-cifar-split.txt", 50_000, [0, 5, 7, 11, 13, 15, 16]),
        ("cifar100", "nas201-cifar100-test-split.txt", 10_000, [1, 3, 4, 5, 8, 10, 13]),
        ("ImageNet16-120", "nas201-imagenet-16-120-test-split.txt", 6_000, [1, 2, 3, 6, 7, 8, 9]),
    ],
)
def test_fixed_splits_are_those_of_the_benchmarks_index_files(shared_data, dataset, name, count, first_seven):
    first, second = fixed_split(dataset)
    assert sorted(first.tolist() + second.tolist()) == list(range(count))
    assert len(first) == len(second)
    assert first[:7].tolist() == first_seven
    lists = read_split(shared_data(name), DATASETS[dataset].nas201_split.keys, count)
    assert [indices.tolist() for indices in lists] == [first.tolist(), second.tolist()]


# ---- split files


def write_split(path, **lists):
    path.write_text(json.dumps({name: ["int", [str(i) for i in indices]] for name, indices in lists.items()}))
    return path


def test_split_file_of_cifar10_divides_the_training_images(benchmark, tmp_path):
    path = write_split(tmp_path / "cifar.txt", train=[49_999, 3, 4], valid=[0, 7])
    train, valid, _ = search_splits(search_args(dataset="cifar10", split_file=path))
    assert numbers(train) == {TRAIN + 49_999, TRAIN + 3, TRAIN + 4}
    assert numbers(valid) == {TRAIN, TRAIN + 7}


def test_split_file_of_cifar100_chooses_test_images(benchmark, tmp_path):
    path = write_split(tmp_path / "cifar100.txt", xvalid=[9_999, 1], xtest=[2])
    train, valid, _ = search_splits(search_args(dataset="cifar100", split_file=path))
    assert len(train) == 50_000
    assert numbers(valid) == {9_999, 1}


def refused_split(path):
    """Return the line in which a split file for ten images is refused; it names the file."""
    message = refused(read_split, path, ("train", "valid"), 10)
    assert path.name in message
    return message


def test_missing_split_file_is_named(tmp_path):
    refused_split(tmp_path / "split.txt")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"train": ["int", ["1"]]}', '{"train": ["int", "1"], "valid": ["int", ["2"]]}']
)
def test_malformed_split_file_is_named(tmp_path, text):
    path = tmp_path / "split.txt"
    path.write_text(text)
    refused_split(path)


@pytest.mark.parametrize(
    ("train", "valid", "words"),
    [
        ([1, 2], [2, 3], " 2"),
        ([1, 2], [3, 10], " 10 "),
        ([1, 2, 1], [3], '"train"'),
        ([1], [], '"valid"'),
        ([-1], [2], "'-1'"),
        (["x"], [2], "'x'"),
        (["1.0"], [2], "'1.0'"),
        (["²"], [2], "'²'"),
        (["9" * 5000], [2], "'99999"),
    ],
)
def test_bad_index_in_a_split_file_is_refused(tmp_path, train, valid, words):
    assert words in refused_split(write_split(tmp_path / "split.txt", train=train, valid=valid))


def test_index_that_is_no_number_is_refused(tmp_path):
    path = tmp_path / "split.txt"
    path.write_text('{"train": ["int", [true, null]], "valid": ["int", [1]]}')
    assert "'True'" in refused_split(path)
