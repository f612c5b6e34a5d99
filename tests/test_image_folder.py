"""Which files of a folder are images, and which folders are classes."""

import hashlib
import os
import unicodedata

import pytest

import data
import image_folder
import predict
from support.files import UserError

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.fixture
def make_files(tmp_path):
    """`make_files("a/1.jpg", "b -> ../a")` makes empty files and links in tmp_path/train; returns that."""

    def make(*names):
        for name in names:
            path, _, target = name.partition(" -> ")
            path = tmp_path / "train" / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target) if target else path.write_bytes(b"")
        return tmp_path / "train"

    return make


def test_labels_order_and_digest_of_an_ordinary_folder_do_not_change(tmp_path):
    """A run is bound to them: `source` is the SHA-256 of lines `CLASS/NAME SIZE`."""
    sizes = {"bee/10.jpg": 3, "bee/9.JPEG": 4, "Ant/x.png": 5, "ant/\u00e9.webp": 6, "ant/a b.gif": 7}
    for name, size in {**sizes, "ant/list.txt": 1, ".hidden/1.jpg": 1, "ant/.1.jpg": 1}.items():
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    files = data.scan_folder(tmp_path, "train")
    order = ["Ant/x.png", "ant/a b.gif", "ant/\u00e9.webp", "bee/10.jpg", "bee/9.JPEG"]
    assert files.paths == [tmp_path / "train" / name for name in order]
    assert files.classes == ["Ant", "ant", "bee"] and files.labels.tolist() == [0, 1, 1, 2, 2]
    lines = "".join(f"{name} {sizes[name]}\n" for name in order)
    assert files.source == hashlib.sha256(lines.encode()).hexdigest()
    assert files.source == "41b21ef22ac4711de0293dd62940996dc95e14bdda51ad7af5cf2be102b2e32b"  # of commit 627560b


def test_training_and_prediction_read_the_same_images(make_files, tmp_path):
    make_files("../elsewhere/1.jpg", "../elsewhere/2.PNG")
    folder = make_files("ant/1.jpg", "ant/2.jpeg -> 1.jpg", "ant/.3.jpg", "ant/x.txt", "bee -> ../elsewhere")
    make_files("ant/.ipynb_checkpoints/1.jpg", ".git/1.jpg", "bee/loop -> ../train", "ant/self -> .")
    expected = [folder / name for name in ("ant/1.jpg", "ant/2.jpeg", "bee/1.jpg", "bee/2.PNG")]
    assert data.scan_folder(tmp_path, "train").paths == expected
    assert predict.images_in(folder) == (expected, [])


def test_folders_that_link_to_one_another_are_listed_once(make_files):
    """Each of ten folders has a link to each other one: there are millions of ways through them."""
    names = [f"{i}/{i}.jpg" for i in range(10)]
    folder = make_files(*names, *(f"{i}/to{j} -> ../{j}" for i in range(10) for j in range(10)))
    listings = list(image_folder.walk(folder))
    assert len(listings) == 11
    assert sorted(image for listing in listings for image in listing.images) == [folder / name for name in names]


def test_links_that_lead_nowhere(make_files, tmp_path):
    folder = make_files("ant/1.jpg", "ant/notes -> nowhere", "ant/round -> round", "ant/2.jpg -> 2.jpg")
    listing = image_folder.list_folder(folder / "ant")
    assert [path.name for path in listing.images] == ["1.jpg", "2.jpg"] and not listing.others
    assert [path.name for path in listing.unreadable] == ["notes", "round"]
    images, unreadable = predict.images_in(folder)
    assert images == listing.images and unreadable == list(listing.unreadable.values())
    with pytest.raises(UserError, match="cannot read .*ant/2.jpg: .*Restore or remove it"):
        data.scan_folder(tmp_path, "train")


def test_a_folder_that_cannot_be_read(make_files, tmp_path, monkeypatch):
    folder = make_files("ant/1.jpg", "ant/secret/1.jpg")
    scandir = os.scandir

    def refused(path):
        if os.path.basename(path) == name:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    name = "secret"
    images, (message,) = predict.images_in(folder)
    assert images == [folder / "ant/1.jpg"] and f"cannot read {folder}/ant/secret: Permission denied" in message
    assert len(data.scan_folder(tmp_path, "train")) == 1
    name = "ant"
    with pytest.raises(UserError, match="cannot read .*/ant: Permission denied"):
        data.scan_folder(tmp_path, "train")
    with pytest.raises(UserError, match="has no images: cannot read .*/ant: Permission denied"):
        predict.images_in(folder)


