"""Faults in folders of images: hidden files, links, loops, confusing names.

The same network is tested on each folder and classifies the images in it, so both commands have to
find the same images. The tests try one fault of each kind. `make test-faults` tries them all
(EVNAS_FAULTS=full) and prints a table of the outcomes.
"""

import contextlib
import io
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

import predict
import test_cifar

import faults
from faults import COUNTS, few
from helpers import retrained_run

counted = faults.counted
CLASSES = ["ant", "b\u00e9e", "cat"]  # of two images each


class Case(NamedTuple):
    """A fault, and what the two commands must do about it."""

    change: Callable[[Path], object]  # makes the fault in the folder `test`, which has the class folders
    tested: int | str  # number of images that test_cifar.py tests on, or a part of its error message
    not_read: int = 0  # number of images that it says it does not read
    predicted: int | None = None  # number of images that predict.py classifies (default: tested + not_read)
    skipped: int = 0  # number of files and folders that it says it skips


def image(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(path, "PNG")


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def several(*functions):
    return lambda test: [function(test) for function in functions]


def moved_away(test):
    shutil.move(test / "ant", test.parent / "elsewhere")
    link(test / "ant", "../elsewhere")


def linked_to_one_another(test):
    names = [f"{i}" for i in range(9)]
    for name in names:
        image(test / "cat" / name / "x.png")
        for other in names:
            link(test / "cat" / name / f"to-{other}", f"../{other}")


def without_class_folders(test):
    for name in CLASSES:
        shutil.rmtree(test / name)
    image(test / "1.png", test / "2.png")


def one_level_too_deep(test):
    (test / "deeper").mkdir()
    for name in CLASSES:
        (test / name).rename(test / "deeper" / name)


def without_images(test):
    shutil.rmtree(test / "ant")
    (test / "ant").mkdir()


def renamed(name, new):
    return lambda test: (test / name).rename(test / new)


NFD = unicodedata.normalize("NFD", CLASSES[1])
# One of each kind: `make test` tries these.
SHORT = [
    "hidden folder in a class",
    "class is a link",
    "nine folders linked to one another",
    "two classes are the same",
    "damaged image",
    "nested folder",
    "one level too deep",
    "Cyrillic letter",
]
CASES = {
    "files of macOS": Case(lambda test: image(test / "ant/._0.png", test / "ant/.DS_Store"), 6),
    "hidden folder in a class": Case(lambda test: image(test / "ant/.ipynb_checkpoints/0.png"), 6),
    "hidden folder next to classes": Case(lambda test: image(test / ".git/0.png", test / ".x.png"), 6),
    "class is a link": Case(moved_away, 6),
    "image is a link": Case(lambda test: link(test / "cat/5.png", "0.png"), 7),
    "class folder is linked in another": Case(lambda test: link(test / "cat/more", "../ant"), 6),
    "link to the split": Case(lambda test: link(test / "cat/loop", ".."), 6),
    "link to its own folder": Case(lambda test: link(test / "cat/loop", "."), 6),
    "link to itself": Case(lambda test: link(test / "cat/loop", "loop"), 6, skipped=1),
    "two links to each other": Case(
        several(lambda test: link(test / "x", "y"), lambda test: link(test / "y", "x")),
        "cannot read",
        predicted=6,
        skipped=2,
    ),
    "nine folders linked to one another": Case(linked_to_one_another, 6, not_read=9),
    "class links to the split": Case(lambda test: link(test / "all", "."), "/all", predicted=6),
    "class links to a folder above": Case(lambda test: link(test / "all", ".."), "/all", predicted=6),
    "two classes are the same": Case(lambda test: link(test / "kitty", "cat"), "/kitty", predicted=6),
    "class on a disk that is gone": Case(
        lambda test: link(test / "dog", "nowhere"), "cannot read", predicted=6, skipped=1
    ),
    "image on a disk that is gone": Case(
        lambda test: link(test / "cat/9.png", "nowhere"), "cannot read", predicted=6, skipped=1
    ),
    "damaged image": Case(lambda test: (test / "cat/0.png").write_bytes(b"no"), "cat/0.png", predicted=5, skipped=1),
    "pipe": Case(lambda test: os.mkfifo(test / "cat/9.png"), "cat/9.png", predicted=6, skipped=1),
    "nested folder": Case(lambda test: image(*(test / f"cat/a/{i}.png" for i in range(10))), 6, not_read=10),
    "nested folder with a name of an image": Case(lambda test: image(test / "cat/a.png/1.png"), 6, not_read=1),
    "300 folders deep": Case(lambda test: image(test / ("cat" + "/d" * 300) / "1.png"), 6, not_read=1),
    "images next to the classes": Case(lambda test: image(test / "1.png", test / "2.png"), 6, not_read=2),
    "other files": Case(lambda test: [(test / name).touch() for name in ("a.txt", "cat/a.heic")], 6),
    "no class folders": Case(without_class_folders, "2 images", predicted=2),
    "one level too deep": Case(one_level_too_deep, "2 images", predicted=6),
    "class without images": Case(without_images, "has no images", predicted=4),
    "one name in two forms": Case(lambda test: image(test / NFD / "1.png"), "Unicode form", predicted=7),
    "name in another form": Case(renamed(CLASSES[1], NFD), "Unicode form", predicted=6),
    "blank at the end": Case(renamed("cat", "cat "), "'cat '", predicted=6),
    "Cyrillic letter": Case(renamed("cat", "c\u0430t"), r"'c\u0430t'", predicted=6),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run directory of a retrained network."""
    folder = tmp_path_factory.mktemp("run") / "run"
    retrained_run(folder, "cifar", None, classes=CLASSES)
    return folder


def call(main, *argv):
    """Return (exit code, standard output, lines on standard error) of a script."""
    output = io.StringIO()
    errors = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main([str(word) for word in argv])
        except SystemExit as stopped:
            code = stopped.code
    return code, output.getvalue(), errors.getvalue().splitlines()


@pytest.mark.parametrize("name", few(CASES, SHORT))
def test_faulty_folder_is_read_alike_or_refused_in_one_line(tmp_path, run, name):
    case = CASES[name]
    weights = run / "weights/weights.pt"
    test = tmp_path / "data/test"
    for label in CLASSES:
        image(test / label / "0.png", test / label / "1.png")
    case.change(test)

    code, output, errors = call(test_cifar.main, "--dataset", "folder", "--data", test.parent, "--model_path", weights)
    not_read = [int(count) for count in re.findall(r"^note: not read .*?(\d+) images?\b", output, re.M)]
    if isinstance(case.tested, int):
        assert code == 0
        assert f" on {case.tested} images" in output.splitlines()[-1]
        assert sum(not_read) == case.not_read
        outcome = "read, with a note on what is not read" if case.not_read else "read"
    else:
        (line,) = errors
        assert code == 2
        assert line.startswith("error: ")
        assert case.tested in line
        assert len(line.replace(str(tmp_path), "").replace(str(run), "")) < 400
        outcome = "refused in one line"

    expected = case.tested + case.not_read if case.predicted is None else case.predicted
    code, output, errors = call(predict.main, run, "--json", test)
    assert Counter(line.split(":")[0] for line in errors) == Counter(skipped=case.skipped, error=int(case.skipped > 0))
    assert code == int(case.skipped > 0)
    assert len([json.loads(line)["classes"] for line in output.splitlines()]) == expected
    COUNTS["folder: test_cifar.py"][outcome] += 1
    COUNTS["folder: predict.py"]["the rest classified, exit 1" if case.skipped else "classified"] += 1
