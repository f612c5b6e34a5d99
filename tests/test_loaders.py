"""Loaders: augmentation (torchvision is the judge of pixels), order, shares of processes, image files."""

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
    """`count` images of noise; the label of each is its number."""
    pixels = np.random.RandomState(1).randint(0, 256, (count, 3, side, side)).astype(np.uint8)
    return Images(torch.from_numpy(pixels), torch.arange(count), ["one", "two"])


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
    white = Images(torch.full((3200, 3, side, side), 255, dtype=torch.uint8), torch.zeros(3200), ["one"])
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
    images = Images(torch.full((300, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(300), ["one"])
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


# ---- loaders of image files


def file_loader(root, batch_size=4, seed=0, workers=0, augment=True):
    files = datasets.list_files("imagenet", root, "test")
    generator = None if seed is None else seeded(seed)
    recipe = datasets.augmentation("imagenet")
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
    crop, flip, jitter, *_ = augment.imagenet_transform(datasets.augmentation("imagenet"), augment=True).transforms
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
