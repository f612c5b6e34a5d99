"""Folders of images: which files are images and which folders classes, reading, the cache."""

import hashlib
import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import class_names
import datasets
import image_folder
import loaders
import predict
from augment import Augmentation
from splits import Files, Images
from support.files import UserError

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.fixture
def make_files(tmp_path):
    """`make_files("a/1.jpg", "b -> ../a")` makes empty files and links in tmp_path/train.

    It returns that folder.
    """

    def make(*names):
        for name in names:
            path, _, target = name.partition(" -> ")
            path = tmp_path / "train" / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target) if target else path.write_bytes(b"")
        return tmp_path / "train"

    return make


def test_labels_order_and_digest_do_not_change_between_versions(tmp_path):
    """A run is bound to them: `source` is the SHA-256 of lines `CLASS/NAME SIZE`."""
    sizes = {"bee/10.jpg": 3, "bee/9.JPEG": 4, "Ant/x.png": 5, "ant/\u00e9.webp": 6, "ant/a b.gif": 7}
    for name, size in {**sizes, "ant/list.txt": 1, ".hidden/1.jpg": 1, "ant/.1.jpg": 1}.items():
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    files = image_folder.list_files(tmp_path, ["train"])
    order = ["Ant/x.png", "ant/a b.gif", "ant/\u00e9.webp", "bee/10.jpg", "bee/9.JPEG"]
    assert files.paths == [tmp_path / "train" / name for name in order]
    assert files.classes == ["Ant", "ant", "bee"]
    assert files.labels.tolist() == [0, 1, 1, 2, 2]
    lines = "".join(f"{name} {sizes[name]}\n" for name in order)
    assert files.source == hashlib.sha256(lines.encode()).hexdigest()
    assert files.source == "41b21ef22ac4711de0293dd62940996dc95e14bdda51ad7af5cf2be102b2e32b"  # of commit 627560b


def test_training_and_prediction_read_the_same_images(make_files, tmp_path):
    make_files("../elsewhere/1.jpg", "../elsewhere/2.PNG")
    folder = make_files("ant/1.jpg", "ant/2.jpeg -> 1.jpg", "ant/.3.jpg", "ant/x.txt", "bee -> ../elsewhere")
    make_files("ant/.ipynb_checkpoints/1.jpg", ".git/1.jpg", "bee/loop -> ../train", "ant/self -> .")
    expected = [folder / name for name in ("ant/1.jpg", "ant/2.jpeg", "bee/1.jpg", "bee/2.PNG")]
    assert image_folder.list_files(tmp_path, ["train"]).paths == expected
    assert predict.images_in(folder) == (expected, [])


def test_folders_that_link_to_one_another_are_listed_once(make_files):
    """Each of ten folders links to each other one, so there are millions of ways through them."""
    names = [f"{i}/{i}.jpg" for i in range(10)]
    folder = make_files(*names, *(f"{i}/to{j} -> ../{j}" for i in range(10) for j in range(10)))
    listings = list(image_folder.walk(folder))
    assert len(listings) == 11
    assert sorted(image for listing in listings for image in listing.images) == [folder / name for name in names]


@pytest.fixture
def broken_links(make_files):
    """A class folder with one image and three links that lead nowhere. One is called an image."""
    return make_files("ant/1.jpg", "ant/notes -> nowhere", "ant/round -> round", "ant/2.jpg -> 2.jpg")


def test_broken_link_is_listed_as_unreadable_unless_it_is_called_an_image(broken_links):
    listing = image_folder.list_folder(broken_links / "ant")
    assert [path.name for path in listing.images] == ["1.jpg", "2.jpg"]
    assert [path.name for path in listing.unreadable] == ["notes", "round"]
    assert not listing.others


def test_prediction_reports_broken_links(broken_links):
    listing = image_folder.list_folder(broken_links / "ant")
    assert predict.images_in(broken_links) == (listing.images, list(listing.unreadable.values()))


