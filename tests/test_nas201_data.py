"""Data of the NAS-Bench-201 searches: ImageNet16-120's files and cache, splits and the benchmark's index files."""

import hashlib
import json
import os
import pickle
import struct
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import data as root_data
from nas201 import data, imagenet16
from support.files import UserError

BATCH = 60  # images in a synthetic batch
SIZES = {"train": 10 * BATCH // 2, "test": BATCH // 2}  # every second label is kept


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is what the real files hold."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def batch_content(seed):
    random = np.random.RandomState(seed)
    labels = [int(random.randint(1, 121) if i % 2 else random.randint(121, 1001)) for i in range(BATCH)]
    return {"data": random.randint(0, 256, (BATCH, 768)).astype(np.uint8), "labels": labels, "mean": np.zeros(768)}


@pytest.fixture
def folder16(tmp_path, monkeypatch):
    """A folder with eleven small files, their sizes and MD5 known to the loader; `put(name, content)` replaces one."""
    monkeypatch.setattr(imagenet16, "SIZES", SIZES)
    monkeypatch.setattr(imagenet16, "MD5", dict(imagenet16.MD5))
    folder = tmp_path / "ImageNet16"
    folder.mkdir()

    def put(name, content, python2=True):
        with open(folder / name, "wb") as file:
            (Python2Pickler if python2 else pickle.Pickler)(file, 2).dump(content)
        imagenet16.MD5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    for seed, name in enumerate(imagenet16.MD5):
        put(name, batch_content(seed))
    folder_and_put = Namespace(path=folder, put=put)
    return folder_and_put


def refused(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def args(**other):
    defaults = {
        "dataset": "digits",
        "data": "",
        "seed": 18,
        "seed_scheme": 2,
        "train_samples": None,
        "valid_samples": None,
    }
    defaults |= {"image_size": None, "image_cache": True}
    return Namespace(**{**defaults, "split": None, "split_file": None, "workers": 2, **other})


# ImageNet16-120


def test_imagenet16_keeps_the_first_120_classes_in_file_order(folder16):
    splits = imagenet16.load_imagenet16(folder16.path, workers=2)
    for split, seeds in (("train", range(10)), ("test", [10])):
        contents = [batch_content(seed) for seed in seeds]
        labels = np.concatenate([c["labels"] for c in contents])
        pixels = np.concatenate([c["data"] for c in contents])
        images = splits[split]
        assert images.images.shape == (SIZES[split], 3, 16, 16) and images.images.dtype == torch.uint8
        assert images.labels.tolist() == (labels[labels <= 120] - 1).tolist()
        assert np.array_equal(images.images.numpy().reshape(-1, 768), pixels[labels <= 120])
        assert images.classes == [str(i) for i in range(1, 121)]


def test_the_cache_stands_for_the_files_until_one_changes(folder16, monkeypatch):
    first = imagenet16.load_imagenet16(folder16.path)
    assert (folder16.path / imagenet16.CACHE).exists()
    read, real = [], imagenet16._read_batch
    monkeypatch.setattr(imagenet16, "_read_batch", lambda root, name: read.append(name) or real(root, name))
    again = imagenet16.load_imagenet16(folder16.path)
    assert not read
    for split in SIZES:
        assert torch.equal(first[split].images, again[split].images)
        assert torch.equal(first[split].labels, again[split].labels)
    folder16.put("val_data", batch_content(99))  # same size, another time
    changed = imagenet16.load_imagenet16(folder16.path)
    assert len(read) == 11 and not torch.equal(first["test"].images, changed["test"].images)
    cache = folder16.path / imagenet16.CACHE
    whole = cache.read_bytes()
    for damaged in (b"", whole[:1000], whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]):
        read.clear()
        cache.write_bytes(damaged)
        assert torch.equal(imagenet16.load_imagenet16(folder16.path)["test"].images, changed["test"].images)
        assert len(read) == 11


def test_no_cache_where_it_cannot_be_written(folder16):
    (folder16.path / imagenet16.CACHE).mkdir()  # also root, whom a read-only folder does not stop, fails to write this
    assert len(imagenet16.load_imagenet16(folder16.path)["train"]) == SIZES["train"]
    assert len(imagenet16.load_imagenet16(folder16.path)["test"]) == SIZES["test"]
    assert not list(folder16.path.glob("*.tmp*"))


def test_published_sizes_and_checksums():
    assert imagenet16.SIZES == {"train": 151_700, "test": 6_000} and len(imagenet16.MD5) == 11
    assert all(len(md5) == 32 for md5 in imagenet16.MD5.values())


def test_bad_imagenet16_files(folder16, tmp_path):
    path, put = folder16.path, folder16.put
    load = imagenet16.load_imagenet16
    good = batch_content(0)
    for label in (0, 1001, -5, True, "7", 10**30):
        put("train_data_batch_3", {**good, "labels": [label, *good["labels"][1:]]})
        message = refused(load, path)
        assert "train_data_batch_3" in message and "1..1000" in message
    for broken in (
        {"labels": good["labels"]},
        {**good, "data": good["data"].astype(np.float64)},
        {**good, "data": good["data"][:, :767]},
        {**good, "labels": good["labels"][1:]},
        {**good, "labels": None},
        [good],
    ):
        put("train_data_batch_3", broken)
        assert "train_data_batch_3" in refused(load, path)
    put("train_data_batch_3", {**good, "labels": [1] * BATCH})
    assert "instead of 300" in refused(load, path)
    put("train_data_batch_3", {**good, "more": Evil(tmp_path / "evil")}, python2=False)
    assert "refused" in refused(load, path) and not (tmp_path / "evil").exists()
    put("train_data_batch_3", {**good, "data": np.array([Evil(tmp_path / "evil")])}, python2=False)
    assert "train_data_batch_3" in refused(load, path) and not (tmp_path / "evil").exists()
    put("train_data_batch_3", good)
    content = (path / "val_data").read_bytes()
    (path / "val_data").write_bytes(content[:-1])
    message = refused(load, path)
    assert "val_data" in message and "MD5" in message and imagenet16.MD5["val_data"] in message
    imagenet16.MD5["val_data"] = hashlib.md5(content[:-1]).hexdigest()
    assert "val_data" in refused(load, path)  # truncated
    (path / "val_data").unlink()
    assert "val_data" in refused(load, path)
    assert "nowhere" in refused(load, tmp_path / "nowhere")
    assert not (path / imagenet16.CACHE).exists()


def test_an_array_cannot_claim_memory_it_does_not_bring(folder16):
    class Claim:
        def __reduce__(self):
            dtype, reconstruct = np.dtype("u1"), np.empty(0).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, (1 << 40, 768), dtype, False, b"xy")

    folder16.put("train_data_batch_1", {**batch_content(0), "data": Claim()})
    assert "train_data_batch_1" in refused(imagenet16.load_imagenet16, folder16.path)