def test_what_is_not_read_is_counted(make_files, tmp_path, capsys):
    """Each line says what it is: a folder is not called a file, nor an image a file that is none."""
    names = [f"dog/puppies/{i}.jpg" for i in range(10)]
    folder = make_files("dog/1.jpg", "dog/2.jpg", "cat/1.jpg", "cat/2.jpg", "dog/empty/list.txt", "beside.jpg", *names)
    make_files("dog/puppies/small/1.jpg", "dog/x.jpg/1.png", "cat/clip.mp4", "cat/loop -> ..", "cat/more -> ../dog")
    assert len(data.scan_folder(tmp_path, "train")) == 4
    others, beside, nested = capsys.readouterr().out.splitlines()
    start = f"note: not read in {folder}: "
    assert others.startswith(f"{start}1 file without ") and others.endswith("such as cat/clip.mp4")
    assert beside.startswith(f"{start}1 image beside the class folders, such as beside.jpg.")
    assert nested.startswith(f"{start}3 folders inside class folders, with 12 images, such as dog/puppies.")
    assert len(predict.images_in(folder)[0]) == 4 + 1 + 12


def test_the_count_of_what_is_not_read_ends(make_files, tmp_path, capsys, monkeypatch):
    """Behind a link there may be a whole disk."""
    monkeypatch.setattr(image_folder, "COUNTED", 3)
    make_files("ant/1.jpg", "ant/2.jpg", "ant/disk -> ../../disk", *(f"../disk/{i}/1.jpg" for i in range(5)))
    assert len(data.scan_folder(tmp_path, "train")) == 2
    assert "1 folder inside class folders, with at least 2 images, such as ant/disk" in capsys.readouterr().out


def test_images_that_are_not_where_a_class_has_them(make_files, tmp_path):
    make_files("train/ant/1.jpg", "train/ant/2.jpg")
    with pytest.raises(UserError, match="train/train has no images .*train/train/ant has 2 images"):
        data.scan_folder(tmp_path, "train")
    folder = make_files("1.jpg")
    (folder / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="train has no class folders, only 1 image"):
        data.scan_folder(tmp_path, "train")


@pytest.mark.parametrize("target", [".", "..", "../train", "ant"])
def test_a_class_is_not_another_folder_again(make_files, tmp_path, target):
    make_files("ant/1.jpg", "1.jpg", "../2.jpg", f"bee -> {target}")
    with pytest.raises(UserError, match="train/bee .*remove .*link"):
        data.scan_folder(tmp_path, "train")


# ---- names of classes


def test_one_name_in_two_unicode_forms_within_a_split(make_files, tmp_path):
    make_files(f"{NFC}/1.jpg", f"{NFD}/1.jpg")
    with pytest.raises(UserError, match="Unicode form") as caught:
        data.scan_folder(tmp_path, "train")
    assert ascii(NFC) in str(caught.value) and ascii(NFD) in str(caught.value) and str(caught.value).isascii()


def test_names_that_look_alike_within_a_split_are_noted(make_files, tmp_path, capsys):
    make_files("cat/1.jpg", "cat/2.jpg", "cat /1.jpg", "cat /2.jpg")
    assert data.scan_folder(tmp_path, "train").classes == ["cat", "cat "]
    assert capsys.readouterr().out.endswith("look alike: 'cat' and 'cat '\n")


def difference(classes, other_classes):
    one, other = ({"classes": names, "image_size": [8, 8]} for names in (classes, other_classes))
    with pytest.raises(UserError) as caught:
        data.check_alike("training", one, "test", other)
    return str(caught.value)


def test_one_name_in_two_unicode_forms_in_two_splits():
    text = difference(["ant", NFC], ["ant", NFD])
    assert text.startswith(f"class {ascii(NFC)} of training and class {ascii(NFD)} of test") and "Unicode form" in text


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
    assert f"only in training: {ascii(one)}, bee, cat, .." in text and f"only in test: {ascii(other)}" in text
    assert text.isascii() and "look alike" in text


def test_names_that_do_not_look_alike_are_shown_as_they_are():
    assert difference(["\u732b", "cat"], ["\u72ac", "cat"]).endswith("only in training: \u732b; only in test: \u72ac")
    assert difference(["x\u00b2"], ["x2"]).endswith("only in training: x\u00b2; only in test: x2")
    assert difference(["ant", "bee"], ["ant"]).endswith("only in training: bee")
    assert difference(["ant", "bee"], ["bee", "ant"]).endswith("in their order")
