"""Splits, augmentation and loaders: the laws they follow, torchvision as the judge of pixels."""

import json
import os
import shutil
import subprocess
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import data
import loaders
import nas201.data
from support.files import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count, side=8):
    """`count` images of noise; the label of each is its number."""
    pixels = np.random.RandomState(1).randint(0, 256, (count, 3, side, side)).astype(np.uint8)
    return data.Images(torch.from_numpy(pixels), torch.arange(count), ["one", "two"])


def normalised(images):
    return TF.normalize(TF.to_dtype(images, torch.float32, scale=True), MEAN, STD)


def make_loader(images, batch_size, seed=0, augment=True, cutout=0, shared=True, **augmentation):
    settings = dict(generator=None if seed is None else seeded(seed), augment=augment, cutout=cutout, shared=shared)
    return loaders.make_loader(images, batch_size, data.Augmentation(MEAN, STD, **augmentation), CPU, **settings)


def epoch(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def assert_uniform(values, cells):
    """Chi-squared test of `values` in 0..cells-1, at about one failure in a million seeds."""
    counts = torch.bincount(values, minlength=cells).double()
    assert len(counts) == cells
    mean = len(values) / cells
    assert ((counts - mean) ** 2 / mean).sum() < (cells - 1) + 5 * (2 * (cells - 1)) ** 0.5 + 15


# ---- augmentation in memory


def find_augmentation(images, x, pad):
    """The crop's top and left and whether it is flipped, for each image of x, with torchvision's own operations."""
    found = torch.full((len(x), 3), -1)
    side = images.shape[-1]
    padded = TF.pad(images, [pad] * 4)
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = TF.crop(padded, top, left, side, side)
            for flip in (0, 1):
                expected = normalised(TF.horizontal_flip(crop) if flip else crop)
                equal = (x - expected).abs().amax(dim=(1, 2, 3)) < 1e-6
                assert (found[equal] == -1).all()  # at most one augmentation explains the pixels
                found[equal] = torch.tensor([top, left, flip])
    assert (found >= 0).all()
    return found.unbind(1)


def test_each_sample_has_its_own_uniform_crop_and_flip():
    images = random_images(4050)
    x, y = epoch(make_loader(images, 64))
    top, left, flip = find_augmentation(images.images[y], x, pad=4)
    assert_uniform(top * 9 + left, 81)
    assert_uniform(flip, 2)
    assert_uniform(top * 2 + flip, 18)
    for offset in (top, left):  # of neighbours in a batch: independent
        assert_uniform(offset[:-1] * 9 + offset[1:], 81)


def test_pad_and_flip_of_the_recipe():
    images = random_images(200)
    x, y = epoch(make_loader(images, 50, pad=1, flip=False))
    top, left, flip = find_augmentation(images.images[y], x, pad=1)
    assert (len(top.unique()), len(left.unique()), flip.max()) == (3, 3, 0)


@pytest.mark.parametrize("length", [1, 4, 5, 7])
def test_cutout_is_one_clipped_square_of_zeros_a_sample(length):
    side, half = 8, length // 2
    white = data.Images(torch.full((3200, 3, side, side), 255, dtype=torch.uint8), torch.zeros(3200), ["one"])
    x, _ = epoch(make_loader(white, 64, cutout=length))  # normalised pixels, white or black, are not 0
    holes = x == 0
    assert (holes == holes[:, :1]).all()
    if half == 0:
        assert not holes.any()
        return
    centers = []
    for axis in (2, 1):
        line = holes[:, 0].any(dim=axis)  # (N, side): rows, then columns of the hole
        first = line.int().argmax(1)
        last = side - 1 - line.flip(1).int().argmax(1)
        centers.append(torch.where(first > 0, first + half, last + 1 - half))
    row, column = (torch.arange(side) - c.view(-1, 1) for c in centers)
    inside = [(-half <= distance) & (distance < half) for distance in (row, column)]
    assert (holes[:, 0] == inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).all()
    assert_uniform(centers[0] * side + centers[1], side * side)


def test_cutout_is_capped_and_only_while_augmenting():
    images = data.Images(torch.full((300, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(300), ["one"])
    capped, _ = epoch(make_loader(images, 64, cutout=16, max_cutout=4))
    assert (capped[:, 0] == 0).sum(dim=(1, 2)).max() == 16
    plain, _ = epoch(make_loader(images, 64, cutout=16, augment=False))
    assert (plain != 0).all()


def test_without_generator_and_augmentation_images_come_in_order():
    images = random_images(23)
    batches = list(make_loader(images, 10, seed=None, augment=False))
    assert [len(x) for x, _ in batches] == [10, 10, 3]
    assert all(x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32 for x, _ in batches)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    assert torch.equal(y, torch.arange(23))
    assert (x - normalised(images.images)).abs().max() < 1e-6


def test_epochs_follow_from_the_generator():
    images = random_images(100)
    loader = make_loader(images, 30, cutout=4)
    before = loader.generator.get_state()
    epochs = [epoch(loader) for _ in range(2)]
    assert all(torch.equal(y.sort().values, torch.arange(100)) for _, y in epochs)  # each image once
    assert not torch.equal(epochs[0][1], epochs[1][1])
    again = make_loader(images, 30, cutout=4)
    assert all(torch.equal(a, b) for x, y in epochs for a, b in zip((x, y), epoch(again), strict=True))
    loader.generator.set_state(before)
    assert torch.equal(epoch(loader)[0], epochs[0][0])
    assert not torch.equal(epoch(make_loader(images, 30, seed=1))[1], epochs[0][1])


def test_lengths_and_batches_larger_than_the_split():
    images = random_images(23)
    loader = make_loader(images, 1024)
    assert (len(loader), loader.size, loader.batch_size) == (1, 23, 23)
    assert len(make_loader(images, 10)) == 3


def assert_shares(make, augment, world_size, monkeypatch):
    """The processes' batches are the single process's, dealt out; a training batch too small for that goes to all."""
    whole = list(make())
    assert len(whole[-1][1]) == 2
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        shares = list(make())
        assert len(shares) == len(whole)
        for (x, y), (all_x, all_y) in zip(shares, whole, strict=True):
            share = slice(None) if augment and len(all_y) < world_size else slice(rank, None, world_size)
            assert torch.equal(x, all_x[share]) and torch.equal(y, all_y[share])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("augment", [True, False])
def test_processes_share_each_batch(world_size, augment, monkeypatch):
    images = random_images(22)
    assert_shares(lambda: make_loader(images, 10, cutout=4, augment=augment), augment, world_size, monkeypatch)


def test_batches_that_are_not_shared(monkeypatch):
    whole = epoch(make_loader(random_images(22), 10))
    monkeypatch.setenv("WORLD_SIZE", "2")
    x, y = epoch(make_loader(random_images(22), 10, shared=False))
    assert torch.equal(x, whole[0]) and torch.equal(y, whole[1])


# ---- splits


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.integers(0, 1000))
def test_every_prefix_of_a_stratified_order_has_the_same_share_of_each_class(counts, seed):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    order = data.stratified_order(labels, seeded(seed))
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    sizes = torch.tensor([count for count in counts if count])
    present = [label for label, count in enumerate(counts) if count]
    seen = torch.stack([(labels[order] == label).cumsum(0) for label in present])  # (classes, N)
    lowest = ((seen - 0.5) / sizes.view(-1, 1)).amax(0)
    highest = ((seen + 0.5) / sizes.view(-1, 1)).amin(0)
    assert (lowest <= highest + 1e-9).all()  # one share t with |seen - t * size| <= 1/2 for all classes


def test_stratified_order_is_random_within_classes():
    labels = torch.arange(1000) % 10
    first, second = (data.stratified_order(labels, seeded(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, data.stratified_order(labels, seeded(0)))
    ranks = torch.empty(1000, dtype=torch.int64)
    ranks[first] = torch.arange(1000)
    correlation = torch.corrcoef(torch.stack([ranks.double(), torch.arange(1000).double()]))[0, 1]
    assert abs(correlation) < 0.15


def test_halves_are_disjoint_and_complete():
    images = random_images(101)
    for in_file_order in (False, True):
        train, valid = data.split_train(images, 0.3, in_file_order, seeded())
        assert (len(train), len(valid)) == (30, 71)
        assert torch.equal(torch.cat([train.labels, valid.labels]).sort().values, torch.arange(101))
        assert torch.equal(valid.images, images.images[valid.labels])
        assert torch.equal(train.labels, torch.arange(30)) == in_file_order


def test_draw_keeps_classes_in_proportion_and_images_in_order():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    split = data.Images(torch.arange(100).view(-1, 1, 1, 1), labels, list("abc"))
    drawn = data.subsample(split, 20, seeded())
    assert torch.bincount(drawn.labels).tolist() == [12, 6, 2]
    position = drawn.images.flatten()
    assert torch.equal(position, position.sort().values) and torch.equal(labels[position], drawn.labels)
    assert data.subsample(split, None, seeded()) is split
    assert len(data.subsample(split, 100, seeded())) == 100
    with pytest.raises(UserError, match="101 images are asked for, but the split has 100"):
        data.subsample(split, 101, seeded())


def fake_cifar(monkeypatch, count=60):
    pixels = np.random.RandomState(0).randint(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    source = SimpleNamespace(data=pixels, targets=[i % 3 for i in range(count)], classes=["a", "b", "c"])
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(torchvision.datasets, name, lambda root, train, download: source)
    return source


def search_args(**changed):
    args = dict(data=".", seed=18, seed_scheme=2, image_size=None, image_cache=True, train_portion=0.5)
    args |= dict(train_samples=None, valid_samples=None)
    return Namespace(**{**args, **changed})


def test_cifar_splits_in_file_order(monkeypatch):
    source = fake_cifar(monkeypatch)
    train, valid, augmentation = data.search_splits(search_args(dataset="cifar10"))
    expected = torch.from_numpy(source.data.transpose(0, 3, 1, 2))
    assert torch.equal(train.images, expected[:30]) and torch.equal(valid.images, expected[30:])
    assert train.labels.tolist() == source.targets[:30] and train.classes == ["a", "b", "c"]
    assert augmentation == data.Augmentation(
        (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768), pad=4, flip=True
    )
    _, _, of_cifar100 = data.search_splits(search_args(dataset="cifar100"))
    assert (of_cifar100.mean, of_cifar100.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def test_samples_are_drawn_from_the_halves(monkeypatch):
    source = fake_cifar(monkeypatch)
    train, valid, _ = data.search_splits(search_args(dataset="cifar10", train_samples=12, valid_samples=6))
    assert torch.bincount(train.labels).tolist() == [4, 4, 4] and torch.bincount(valid.labels).tolist() == [2, 2, 2]
    number_of = {image.tobytes(): i for i, image in enumerate(source.data.transpose(0, 3, 1, 2))}
    assert all(number_of[image.numpy().tobytes()] < 30 for image in train.images)
    assert all(number_of[image.numpy().tobytes()] >= 30 for image in valid.images)


def test_digits_are_split_once_and_for_all():
    train, test = (data.load("digits", None, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == (3, 8, 8) and train.classes == [str(i) for i in range(10)]
    assert (train.images == train.images[:, :1]).all()
    assert (train.images.min(), train.images.max()) == (0, 255)
    counts = torch.bincount(train.labels) + torch.bincount(test.labels)
    assert (torch.bincount(test.labels) - counts * (360 / 1797)).abs().max() <= 1
    in_train = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in in_train for image in test.images)
    assert test.labels[:12].tolist() == [5, 3, 0, 7, 8, 9, 6, 4, 5, 1, 2, 3]  # fixed for good


def test_digits_in_a_search_are_stratified():
    train, valid, augmentation = data.search_splits(search_args(dataset="digits"))
    assert (len(train), len(valid)) == (718, 719)
    assert (torch.bincount(train.labels) - torch.bincount(valid.labels)).abs().max() <= 1
    assert (augmentation.pad, augmentation.flip, augmentation.max_cutout) == (1, False, 4)
    everything = data.load("digits", None, "train").images.double().numpy() / 255
    assert augmentation.mean == pytest.approx(everything.mean((0, 2, 3)), abs=1e-9)
    assert augmentation.std == pytest.approx(everything.std((0, 2, 3)), abs=1e-9)


# ---- image folders


def test_small_images_of_one_size_are_kept_in_memory(make_images):
    root = make_images("train", 4, [(32, 16)], suffixes=[".png", ".jpg", ".JPEG"])
    make_images("val", 2, [(32, 16)])
    (root / "train/ant/notes.txt").write_text("not an image")
    (root / "train/.hidden").mkdir()
    train = data.load("folder", root, "train")
    assert isinstance(train, data.Images) and train.images.shape == (12, 3, 16, 32)
    assert train.classes == ["ant", "bee", "cat"] and train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for i, path in enumerate(sorted((root / "train/bee").iterdir())):
        pixels = np.asarray(Image.open(path))
        expected = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None].repeat(3, axis=0)
        assert (train.images[4 + i].numpy() == expected).all()
    augmentation = data.augmentation("folder", train)
    values = train.images.double().numpy() / 255
    assert augmentation.mean == pytest.approx(values.mean((0, 2, 3)), abs=1e-9)
    assert augmentation.std == pytest.approx(values.std((0, 2, 3)), abs=1e-9)
    assert (augmentation.pad, augmentation.flip) == (4, True)
    about = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    assert data.augmentation("folder", train, about) == data.Augmentation((0.1, 0.2, 0.3), (1, 2, 3))
    assert len(data.load("folder", root, "test")) == 6  # val/ where there is no test/
    make_images("test", 1, [(32, 16)])
    assert len(data.load("folder", root, "test")) == 3


def test_decoded_images_are_kept_in_a_file(make_images, monkeypatch):
    """It is never needed: one that is of other files, damaged or cannot be written does not count."""
    root = make_images("train", 4, [(8, 12)])
    folder, opened, open_image = root / "train", [], data.open_image
    monkeypatch.setattr(data, "open_image", lambda path, *use: opened.append(path) or open_image(path, *use))

    def decoded(**settings):
        opened.clear()
        split = data.load("folder", root, "train", **settings)
        assert torch.equal(split.images, expected.images) and split.source == expected.source
        return len(opened) > 12  # of so many the headers alone are read

    expected, cache = data.load("folder", root, "train"), folder / data.CACHE
    assert decoded() and not cache.exists()  # too few images
    monkeypatch.setattr(data, "CACHED", 12)
    assert decoded(cache=False) and not cache.exists()
    assert decoded() and cache.exists() and not decoded() and decoded(cache=False)
    whole = cache.read_bytes()
    for damaged in (b"", whole[:-100], whole[:500] + b"x" + whole[501:], whole.replace(b"uint8", b"object")):
        cache.write_bytes(damaged)
        decoded()
        assert not decoded()
    key = np.frombuffer(data.fingerprint(data.scan_folder(root, "train"), data.read_small), np.uint8)
    for wrong in (dict(images=np.zeros((12, 3, 12, 8), np.int8)), dict(images=np.zeros((11, 3, 12, 8), np.uint8)), {}):
        with cache.open("wb") as file:
            np.savez(file, key=key, **wrong)
        assert decoded() and not decoded()
    os.utime(folder / "ant/0.jpg", (1, 1))
    assert decoded() and not decoded()
    assert data.load("folder", root, "train", image_size=4, in_memory=True).image_size == [4, 4]
    assert decoded() and not decoded()  # as they are, not resized
    cache.unlink()
    cache.mkdir()
    assert decoded()


def array_of(path):
    return np.asarray(data.open_image(path)).tolist()


@pytest.mark.parametrize("suffix, kind", [(".png", "<u2"), (".tif", "<u2"), (".tif", ">u2"), (".pgm", "i4")])
def test_sixteen_bits_are_scaled(tmp_path, suffix, kind):
    values = np.array([[0, 128, 129, 257], [385, 386, 32896, 65535]], np.uint16)
    Image.fromarray(values.astype(kind)).save(tmp_path / f"x{suffix}")
    grey = [[0, 0, 1, 1], [1, 2, 128, 255]]
    assert array_of(tmp_path / f"x{suffix}") == [[[value] * 3 for value in row] for row in grey]


@pytest.mark.parametrize("kind", ["f4", "i4"])
def test_pixels_of_unknown_range_are_refused(tmp_path, kind):
    path = tmp_path / "x.tif"
    Image.fromarray(np.ones((4, 4), kind)).save(path)
    with pytest.raises(UserError, match=f"cannot read image {path}: .*32 bits.*8 or 16 bits"):
        data.open_image(path)


def test_alpha_is_dropped(tmp_path):
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    image.save(tmp_path / "x.png")
    assert array_of(tmp_path / "x.png")[0][0] == [200, 100, 50]
    image = image.convert("RGB").convert("P")
    image.save(tmp_path / "y.png", transparency=image.getpixel((0, 0)))
    assert array_of(tmp_path / "y.png") == np.asarray(image.convert("RGB")).tolist()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_images_are_turned_upright(tmp_path, suffix, mode):
    """A corner that is bright where the EXIF orientation says that top and left are."""
    if mode == "I;16" and suffix in (".jpg", ".webp"):
        return
    pixels = np.zeros((16, 24), np.uint16 if mode == "I;16" else np.uint8)
    pixels[:8, :8] = 65535 if mode == "I;16" else 255
    stored = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.T}
    stored |= {6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, 3)}
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(turn(pixels)))
        (image.convert("RGB") if mode == "RGB" else image).save(tmp_path / f"x{suffix}", exif=exif)
        upright = np.asarray(data.open_image(tmp_path / f"x{suffix}"))
        assert upright.shape == (16, 24, 3) and upright[:7, :7].min() > 200 and upright[9:, 9:].max() < 50, orientation


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "block", [b"", b"XX\0*", b"MM\0*\0\0\0\10\0\11\1\22\0\3", b"II*\0\10\0\0\0\1\0\22\1\2" + b"\xff" * 9]
)
def test_a_damaged_exif_block_does_not_cost_the_image(tmp_path, block):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "x.jpg", exif=b"Exif\0\0" + block)
    assert array_of(tmp_path / "x.jpg")[0][0] == [255, 255, 255]


@pytest.mark.parametrize("format", ["EPS", "PSD", "TGA", "PCX", "SGI", "DDS", "ICNS", "MSP"])
def test_other_formats_are_not_tried(tmp_path, monkeypatch, format):
    for name in ("x.jpg", "x.png"):
        Image.new("1" if format == "MSP" else "RGB", (16, 16)).save(
            tmp_path / "x", "GIF" if format == "PSD" else format
        )
        monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
        if format == "PSD":
            (tmp_path / "x").write_bytes(b"8BPS\0\1" + bytes(6) + b"\0\3" + b"\0\0\0\4" * 2 + b"\0\10\0\3" + bytes(80))
        (tmp_path / "x").rename(tmp_path / name)
        with pytest.raises(UserError, match=f"cannot read image .*{name}"):
            data.open_image(tmp_path / name)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_or_a_device_is_no_image(tmp_path, make):
    make(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="x.jpg: .*not a regular file"):
        data.open_image(tmp_path / "x.jpg")


def test_what_is_left_out_is_said(make_images, capsys):
    root = make_images("train", 2, [(8, 8)], suffixes=[".png"])
    for name in ("._0.png", ".DS_Store"):  # macOS
        (root / "train/ant" / name).write_bytes(b"\0\5\x16\7")
    (root / "train/._ant").mkdir()
    assert len(data.load("folder", root, "train")) == 6 and not capsys.readouterr().out
    for i in range(5):
        (root / f"train/bee/{i}.heic").write_bytes(b"")
    (root / "train/list.txt").write_text("")
    (root / "train/cat/1.png").unlink()
    assert data.load("folder", root, "train").labels.tolist() == [0, 0, 1, 1, 2]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"note: not read in {root}/train: 6 files ") and first.endswith("such as list.txt")
    assert f"1 classes in {root}/train have a single image, such as cat" in second
    for name in ("bee", "cat"):
        shutil.rmtree(root / "train" / name)
    data.load("folder", root, "train")
    assert "has one class alone, ant" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [[(32, 32), (32, 28)], [(65, 65)], [(32, 80)]])
