"""Loaders: augmentation (compared with torchvision's), order, shares of processes, image files."""

import hashlib
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import augment
import datasets
import loaders
from augment import Augmentation
from splits import Images
from support.files import UserError

CPU = torch.device("cpu")
MEAN = (0.5, 0.4, 0.3)
STD = (0.2, 0.25, 0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count, side=8):
    """Return `count` images of noise; the label of each is its number."""
    pixels = np.random.RandomState(1).randint(0, 256, (count, 3, side, side)).astype(np.uint8)
    return Images(torch.from_numpy(pixels), torch.arange(count), ["one", "two"])


def white_images(count, side=8):
    return Images(torch.full((count, 3, side, side), 255, dtype=torch.uint8), torch.zeros(count), ["one"])


def normalised(images):
    return TF.normalize(TF.to_dtype(images, torch.float32, scale=True), MEAN, STD)


def make_loader(images, batch_size, seed=0, augment=True, cutout=0, shared=True, **augmentation):
    settings = dict(generator=None if seed is None else seeded(seed), augment=augment, cutout=cutout, shared=shared)
    return loaders.make_loader(images, batch_size, Augmentation(MEAN, STD, **augmentation), CPU, **settings)


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
    """Return top and left of the crop, and whether it is flipped, (N,) each, for each image of x.

    All possibilities are tried with torchvision's own operations.
    """
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


def test_crops_and_flips_are_uniform_and_independent():
    images = random_images(4050)
    x, y = epoch(make_loader(images, 64))
    top, left, flip = find_augmentation(images.images[y], x, pad=4)
    assert_uniform(top * 9 + left, 81)
    assert_uniform(flip, 2)
    assert_uniform(top * 2 + flip, 18)
    for offset in (top, left):  # neighbours in a batch
        assert_uniform(offset[:-1] * 9 + offset[1:], 81)


def test_pad_and_flip_follow_the_augmentation():
    images = random_images(200)
    x, y = epoch(make_loader(images, 50, pad=1, flip=False))
    top, left, flip = find_augmentation(images.images[y], x, pad=1)
    assert (len(top.unique()), len(left.unique()), flip.max()) == (3, 3, 0)


@pytest.mark.parametrize("length", [1, 4, 5, 7])
def test_cutout_erases_one_clipped_square_per_image(length):
    side = 8
    half = length // 2
    x, _ = epoch(make_loader(white_images(3200, side), 64, cutout=length))  # of the pixels only erased ones are 0
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


def test_cutout_is_no_larger_than_the_augmentation_allows(capsys):
    x, _ = epoch(make_loader(white_images(300), 64, cutout=16, max_cutout=4))
    assert "at most 4x4 pixels" in capsys.readouterr().out
    assert (x[:, 0] == 0).sum(dim=(1, 2)).max() == 16


def test_cutout_needs_augmentation():
    x, _ = epoch(make_loader(white_images(300), 64, cutout=16, augment=False))
    assert (x != 0).all()


# ---- batches of images in memory


def test_batches_without_generator_and_augmentation_come_in_order():
    images = random_images(23)
    batches = list(make_loader(images, 10, seed=None, augment=False))
    assert [len(x) for x, _ in batches] == [10, 10, 3]
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    assert torch.equal(y, torch.arange(23))
    assert (x - normalised(images.images)).abs().max() < 1e-6


@pytest.mark.parametrize("augment", [True, False])
def test_batches_are_float32_in_channels_last(augment):
    for x, y in make_loader(random_images(23), 10, augment=augment):
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.dtype == torch.int64


def test_an_epoch_shows_each_image_once_in_another_order():
    loader = make_loader(random_images(100), 30, cutout=4)
    first, second = [y for _, y in (epoch(loader), epoch(loader))]
    assert torch.equal(first.sort().values, torch.arange(100))
    assert torch.equal(second.sort().values, torch.arange(100))
    assert not torch.equal(first, second)