def test_imagenet16_splits(folder16, monkeypatch):
    monkeypatch.setitem(data.VALIDATION, "ImageNet16-120", 12)
    train, valid, augment = data.search_splits(args(dataset="ImageNet16-120", data=folder16.path, split="seeded"))
    assert (len(train), len(valid), augment.pad, augment.flip) == (300, 12, 2, True)
    assert augment.mean[0] == 122.68 / 255 and augment.std[2] == 65.09 / 255


# Splits


@pytest.fixture
def cifar(monkeypatch):
    """CIFAR-10 and -100 of the right sizes, one-colour images that hold their own number in three channels."""

    def load(dataset, root, split):
        count = 50_000 if split == "train" else 10_000
        number = torch.arange(count)
        channels = torch.stack([number % 256, number // 256, number * 0 + (split == "train")], 1).to(torch.uint8)
        images = channels.view(count, 3, 1, 1).expand(-1, -1, 4, 4)
        classes = 10 if dataset == "cifar10" else 100
        return root_data.Images(images, number % classes, [str(i) for i in range(classes)])

    monkeypatch.setattr(root_data, "load_cifar", load)


def numbers(split):
    """The set of (image number, from the training images) of a split of the `cifar` fixture."""
    pixels = split.images[:, :, 0, 0].long()
    return set((pixels[:, 0] + 256 * pixels[:, 1] + 100_000 * pixels[:, 2]).tolist())


def test_a_seeded_split_halves_cifar10s_training_images(cifar):
    train, valid, augment = data.search_splits(args(dataset="cifar10", split="seeded"))
    assert len(numbers(train)) == len(numbers(valid)) == 25_000 and not numbers(train) & numbers(valid)
    assert min(numbers(train) | numbers(valid)) == 100_000  # no test image
    assert torch.bincount(valid.labels).tolist() == [2500] * 10
    assert augment.mean == (125.3 / 255, 123.0 / 255, 113.9 / 255) and augment.pad == 4
    same, other = (data.search_splits(args(dataset="cifar10", seed=seed, split="seeded"))[0] for seed in (18, 19))
    assert numbers(same) == numbers(train) != numbers(other)


def test_cifar100_validates_on_half_of_the_test_images(cifar):
    train, valid, _ = data.search_splits(args(dataset="cifar100", split="seeded"))
    assert len(numbers(train)) == 50_000 and len(numbers(valid)) == 5_000
    assert min(numbers(train)) == 100_000 > max(numbers(valid))
    train, valid, _ = data.search_splits(args(dataset="cifar100", split="seeded", train_samples=300, valid_samples=200))
    assert torch.bincount(train.labels).tolist() == [3] * 100 and torch.bincount(valid.labels).tolist() == [2] * 100


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_the_split_is_the_benchmarks_own_unless_another_is_asked_for(cifar, dataset):
    chosen = args(dataset=dataset)
    splits, again = data.search_splits(chosen), data.search_splits(args(dataset=dataset, split="fixed", seed=19))
    assert chosen.split == "fixed"  # so args.json says it
    first, second = data.fixed_split(dataset)
    assert numbers(splits[0]) == numbers(again[0]) and numbers(splits[1]) == numbers(again[1])
    if dataset == "cifar10":
        assert numbers(splits[0]) == {100_000 + i for i in first.tolist()}
        assert numbers(splits[1]) == {100_000 + i for i in second.tolist()}
    else:
        assert len(numbers(splits[0])) == 50_000 and numbers(splits[1]) == set(first.tolist())


def test_only_the_benchmarks_data_sets_have_a_fixed_split(tmp_path):
    chosen = args()
    data.search_splits(chosen)
    assert chosen.split == "seeded"
    assert "not for digits" in refused(data.search_splits, args(split="fixed"))
    assert "leave one out" in refused(data.search_splits, args(dataset="cifar10", split="seeded", split_file="x.txt"))


def test_digits_are_split_as_in_the_darts_space():
    ours = data.search_splits(args())
    theirs = root_data.search_splits(args(train_portion=0.5))
    assert ours[2] == theirs[2]
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_folder(make_images):
    train, valid, augment = data.search_splits(args(dataset="folder", data=make_images("train", 6, [(8, 8)])))
    assert torch.bincount(train.labels).tolist() == torch.bincount(valid.labels).tolist() == [3, 3, 3]
    assert augment.pad == 4 and 0 < augment.mean[0] < 1


def test_folder_of_odd_sizes(make_images):
    folder = make_images("train", 2, [(10, 8)])
    assert "10x8" in refused(data.search_splits, args(dataset="folder", data=folder))


def test_folder_of_any_size(make_images):
    folder = make_images("train", 4, [(41, 30), (33, 70)])
    train, valid, _ = data.search_splits(args(dataset="folder", data=folder, image_size=12))
    assert train.image_size == valid.image_size == [12, 12] and len(train) == len(valid) == 6


def write_split(path, **lists):
    path.write_text(json.dumps({name: ["int", [str(i) for i in indices]] for name, indices in lists.items()}))
    return path


def test_split_files(cifar, tmp_path):
    path = write_split(tmp_path / "cifar.txt", train=[49_999, 3, 4], valid=[0, 7])
    train, valid, _ = data.search_splits(args(dataset="cifar10", split_file=path))
    assert numbers(train) == {149_999, 100_003, 100_004} and numbers(valid) == {100_000, 100_007}
    path = write_split(tmp_path / "cifar100.txt", xvalid=[9_999, 1], xtest=[2])
    train, valid, _ = data.search_splits(args(dataset="cifar100", split_file=path))
    assert len(train) == 50_000 and numbers(valid) == {9_999, 1}


@pytest.mark.parametrize(
    ("dataset", "name", "count", "first_seven"),
    [
        ("cifar10", "nas201-cifar-split.txt", 50_000, [0, 5, 7, 11, 13, 15, 16]),
        ("cifar100", "nas201-cifar100-test-split.txt", 10_000, [1, 3, 4, 5, 8, 10, 13]),
        ("ImageNet16-120", "nas201-imagenet-16-120-test-split.txt", 6_000, [1, 2, 3, 6, 7, 8, 9]),
    ],
)
def test_the_fixed_splits_are_those_of_the_benchmarks_index_files(shared_data, dataset, name, count, first_seven):
    first, second = data.fixed_split(dataset)
    assert sorted(first.tolist() + second.tolist()) == list(range(count)) and len(first) == len(second)
    assert first[:7].tolist() == first_seven
    lists = data.read_split(shared_data(name), data.SPLIT_KEYS[dataset], count)
    assert [a.tolist() for a in lists] == [first.tolist(), second.tolist()]


def test_bad_split_files(tmp_path):
    path = tmp_path / "split.txt"
    read = lambda count=10: data.read_split(path, ("train", "valid"), count)  # noqa: E731
    assert "split.txt" in refused(read)  # missing
    for text in ("", "{", "[]", "3", '{"train": ["int", ["1"]]}', '{"train": ["int", "1"], "valid": ["int", ["2"]]}'):
        path.write_text(text)
        assert "split.txt" in refused(read)
    for train, valid, words in (
        ([1, 2], [2, 3], "overlap, both have index 2"),
        ([1, 2], [3, 10], "index 10 runs past the 10 images"),
        ([1, 2, 1], [3], "twice"),
        ([1], [], "no index"),
        ([-1], [2], "'-1' is not an index"),
        (["x"], [2], "'x' is not an index"),
        (["1.0"], [2], "is not an index"),
        (["²"], [2], "is not an index"),
        (["9" * 5000], [2], "is not an index"),
    ):
        write_split(path, train=train, valid=valid)
        assert words in refused(read)
    path.write_text('{"train": ["int", [true, null]], "valid": ["int", [1]]}')
    assert "is not an index" in refused(read)
    assert "--split_file and --split fixed are for" in refused(data.search_splits, args(split_file=Path("split.txt")))
