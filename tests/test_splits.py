"""Splits: what they have, how they are divided and described."""

import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
from splits import Images, check_alike, check_classes, counts_text, describe, split_train, stratified_order, subsample
from support.files import UserError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered_images(labels):
    """Images of one pixel, which is the number of the image."""
    labels = torch.as_tensor(labels)
    return Images(torch.arange(len(labels)).view(-1, 1, 1, 1), labels, ["a", "b", "c"])


# ---- dividing


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.integers(0, 1000))
def test_every_prefix_of_a_stratified_order_has_the_same_share_of_each_class(counts, seed):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    order = stratified_order(labels, seeded(seed))
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    sizes = torch.tensor([count for count in counts if count])
    present = [label for label, count in enumerate(counts) if count]
    seen = torch.stack([(labels[order] == label).cumsum(0) for label in present])  # (classes, N)
    lowest = ((seen - 0.5) / sizes.view(-1, 1)).amax(0)
    highest = ((seen + 0.5) / sizes.view(-1, 1)).amin(0)
    assert (lowest <= highest + 1e-9).all()  # one share t with |seen - t * size| <= 1/2 for all classes


def test_stratified_order_is_random_within_classes():
    labels = torch.arange(1000) % 10
    first, second = (stratified_order(labels, seeded(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, stratified_order(labels, seeded(0)))
    ranks = torch.empty(1000, dtype=torch.int64)
    ranks[first] = torch.arange(1000)
    correlation = torch.corrcoef(torch.stack([ranks.double(), torch.arange(1000).double()]))[0, 1]
    assert abs(correlation) < 0.15


@pytest.mark.parametrize("in_file_order", [False, True])
def test_halves_are_disjoint_and_complete(in_file_order):
    images = numbered_images(range(101))
    train, valid = split_train(images, 0.3, in_file_order, seeded())
    assert (len(train), len(valid)) == (30, 71)
    assert torch.equal(torch.cat([train.labels, valid.labels]).sort().values, torch.arange(101))
    assert torch.equal(valid.images.flatten(), valid.labels)
    assert torch.equal(train.labels, torch.arange(30)) == in_file_order


def test_subsample_keeps_classes_in_proportion_and_images_in_order():
    split = numbered_images([0] * 60 + [1] * 30 + [2] * 10)
    drawn = subsample(split, 20, seeded())
    assert torch.bincount(drawn.labels).tolist() == [12, 6, 2]
    numbers = drawn.images.flatten()
    assert torch.equal(numbers, numbers.sort().values)
    assert torch.equal(split.labels[numbers], drawn.labels)


def test_subsample_of_none_or_all_keeps_every_image():
    split = numbered_images([0] * 60 + [1] * 30 + [2] * 10)
    assert subsample(split, None, seeded()) is split
    assert len(subsample(split, 100, seeded())) == 100


def test_subsample_of_too_many_images_is_refused():
    with pytest.raises(UserError, match="101 .* 100"):
        subsample(numbered_images([0] * 100), 101, seeded())


def test_class_missing_from_one_split_is_refused():
    with pytest.raises(UserError, match="class c .*1.* valid"):
        check_classes(train=numbered_images([0, 1, 2]), valid=numbered_images([0, 1]))


def test_empty_split_needs_no_classes():
    empty = numbered_images(torch.zeros(0, dtype=torch.int64))
    assert check_classes(train=numbered_images([0, 1, 2]), valid=empty) is None


# ---- descriptions


@pytest.fixture
def folder(make_images):
    """Folders of images with 4 images per class in train/ and 1 in test/."""
    make_images("train", 4, [(8, 8)])
    return make_images("test", 1, [(8, 8)])


def description_of(root):
    """The description of the first five training images and all test images."""
    train = datasets.load_images("folder", root, "train")
    test = datasets.load_images("folder", root, "test")
    return describe(train=train.subset(torch.arange(5)), test=test)


def test_description_counts_images_and_classes(folder):
    found = description_of(folder)
    assert (found["classes"], found["image_size"]) == (["ant", "bee", "cat"], [8, 8])
    assert found["images"] == {"train": 5, "test": 3}
    assert found["per_class"] == {"train": [0, 4], "test": [1, 1]}
    assert found == json.loads(json.dumps(found))
    assert re.findall(r"\d+", counts_text(found)) == ["5", "0", "4", "3", "1", "3", "8", "8"]


def test_description_does_not_depend_on_where_the_data_are(folder, tmp_path):
    assert description_of(shutil.copytree(folder, tmp_path / "moved")) == description_of(folder)


CHANGES = {
    "larger file": lambda train: (train / "bee/1.jpg").write_bytes((train / "bee/1.jpg").read_bytes() + b"0"),
    "other name": lambda train: (train / "bee/1.jpg").rename(train / "bee/5.jpg"),
    "other class": lambda train: (train / "bee/1.jpg").rename(train / "cat/5.jpg"),
    "missing file": lambda train: (train / "bee/1.jpg").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_description_changes_with_the_files_of_its_split(folder, change):
    before = description_of(folder)
    change(folder / "train")
    after = description_of(folder)
    assert after["source"]["train"] != before["source"]["train"]
    assert after["source"]["test"] == before["source"]["test"]


def test_source_of_a_standard_data_set_is_its_name():
    assert describe(train=datasets.load_images("digits", None, "train"))["source"] == {"train": "digits"}


def test_check_alike_refuses_different_image_sizes():
    one = {"classes": ["ant"], "image_size": [8, 12]}
    other = {"classes": ["ant"], "image_size": [224, 224]}
    check_alike("one", one, "other", one)
    with pytest.raises(UserError, match="12x8 .*224x224 .*--image_size"):
        check_alike("one", one, "other", other)