def test_epochs_follow_from_the_seed():
    images = random_images(100)
    loader = make_loader(images, 30, cutout=4)
    again = make_loader(images, 30, cutout=4)
    other = make_loader(images, 30, cutout=4, seed=1)
    for _ in range(2):
        x, y = epoch(loader)
        x_again, y_again = epoch(again)
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
        assert not torch.equal(epoch(other)[1], y)


def test_an_epoch_can_be_repeated_from_the_state_of_the_generator():
    loader = make_loader(random_images(100), 30, cutout=4)
    before = loader.generator.get_state()
    x, _ = epoch(loader)
    epoch(loader)
    loader.generator.set_state(before)
    assert torch.equal(epoch(loader)[0], x)


def test_batches_do_not_change_between_versions():
    """A resumed run depends on them. The checksum is of an earlier version of the loader."""
    images = random_images(103)
    x, y = epoch(make_loader(images, 10, cutout=5))
    digest = hashlib.sha256(x.contiguous().numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    assert digest == "bc9252b7bd6611d10e41f6b49b91165067e86b6e8c45a3577c1b4a1829134842"


def test_skipped_batches_are_left_out_of_the_next_epoch_only():
    whole = list(make_loader(random_images(100), 30, cutout=4))
    loader = make_loader(random_images(100), 30, cutout=4)
    loader.skip = 2
    rest = list(loader)
    assert len(rest) == 2
    for (x, y), (x_whole, y_whole) in zip(rest, whole[2:], strict=True):
        assert torch.equal(x, x_whole)
        assert torch.equal(y, y_whole)
    assert len(list(loader)) == 4


def test_batch_larger_than_the_split_is_cut_to_it():
    loader = make_loader(random_images(23), 1024)
    assert (len(loader), loader.size, loader.batch_size) == (1, 23, 23)


def test_length_counts_the_last_smaller_batch():
    assert len(make_loader(random_images(23), 10)) == 3


# ---- shares of several processes


def assert_shares(make, augment, world_size, monkeypatch):
    """The batches of all processes must be those of a single one, dealt out.

    A training batch with fewer images than processes goes to all of them. `make` makes a loader
    whose last batch has two images.
    """
    whole = list(make())
    assert len(whole[-1][1]) == 2
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        shares = list(make())
        assert len(shares) == len(whole)
        for (x, y), (all_x, all_y) in zip(shares, whole, strict=True):
            share = slice(None) if augment and len(all_y) < world_size else slice(rank, None, world_size)
            assert torch.equal(x, all_x[share])
            assert torch.equal(y, all_y[share])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("augment", [True, False])
def test_batch_is_shared_among_processes(world_size, augment, monkeypatch):
    images = random_images(22)
    assert_shares(lambda: make_loader(images, 10, cutout=4, augment=augment), augment, world_size, monkeypatch)


def test_batch_that_is_not_shared_goes_to_all_processes(monkeypatch):
    x_whole, y_whole = epoch(make_loader(random_images(22), 10))
    monkeypatch.setenv("WORLD_SIZE", "2")
    x, y = epoch(make_loader(random_images(22), 10, shared=False))
    assert torch.equal(x, x_whole)
    assert torch.equal(y, y_whole)


def test_full_batch_is_what_this_process_gets(monkeypatch):
    loader = make_loader(random_images(22), 10)
    assert loader.full_batch == 10
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, expected in enumerate((4, 3, 3)):
        monkeypatch.setenv("RANK", str(rank))
        assert loader.full_batch == expected


# ---- what batches are refused


def split_of(count, side):
    return Images(torch.zeros(count, 3, side, side, dtype=torch.uint8), torch.zeros(count), ["one"])


def test_batch_larger_than_the_training_split_is_refused():
    with pytest.raises(UserError, match="--batch_size 11 .*10 images"):
        loaders.check_batch(11, split_of(10, 8))


@pytest.mark.parametrize("images, batch_size", [(9, 4), (1, 1), (8, 1)])
def test_batch_of_one_smallest_image_is_refused(images, batch_size):
    with pytest.raises(UserError, match=f"4x4 .*--batch_size {batch_size}"):
        loaders.check_batch(batch_size, split_of(images, 4))
    loaders.check_batch(batch_size, split_of(images, 8))


def test_batch_of_one_image_is_refused_with_an_auxiliary_head():
    with pytest.raises(UserError, match="--auxiliary"):
        loaders.check_batch(4, split_of(9, 32), auxiliary=True)


def test_batch_of_one_image_per_process_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="4x4 "):
        loaders.check_batch(2, split_of(8, 4))