def test_training_refuses_a_broken_link_that_is_called_an_image(broken_links, tmp_path):
    with pytest.raises(UserError, match="ant/2.jpg"):
        image_folder.list_files(tmp_path, ["train"])


@pytest.fixture
def forbid(monkeypatch):
    """`forbid(name)`: folders with this name cannot be listed.

    Permissions would not do, because root may list any folder.
    """
    scandir = os.scandir

    def make(name):
        def refused(path):
            if os.path.basename(path) == name:
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refused)

    return make


def test_unreadable_folder_inside_a_class_is_left_out(make_files, tmp_path, forbid):
    folder = make_files("ant/1.jpg", "ant/secret/1.jpg")
    forbid("secret")
    images, (message,) = predict.images_in(folder)
    assert images == [folder / "ant/1.jpg"]
    assert f"{folder}/ant/secret: Permission denied" in message
    assert len(image_folder.list_files(tmp_path, ["train"])) == 1


def test_unreadable_class_folder_is_refused(make_files, tmp_path, forbid):
    folder = make_files("ant/1.jpg")
    forbid("ant")
    with pytest.raises(UserError, match="/ant: Permission denied"):
        image_folder.list_files(tmp_path, ["train"])
    with pytest.raises(UserError, match="/ant: Permission denied"):
        predict.images_in(folder)


# ---- what is not read


def test_hidden_files_are_left_out_without_a_word(make_files, tmp_path, capsys):
    make_files("ant/1.jpg", "ant/2.jpg", "ant/._0.png", "ant/.DS_Store", "._ant/1.jpg", "bee/1.jpg", "bee/2.jpg")
    assert len(image_folder.list_files(tmp_path, ["train"])) == 4
    assert not capsys.readouterr().out