def test_large_or_uneven_images_stay_files(make_images, sizes):
    files = data.load("folder", make_images("train", 3, sizes), "train")
    assert isinstance(files, data.Files) and len(files) == 9
    assert data.augmentation("folder", files).mean == (0.485, 0.456, 0.406)
    with pytest.raises(UserError, match=r"must all have one size of at most 64 pixels .*ant/0.jpg \d+x\d+"):
        data.check_in_memory(files)
    half, _ = data.split_train(files, 0.5, False, seeded())
    assert [files.classes[label] for label in half.labels] == [path.parent.name for path in half.paths]


def test_imagenet_is_files_and_reads_val(make_images):
    root = make_images("val", 2, [(32, 32)])
    make_images("test", 1, [(32, 32)])
    assert isinstance(data.load("imagenet", root, "test"), data.Files)
    assert len(data.load("imagenet", root, "test")) == 6


def test_images_that_no_network_takes_are_refused(make_images):
    with pytest.raises(UserError, match="are 30x32; both sides must be multiples of 4"):
        data.check_in_memory(data.load("folder", make_images("train", 1, [(30, 32)]), "train"))


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_any_size_are_resized_and_cropped_at_their_centre(make_images, in_memory):
    root = make_images("train", 3, [(64, 48), (31, 90), (32, 32)], suffixes=[".png"])
    split = data.load("folder", root, "train", image_size=32, in_memory=in_memory)
    assert split.image_size == [32, 32] and split.subset(torch.arange(4)).image_size == [32, 32]
    recipe = data.Augmentation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    x, _ = epoch(loaders.make_loader(split, 9, recipe, torch.device("cpu")))
    assert x.shape == (9, 3, 32, 32)
    boxes = [(8, 0, 56, 48), (0, 29.5, 31, 60.5), (0, 0, 32, 32)]
    for i, (image, box) in enumerate(zip(sorted(root.glob("train/*/*.png")), boxes * 3, strict=True)):
        opened = Image.open(image).convert("RGB")
        pixels = torch.from_numpy(np.array(opened.resize((32, 32), Image.Resampling.BILINEAR, box))).permute(2, 0, 1)
        expected = (pixels / 255 - torch.tensor(recipe.mean).view(3, 1, 1)) / torch.tensor(recipe.std).view(3, 1, 1)
        if in_memory:
            torch.testing.assert_close(x[i], expected)
            torch.testing.assert_close(loaders.small_transform(recipe, [32, 32])(opened), expected)
        else:  # ImageNet's way: to 256/224 of the size first, then the centre
            torch.testing.assert_close(x[i], loaders.imagenet_transform(recipe, False, 32)(opened))
            assert (x[i] - expected).abs().mean() < 2