# ---- loaders of image files


def file_loader(root, batch_size=4, seed=0, workers=0, augment=True):
    files = datasets.list_files("imagenet", root, "test")
    generator = None if seed is None else seeded(seed)
    recipe = datasets.augmentation("imagenet")
    return loaders.make_loader(files, batch_size, recipe, CPU, generator=generator, augment=augment, workers=workers)


@pytest.fixture
def photos(make_images):
    return make_images("val", 3, [(70, 90), (100, 60)])


def test_file_batches_do_not_depend_on_the_workers(photos):
    loader = file_loader(photos)
    with_workers = file_loader(photos, workers=2)
    for _ in range(2):
        x, y = epoch(loader)
        x_workers, y_workers = epoch(with_workers)
        assert torch.equal(x, x_workers)
        assert torch.equal(y, y_workers)


def test_file_batches_have_each_image_once(photos):
    loader = file_loader(photos)
    assert (len(loader), loader.size) == (3, 9)
    x, y = epoch(loader)
    assert x.shape == (9, 3, 224, 224)
    assert torch.bincount(y).tolist() == [3, 3, 3]


def test_file_epochs_differ_and_follow_from_the_seed(photos):
    loader = file_loader(photos)
    first, _ = epoch(loader)
    assert not torch.equal(first, epoch(loader)[0])
    assert torch.equal(first, epoch(file_loader(photos))[0])
    assert not torch.equal(first, epoch(file_loader(photos, seed=1))[0])


def test_file_loader_leaves_the_global_generator_alone(photos):
    before = torch.get_rng_state()
    epoch(file_loader(photos))
    assert torch.equal(torch.get_rng_state(), before)


def test_transform_for_testing_resizes_and_crops_the_centre(photos):
    x, y = epoch(file_loader(photos, seed=None, augment=False))
    assert y.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    for i, path in enumerate(sorted(photos.glob("val/*/*"))):
        image = Image.open(path).convert("RGB")
        image = image.resize([(256, 329), (426, 256)][image.width > image.height], Image.Resampling.BILINEAR)
        top = round((image.height - 224) / 2)
        left = round((image.width - 224) / 2)
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224))) / 255
        expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        assert np.abs(x[i].numpy() - expected.transpose(2, 0, 1)).max() < 1e-5


def test_transform_for_training_is_the_published_one():
    crop, flip, jitter, *_ = augment.imagenet_transform(datasets.augmentation("imagenet"), augment=True).transforms
    assert (tuple(crop.size), tuple(crop.scale), tuple(crop.ratio)) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert flip.p == 0.5
    assert [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue] == [(0.6, 1.4)] * 3 + [(-0.2, 0.2)]


@pytest.mark.parametrize("augment", [True, False])
def test_file_batch_is_shared_among_processes(photos, augment, monkeypatch):
    assert_shares(lambda: file_loader(photos, batch_size=7, augment=augment), augment, 3, monkeypatch)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_file_is_named(photos, workers):
    bad = photos / "val/bee/1.jpg"
    bad.write_bytes(bad.read_bytes()[:-400])
    with pytest.raises(UserError, match="val/bee/1.jpg"):
        epoch(file_loader(photos, workers=workers))
    assert multiprocessing.active_children() == []