def test_other_files_are_counted(make_files, tmp_path, capsys):
    names = [f"bee/{i}.heic" for i in range(5)]
    folder = make_files("list.txt", "ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "bee/2.jpg", *names)
    image_folder.list_files(tmp_path, ["train"])
    line = capsys.readouterr().out
    assert line.startswith(f"note: not read in {folder}: 6 files ")
    assert "list.txt" in line


def test_each_kind_of_files_not_read_is_counted_by_itself(make_files, tmp_path, capsys):
    names = [f"dog/puppies/{i}.jpg" for i in range(10)]
    folder = make_files("dog/1.jpg", "dog/2.jpg", "cat/1.jpg", "cat/2.jpg", "dog/empty/list.txt", "stray.jpg", *names)
    make_files("dog/puppies/small/1.jpg", "dog/x.jpg/1.png", "cat/clip.mp4", "cat/loop -> ..", "cat/more -> ../dog")
    assert len(image_folder.list_files(tmp_path, ["train"])) == 4
    others, stray, nested = capsys.readouterr().out.splitlines()
    start = f"note: not read in {folder}: "
    assert others.startswith(f"{start}1 file ")
    assert "cat/clip.mp4" in others
    assert stray.startswith(f"{start}1 image ")
    assert "stray.jpg" in stray
    assert nested.startswith(f"{start}3 folders ")
    assert "12 images" in nested
    assert "dog/puppies" in nested
    assert len(predict.images_in(folder)[0]) == 4 + 1 + 12


def test_count_of_unread_images_ends_after_some_folders(make_files, tmp_path, capsys, monkeypatch):
    """A link may lead to a whole disk."""
    monkeypatch.setattr(image_folder, "COUNTED", 3)
    make_files("ant/1.jpg", "ant/2.jpg", "ant/disk -> ../../disk", *(f"../disk/{i}/1.jpg" for i in range(5)))
    assert len(image_folder.list_files(tmp_path, ["train"])) == 2
    line = capsys.readouterr().out
    assert " 2 images" in line
    assert "ant/disk" in line


# ---- classes


def test_single_class_is_noted(make_files, tmp_path, capsys):
    folder = make_files("ant/1.jpg", "ant/2.jpg")
    image_folder.list_files(tmp_path, ["train"])
    line = capsys.readouterr().out
    assert line.startswith(f"note: {folder} has only one class")
    assert "ant" in line


def test_class_with_a_single_image_is_noted(make_files, tmp_path, capsys):
    make_files("ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "cat/1.jpg")
    image_folder.list_files(tmp_path, ["train"])
    line = capsys.readouterr().out
    assert line.startswith("note: 2 ")
    assert "bee" in line


def test_class_whose_images_are_one_folder_deeper_is_refused(make_files, tmp_path):
    make_files("train/ant/1.jpg", "train/ant/2.jpg")
    with pytest.raises(UserError, match="train/train .*train/train/ant .* 2 "):
        image_folder.list_files(tmp_path, ["train"])


def test_folder_without_class_folders_is_refused(make_files, tmp_path):
    folder = make_files("1.jpg")
    with pytest.raises(UserError, match=f"{folder} .* 1 "):
        image_folder.list_files(tmp_path, ["train"])


@pytest.mark.parametrize("target", [".", "..", "../train", "ant"])
def test_class_that_is_a_link_to_another_or_back_is_refused(make_files, tmp_path, target):
    make_files("ant/1.jpg", "1.jpg", "../2.jpg", f"bee -> {target}")
    with pytest.raises(UserError, match="train/bee .*link"):
        image_folder.list_files(tmp_path, ["train"])


# ---- names of classes


def test_one_name_in_two_unicode_forms_is_refused_within_a_split(make_files, tmp_path):
    make_files(f"{NFC}/1.jpg", f"{NFD}/1.jpg")
    with pytest.raises(UserError, match="train has a class in two folders") as caught:
        image_folder.list_files(tmp_path, ["train"])
    message = str(caught.value)
    assert message.isascii()
    assert ascii(NFC) in message
    assert ascii(NFD) in message


def test_names_that_look_alike_are_noted_within_a_split(make_files, tmp_path, capsys):
    make_files("cat/1.jpg", "cat/2.jpg", "cat /1.jpg", "cat /2.jpg")
    assert image_folder.list_files(tmp_path, ["train"]).classes == ["cat", "cat "]
    line = capsys.readouterr().out
    assert "'cat'" in line
    assert "'cat '" in line


def difference(classes, other_classes):
    """Return the message about the different classes of two splits."""
    with pytest.raises(UserError) as caught:
        class_names.check_same_classes("training", classes, "test", other_classes)
    return str(caught.value)


def test_one_name_in_two_unicode_forms_is_refused_in_two_splits():
    text = difference(["ant", NFC], ["ant", NFD])
    assert text.startswith(f"class {ascii(NFC)} of training and class {ascii(NFD)} of test")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dog", "dog "),
        ("dog", "d\u043eg"),  # Cyrillic
        ("dog", "d\u03bfg"),  # Greek
        ("dog", "dog\u200b"),  # zero width space
        ("hot dog", "hot\u00a0dog"),
        ("hot-dog", "hot\u2011dog"),
        (NFD, f"{NFC} "),
    ],
)
def test_names_that_look_alike_are_shown_escaped(one, other):
    text = difference(["ant", "bee", "cat", "cow", "zoo", one], ["ant", other])
    assert f"training: {ascii(one)}, bee, cat, ..." in text
    assert f"test: {ascii(other)}" in text
    assert text.isascii()


@pytest.mark.parametrize(("one", "other"), [("\u732b", "\u72ac"), ("x\u00b2", "x2")])
def test_other_names_are_shown_as_they_are(one, other):
    text = difference([one, "cat"], [other, "cat"])
    assert f"training: {one};" in text
    assert text.endswith(f"test: {other}")