def test_image_size_is_for_folders():
    for dataset in ("digits", "cifar10"):
        with pytest.raises(UserError, match=f"are for folders of images, not for {dataset}"):
            data.load(dataset, None, "train", image_size=32)
    with pytest.raises(UserError, match="not for ImageNet16-120"):
        nas201.data.load("ImageNet16-120", None, "train", image_size=32)


def test_a_class_too_small_for_both_splits_is_refused(make_images):
    root = make_images("train", 4, [(8, 8)])
    for i in range(1, 4):
        next((root / "train/bee").glob(f"{i}.*")).unlink()
    with pytest.raises(UserError, match="class bee has 1 of the images, too few: .* got none"):
        data.search_splits(search_args(dataset="folder", data=root))


def test_a_description_changes_with_the_data_alone(make_images, tmp_path):
    root = make_images("train", 4, [(8, 8)])
    make_images("test", 1, [(8, 8)])

    def describe(root):
        train, test = (data.load("folder", root, split) for split in ("train", "test"))
        return data.describe(train=train.subset(torch.arange(5)), test=test)

    before = describe(root)
    assert (before["classes"], before["image_size"]) == (["ant", "bee", "cat"], [8, 8])
    assert before["per_class"] == {"train": [0, 4], "test": [1, 1]}
    counts = "5 training images (0 to 4 a class) and 3 test images (1 a class) of 3 classes, 8x8 pixels"
    assert data.counts_text(before) == counts
    assert before["images"] == {"train": 5, "test": 3} and before == json.loads(json.dumps(before))
    moved = shutil.copytree(root, tmp_path / "moved")
    assert describe(moved) == before

    image = moved / "train/bee/1.jpg"
    content = image.read_bytes()
    for change, undo in [
        (lambda: image.write_bytes(content + b"0"), lambda: image.write_bytes(content)),
        (lambda: image.rename(moved / "train/bee/5.jpg"), lambda: (moved / "train/bee/5.jpg").rename(image)),
        (lambda: image.rename(moved / "train/cat/5.jpg"), lambda: (moved / "train/cat/5.jpg").rename(image)),
        (image.unlink, lambda: image.write_bytes(content)),
    ]:
        change()
        after = describe(moved)
        assert after["source"]["train"] != before["source"]["train"], "unseen"
        assert after["source"]["test"] == before["source"]["test"]
        undo()
        assert describe(moved) == before
    (moved / "train/bee").rename(moved / "train/dog")
    (moved / "test/bee").rename(moved / "test/dog")
    assert describe(moved)["classes"] == ["ant", "cat", "dog"]
    assert data.describe(train=data.load("digits", None, "train"))["source"] == {"train": "digits"}


