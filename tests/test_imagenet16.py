"""ImageNet16-120: its files, their checks, the cache."""

import hashlib
import os
import pickle
import struct
from argparse import Namespace

import numpy as np
import pytest
import torch

import imagenet16
from imagenet16 import load_imagenet16
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


def batch_content(seed):
    random = np.random.RandomState(seed)
    labels = [int(random.randint(1, 121) if i % 2 else random.randint(121, 1001)) for i in range(BATCH)]
    return {"data": random.randint(0, 256, (BATCH, 768)).astype(np.uint8), "labels": labels, "mean": np.zeros(768)}


GOOD = batch_content(0)


@pytest.fixture
def folder16(tmp_path, monkeypatch):
    """A folder with eleven small files, whose sizes and MD5 the loader knows.

    `put(name, content)` replaces one.
    """
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
    return Namespace(path=folder, put=put)


def refused(folder):
    """Return the line in which the folder is refused; no cache may be left behind."""
    with pytest.raises(UserError) as caught:
        load_imagenet16(folder, "train")
    assert "\n" not in str(caught.value)
    assert not (folder / imagenet16.CACHE).exists()
    return str(caught.value)


@pytest.mark.parametrize("split, seeds", [("train", range(10)), ("test", [10])])
def test_first_120_classes_are_kept_in_file_order(folder16, split, seeds):
    contents = [batch_content(seed) for seed in seeds]
    labels = np.concatenate([content["labels"] for content in contents])
    pixels = np.concatenate([content["data"] for content in contents])
    images = load_imagenet16(folder16.path, split, workers=2)
    assert images.images.shape == (SIZES[split], 3, 16, 16)
    assert images.images.dtype == torch.uint8
    assert images.labels.tolist() == (labels[labels <= 120] - 1).tolist()
    assert np.array_equal(images.images.numpy().reshape(-1, 768), pixels[labels <= 120])
    assert images.classes == [str(i) for i in range(1, 121)]
    assert images.source == "ImageNet16-120"


def test_sizes_and_checksums_are_the_published_ones():
    assert imagenet16.SIZES == {"train": 151_700, "test": 6_000}
    assert len(imagenet16.MD5) == 11
    assert imagenet16.MD5["val_data"] == "3410e3017fdaefba8d5073aaa65e4bd6"
    assert {len(md5) for md5 in imagenet16.MD5.values()} == {32}


# ---- the cache


@pytest.fixture
def read_files(monkeypatch):
    """The names of the files that are read rather than taken from the cache."""
    names = []
    read_batch = imagenet16.read_batch
    monkeypatch.setattr(imagenet16, "read_batch", lambda root, name: names.append(name) or read_batch(root, name))
    return names


def test_cache_stands_for_unchanged_files(folder16, read_files):
    first = load_imagenet16(folder16.path, "train")
    assert (folder16.path / imagenet16.CACHE).exists()
    read_files.clear()
    again = load_imagenet16(folder16.path, "train")
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not read_files


def test_cache_of_changed_files_is_ignored(folder16, read_files):
    first = load_imagenet16(folder16.path, "test")
    read_files.clear()
    folder16.put("val_data", batch_content(99))  # same size, another time
    changed = load_imagenet16(folder16.path, "test")
    assert len(read_files) == 11
    assert not torch.equal(first.images, changed.images)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:1000],
        lambda whole: whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
    ],
)
def test_damaged_cache_is_ignored(folder16, read_files, damage):
    first = load_imagenet16(folder16.path, "test")
    cache = folder16.path / imagenet16.CACHE
    cache.write_bytes(damage(cache.read_bytes()))
    read_files.clear()
    assert torch.equal(load_imagenet16(folder16.path, "test").images, first.images)
    assert len(read_files) == 11


def test_cache_that_cannot_be_written_is_no_error(folder16):
    (folder16.path / imagenet16.CACHE).mkdir()  # unlike a read-only folder, this also stops root
    assert len(load_imagenet16(folder16.path, "train")) == SIZES["train"]
    assert not list(folder16.path.glob("*.tmp*"))


# ---- files that are refused


@pytest.mark.parametrize("label", [0, 1001, -5, True, "7", 10**30])
def test_label_out_of_range_is_refused(folder16, label):
    folder16.put("train_data_batch_3", {**GOOD, "labels": [label, *GOOD["labels"][1:]]})
    message = refused(folder16.path)
    assert "train_data_batch_3" in message
    assert "1..1000" in message


@pytest.mark.parametrize(
    "content",
    [
        {"labels": GOOD["labels"]},
        {**GOOD, "data": GOOD["data"].astype(np.float64)},
        {**GOOD, "data": GOOD["data"][:, :767]},
        {**GOOD, "labels": GOOD["labels"][1:]},
        {**GOOD, "labels": None},
        [GOOD],
    ],
)
def test_malformed_batch_is_refused_by_name(folder16, content):
    folder16.put("train_data_batch_3", content)
    assert "train_data_batch_3" in refused(folder16.path)


def test_wrong_number_of_images_is_refused(folder16):
    folder16.put("train_data_batch_3", {**GOOD, "labels": [1] * BATCH})
    assert " 330 " in refused(folder16.path)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("content_with", [lambda evil: {"more": evil}, lambda evil: {"data": np.array([evil])}])
def test_pickle_that_calls_is_refused_and_not_executed(folder16, tmp_path, content_with):
    evil = Evil(tmp_path / "evil")
    folder16.put("train_data_batch_3", {**GOOD, **content_with(evil)}, python2=False)
    assert "train_data_batch_3" in refused(folder16.path)
    assert not (tmp_path / "evil").exists()


def test_array_that_claims_more_memory_than_it_brings_is_refused(folder16):
    class Claim:
        def __reduce__(self):
            reconstruct = np.empty(0).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, (1 << 40, 768), np.dtype("u1"), False, b"xy")

    folder16.put("train_data_batch_1", {**GOOD, "data": Claim()})
    assert "train_data_batch_1" in refused(folder16.path)


def test_file_with_another_checksum_is_refused(folder16):
    path = folder16.path / "val_data"
    path.write_bytes(path.read_bytes()[:-1])
    message = refused(folder16.path)
    assert "val_data" in message
    assert imagenet16.MD5["val_data"] in message


def test_truncated_file_is_refused(folder16):
    path = folder16.path / "val_data"
    content = path.read_bytes()[:-1]
    path.write_bytes(content)
    imagenet16.MD5["val_data"] = hashlib.md5(content).hexdigest()
    assert "val_data" in refused(folder16.path)


def test_missing_file_is_named(folder16):
    (folder16.path / "val_data").unlink()
    assert "val_data" in refused(folder16.path)


def test_missing_folder_is_named(tmp_path):
    assert "nowhere" in refused(tmp_path / "nowhere")