def test_names_of_both_splits_are_not_shown():
    text = difference(["ant", "bee"], ["ant"])
    assert "training: bee" in text
    assert "ant" not in text


def test_classes_in_another_order_are_refused():
    assert "bee" not in difference(["ant", "bee"], ["bee", "ant"])


# ---- reading into memory


def read(root, split="train", **settings):
    return image_folder.read_images(image_folder.list_files(root, [split]), resize=False, **settings)


def test_small_images_of_one_size_are_read_into_memory(make_images):
    root = make_images("train", 4, [(32, 16)], suffixes=[".png", ".jpg", ".JPEG"])
    train = read(root)
    assert isinstance(train, Images)
    assert train.images.shape == (12, 3, 16, 32)
    assert train.classes == ["ant", "bee", "cat"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for i, path in enumerate(sorted((root / "train/bee").iterdir())):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert (train.images[4 + i].numpy() == pixels.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("sizes", [[(32, 32), (32, 28)], [(65, 65)], [(32, 80)]])
def test_large_or_uneven_images_stay_files(make_images, sizes):
    files = read(make_images("train", 3, sizes))
    assert isinstance(files, Files)
    assert len(files) == 9
    with pytest.raises(UserError, match=r"64 .*ant/0.jpg .*\d+x\d+.*--image_size"):
        image_folder.check_in_memory(files)


def test_subset_of_files_keeps_path_and_label_together(make_images):
    files = image_folder.list_files(make_images("train", 3, [(80, 80)]), ["train"])
    half = files.subset(torch.tensor([8, 1, 4]))
    assert [files.classes[label] for label in half.labels] == [path.parent.name for path in half.paths]
    assert half.source == files.source


def test_sides_that_are_not_multiples_of_4_are_refused(make_images):
    with pytest.raises(UserError, match="30x32 .* 4"):
        image_folder.check_in_memory(read(make_images("train", 1, [(30, 32)])))


# (width, height) of an image: the square that is cropped from it, as left, top, right and bottom.
SQUARES = {(64, 48): (8, 0, 56, 48), (31, 90): (0, 29.5, 31, 60.5), (32, 32): (0, 0, 32, 32)}


@pytest.fixture
def uneven(make_images):
    """A folder with images of three sizes, and their centres scaled to 32x32 pixels."""
    root = make_images("train", 3, list(SQUARES), suffixes=[".png"])
    expected = []
    for path in sorted(root.glob("train/*/*.png")):
        image = Image.open(path).convert("RGB")
        expected.append(np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, SQUARES[image.size])))
    return root, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2)


def test_images_of_any_size_are_resized_and_cropped_at_their_centre(uneven):
    root, expected = uneven
    images = datasets.load_images("folder", root, "train", image_size=32)
    assert torch.equal(images.images, expected)
    assert images.subset(torch.arange(4)).image_size == [32, 32]


def test_single_image_is_transformed_as_by_the_loader(uneven):
    root, expected = uneven
    augmentation = Augmentation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    images = datasets.load_images("folder", root, "train", image_size=32)
    ((x, _),) = loaders.make_loader(images, 9, augmentation, torch.device("cpu"))
    transform = augment.small_transform(augmentation, [32, 32])
    for path, of_loader in zip(sorted(root.glob("train/*/*.png")), x, strict=True):
        torch.testing.assert_close(transform(Image.open(path).convert("RGB")), of_loader)


def test_listed_images_of_any_size_are_transformed_as_imagenet(uneven):
    """They are scaled to 256/224 of the size first, then cropped."""
    root, expected = uneven
    augmentation = Augmentation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    files = datasets.list_files("folder", root, "train", image_size=32)
    assert files.image_size == files.subset(torch.arange(4)).image_size == [32, 32]
    ((x, _),) = loaders.make_loader(files, 9, augmentation, torch.device("cpu"))
    transform = augment.imagenet_transform(augmentation, False, 32)
    for path, of_loader in zip(sorted(root.glob("train/*/*.png")), x, strict=True):
        torch.testing.assert_close(transform(Image.open(path).convert("RGB")), of_loader)