# ---- loaders of image files


def file_loader(root, batch_size=4, seed=0, workers=0, augment=True):
    files = data.load("imagenet", root, "test")
    generator = None if seed is None else seeded(seed)
    recipe = data.AUGMENTATION["imagenet"]
    return loaders.make_loader(files, batch_size, recipe, CPU, generator=generator, augment=augment, workers=workers)


@pytest.fixture
def photos(make_images):
    return make_images("val", 3, [(70, 90), (100, 60)])


def test_batches_of_files_do_not_depend_on_the_workers(photos):
    loader = file_loader(photos)
    assert (len(loader), loader.size) == (3, 9)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = [epoch(loader) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    workers = file_loader(photos, workers=2)
    assert all(torch.equal(a, b) for pair in first for a, b in zip(pair, epoch(workers), strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    assert all(torch.bincount(y).tolist() == [3, 3, 3] for _, y in first)
    assert not torch.equal(epoch(file_loader(photos, seed=1))[0], first[0][0])
    assert first[0][0].shape == (9, 3, 224, 224)


def test_test_transform_of_files(photos):
    x, y = epoch(file_loader(photos, seed=None, augment=False))
    assert y.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    for i, path in enumerate(sorted(photos.glob("val/*/*"))):
        image = Image.open(path).convert("RGB")
        image = image.resize([(256, 329), (426, 256)][image.width > image.height], Image.Resampling.BILINEAR)
        top, left = round((image.height - 224) / 2), round((image.width - 224) / 2)
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224))) / 255
        expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        assert np.abs(x[i].numpy() - expected.transpose(2, 0, 1)).max() < 1e-5


def test_train_transform_of_files():
    crop, flip, jitter, *_ = loaders.imagenet_transform(data.AUGMENTATION["imagenet"], augment=True).transforms
    assert (tuple(crop.size), tuple(crop.scale), tuple(crop.ratio)) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert flip.p == 0.5
    assert [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue] == [(0.6, 1.4)] * 3 + [(-0.2, 0.2)]


@pytest.mark.parametrize("augment", [True, False])
def test_processes_share_each_batch_of_files(photos, augment, monkeypatch):
    assert_shares(lambda: file_loader(photos, batch_size=7, augment=augment), augment, 3, monkeypatch)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_is_named(photos, workers):
    bad = photos / "val/bee/1.jpg"
    bad.write_bytes(bad.read_bytes()[:-400])
    with pytest.raises(UserError, match="cannot read image .*val/bee/1.jpg"):
        epoch(file_loader(photos, workers=workers))