# ---- the cache


class Cached:
    """A folder of 12 images, which is enough to be cached; `decodes` tells how it is read."""

    def __init__(self, root, monkeypatch):
        self.root = root
        self.cache = root / "train" / image_folder.CACHE
        self.opened = []
        open_image = image_folder.open_image
        monkeypatch.setattr(image_folder, "CACHED", 12)
        self.expected = read(root, cache=False)

        def counting(path, *use):
            self.opened.append(path)
            return open_image(path, *use)

        monkeypatch.setattr(image_folder, "open_image", counting)

    def decodes(self, **settings):
        """Read the folder, which must give the same images; return whether they were decoded."""
        self.opened.clear()
        split = read(self.root, **settings)
        assert torch.equal(split.images, self.expected.images)
        assert split.source == self.expected.source
        return len(self.opened) > 12  # 12 headers are read anyway to see whether the images are small


@pytest.fixture
def cached(make_images, monkeypatch):
    return Cached(make_images("train", 4, [(8, 12)]), monkeypatch)


def test_cache_saves_decoding(cached):
    assert cached.decodes()
    assert cached.cache.exists()
    assert not cached.decodes()


def test_cache_is_not_written_for_few_images(cached, monkeypatch):
    monkeypatch.setattr(image_folder, "CACHED", 13)
    assert cached.decodes()
    assert not cached.cache.exists()


def test_cache_can_be_switched_off(cached):
    assert cached.decodes(cache=False)
    assert not cached.cache.exists()
    assert cached.decodes()
    assert cached.decodes(cache=False)


def test_cache_of_other_files_is_ignored(cached):
    cached.decodes()
    os.utime(cached.root / "train/ant/0.jpg", (1, 1))
    assert cached.decodes()
    assert not cached.decodes()


def test_cache_of_resized_images_is_another(cached):
    cached.decodes()
    resized = datasets.load_images("folder", cached.root, "train", image_size=4)
    assert resized.image_size == [4, 4]
    assert cached.decodes()
    assert not cached.decodes()


DAMAGES = [
    lambda whole: b"",
    lambda whole: whole[:-100],
    lambda whole: whole[:500] + b"x" + whole[501:],
    lambda whole: whole.replace(b"uint8", b"object"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_ignored(cached, damage):
    cached.decodes()
    cached.cache.write_bytes(damage(cached.cache.read_bytes()))
    cached.decodes()
    assert not cached.decodes()


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": np.zeros((12, 3, 12, 8), np.int8)},
        {"images": np.zeros((11, 3, 12, 8), np.uint8)},
        {},
    ],
)
def test_cache_with_the_right_key_and_wrong_arrays_is_ignored(cached, arrays):
    files = image_folder.list_files(cached.root, ["train"])
    key = np.frombuffer(image_folder.fingerprint(files, image_folder.read_small), np.uint8)
    with cached.cache.open("wb") as file:
        np.savez(file, key=key, **arrays)
    assert cached.decodes()
    assert not cached.decodes()


def test_fingerprint_does_not_change_between_versions(tmp_path):
    """Caches are found by it. It is the SHA-256 of lines; the first names the reading function."""
    path = tmp_path / "ant/1.jpg"
    path.parent.mkdir()
    path.write_bytes(b"123")
    os.utime(path, ns=(5, 5))
    files = Files([path], torch.zeros(1), ["ant"], image_size=[8, 12])
    expected = hashlib.sha256(b"read_small [8, 12]\nant/1.jpg 3 5\n").digest()
    assert image_folder.fingerprint(files, image_folder.read_small) == expected


def test_cache_that_cannot_be_written_is_no_error(cached):
    cached.cache.mkdir()
    assert cached.decodes()
