"""Faults of a run's files and data, tried and counted: damaged, missing, edited, forged, changed.

The tests try a few of each; `make test-faults` tries them all (EVNAS_FAULTS=full) and prints what came of them.
"""

import importlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import genotype_files
import genotypes
import train
from support.files import UserError

import faults
from faults import ARGUMENTS, COUNTS, FULL, SCRIPTS, checkpoint, outcome, saved
from helpers import assert_same_run, load_checkpoint, train_line

counted = faults.counted


@pytest.fixture(scope="module", autouse=True)
def drawings(request):
    if not FULL:
        request.getfixturevalue("quick_reports")


class Finished(NamedTuple):
    """A run of a script that was left alone."""

    script: str
    main: Callable
    run: Path  # its directory


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, tmp_path_factory):
    main = importlib.import_module(request.param).main
    folder = tmp_path_factory.mktemp("finished")
    main([*ARGUMENTS[request.param], "--dir", str(folder)])
    (run,) = folder.iterdir()
    return Finished(request.param, main, run)


def contents(run):
    """{path: content} of the files of a run."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


# ---- damaged checkpoints


def test_damaged_checkpoint_is_refused_and_the_previous_one_offered(finished, tmp_path):
    """Cut off, or with one bit flipped or one byte more."""
    path, luck = tmp_path / "checkpoint.pt", random.Random(2)
    shutil.copy(finished.run / "checkpoint.prev.pt", tmp_path)
    content = (finished.run / "checkpoint.pt").read_bytes()
    lengths = [0, 10, 18, 19, 60, 83, 84, 85, len(content) - 1]
    places = [0, 5, 18, 19, 40, 83, 84, 85, len(content) - 1]
    lengths += [luck.randrange(len(content)) for _ in range(25 - len(lengths))]
    places += [luck.randrange(len(content)) for _ in range(25 - len(places))]
    damaged = {"cut off": [content[:length] for length in lengths]}
    damaged["one bit flipped"] = [
        content[:i] + bytes([content[i] ^ 1 << luck.randrange(8)]) + content[i + 1 :] for i in places
    ]
    damaged["one byte more"] = [content + b"x"]
    for how, contents in damaged.items():
        for bad in contents:
            path.write_bytes(bad)
            with pytest.raises(UserError, match=rf"{path}: .* mv .*checkpoint\.prev\.pt {path}"):
                load_checkpoint(path)
            COUNTS[f"checkpoint {how}"]["refused, the one before offered"] += 1
    shutil.move(tmp_path / "checkpoint.prev.pt", path)  # what the message says
    assert load_checkpoint(path)["completed"] == 2


# ---- other versions and missing files

WITHOUT_WEIGHTS = {"completed": 0, "bound": "{}", "history": "[]"}


def missing_files(script, run):
    """(files that a run cannot do without, files that are made again, the rest)"""
    needed = {"args.json", "checkpoint.pt"} | ({"genotype.json"} if script == "train" else set())
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert needed < found
    lost = {name for name in found if name.endswith(".svg") or Path(name).parent.name in ("runs", "population")}
    lost |= {".lock", "log.txt", "checkpoint.prev.pt"} & found
    return sorted(needed), sorted(found - needed - lost), sorted(lost)


def test_missing_file_is_named_or_made_again(finished, tmp_path):
    needed, lasting, lost = missing_files(finished.script, finished.run)
    for name in [*needed, *(lasting + lost if FULL else ["history.jsonl", "log.txt"])]:
        run = Path(shutil.copytree(finished.run, tmp_path / "run", dirs_exist_ok=True))
        (run / name).unlink()
        result = outcome(finished.main, "--resume", run, naming=[run / name] if name in needed else [])
        if name in needed:
            assert result == "refused in one line, exit 2", name
            COUNTS["file of a run missing"][f"{result}, naming it"] += 1
        else:
            assert result == "accepted", name
            assert name in lost or (run / name).exists(), name
            COUNTS["file of a run missing"]["continued without it"] += 1


def without_channels(content):
    return re.sub(rb'"init_channels": \d+,', b"", content)


def with_other_cutout(content):
    return re.sub(rb'"cutout_length": \d+', b'"cutout_length": 9', content)


@pytest.mark.parametrize(
    "name, change, naming",
    [
        ("checkpoint.pt", lambda content: content.replace(b"checkpoint ", b"checkpoint 9", 1), "checkpoint.pt"),
        ("checkpoint.pt", lambda content: checkpoint(saved(WITHOUT_WEIGHTS)), "args.json"),
        ("checkpoint.pt", lambda content: checkpoint(saved([3])), "checkpoint.pt"),
        ("args.json", lambda content: content.replace(b'"momentum"', b'"moment"'), "--moment"),
        ("args.json", without_channels, "args/init_channels"),
        ("args.json", with_other_cutout, "args/cutout_length is 9"),
    ],
    ids=["another format", "other arguments", "not a dict", "unknown flag", "missing flag", "other value"],
)
def test_run_of_another_version_is_refused(finished, tmp_path, name, change, naming):
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    content = (run / name).read_bytes()
    (run / name).write_bytes(change(content))
    assert (run / name).read_bytes() != content
    result = outcome(finished.main, "--resume", run, naming=[run, naming])
    assert result == "refused in one line, exit 2"
    COUNTS["run of another version"][result] += 1


# ---- edited and forged files of a run


def unfinished(expected, folder):
    """A copy of a run that has its last generation or epoch before it."""
    run = Path(shutil.copytree(expected, folder / "run"))
    (run / "checkpoint.prev.pt").replace(run / "checkpoint.pt")
    return run


def files_of_run_edited(run, script):
    """(description, file name, changed content) of a run's args.json and genotype.json."""
    content, genotype = (json.loads((run / name).read_text()) for name in ("args.json", "genotype.json"))
    values = dict(
        epochs=[0, 2, 4, "many", None, math.inf, True, [3]], batch_size=[-1, 17], learning_rate=[-1, math.nan, 10**400],
        momentum=[2, 0.5], weight_decay=["", 0.1], grad_clip=[-1, 0, 1.0], init_channels=[0, 3, 10**6], layers=[10**6],
        seed=[-1, 19, 2**63], dataset=["mnist", "cifar10", {}], train_samples=[10**9, None], cutout=[1, "yes"],
        cutout_length=[0, 7], device=["toaster"], gpu=[-1], report_freq=[0, 2], data=["nowhere", [], "a\0b"],
        amp=["yes", True], compile=["yes"], resume=["elsewhere"], dir=["\ud800", 5], moment=[0.9], help=[True],
    )  # fmt: skip
    special = {
        "train_search": dict(bn=["junk", "running"], pop_size=[10**9], variant=["rand"], mutate_rate=[1.5], plain=[1]),
        "train": dict(arch=["EvNASA", "x"], drop_path_prob=[1], label_smooth=[0.3], auxiliary=[True], lr_scheduler=[3]),
    }
    for name, news in (values | special[script]).items():
        for new in news:
            yield f"{name} {new!r:.20}", "args.json", content | {"args": content["args"] | {name: new}}
    for name, news in dict(
        threads=[0, 2, "x"], prog=["x.py", []], args=[[], {}, None], kind=[3], versions=[[]]
    ).items():
        for new in news:
            yield f"{name} {new!r}", "args.json", content | {name: new}
    others = [genotype_files.to_dict(genotypes.EvNASA), genotype | {"normal": []}, {}, [], {"arch": "x"}]
    others.append(genotype | {"reduce_concat": genotype["reduce_concat"][:-1]})
    for i, new in enumerate(others):
        yield f"cell {i}", "genotype.json", new


def test_edited_argument_or_cell_is_refused_or_changes_nothing(finished, tmp_path):
    """Each is refused before the run goes on, or makes no difference."""
    for i, (what, name, content) in enumerate(files_of_run_edited(finished.run, finished.script)):
        if FULL or i % 9 == 0:
            run = unfinished(finished.run, tmp_path / f"{i}")
            (run / name).write_text(json.dumps(content))
            before = contents(run)
            result = outcome(finished.main, "--resume", run)
            if result == "accepted":
                assert_same_run(run, finished.run)
                result = "makes no difference, bit-identical"
            else:
                assert before.items() <= contents(run).items(), what
            COUNTS["args.json or genotype.json edited"][result] += 1


def forgeries(script):
    """(description, change of a checkpoint's content)"""
    zero = {"steps": 0, "sums": torch.zeros(3, dtype=torch.float64), "seconds": 0.0}
    values = {
        "completed": [-1, 10**9, True, "2", None],
        "network": [{}, [], None],
        "optimizer": [{}, {"state": []}, {"state": {0: {}}}, {"state": {"x": {"momentum_buffer": torch.zeros(1)}}}],
        "generators": [{}, None, {"train": torch.zeros(7, dtype=torch.uint8)}, {"train": torch.zeros(5056)}],
        "partial": [None, 5, zero | {"more": 1}, zero | {"sums": torch.zeros(4)}, zero | {"seconds": "x"}],
        "bound": [5, "{", "[]", "[" * 100_000, json.dumps({"threads": 7}), json.dumps({"args": {"seed": "x"}})],
    }
    values["partial"] += [zero | {"steps": steps} for steps in (-2, 10**9, 1.5, "x", None)]
    if script == "train_search":
        genes = torch.zeros(4, 2, 14, 8)
        values["alphas"] = [genes[:3], genes.double(), genes - 1, genes + 1, genes * math.nan, genes.to_sparse(), None]
        values["fitness"] = [torch.zeros(3, dtype=torch.float64), torch.zeros(4), torch.full((4,), 101.0).double()]
        values["violation"] = [torch.zeros(3, dtype=torch.float64), torch.zeros(4), -torch.ones(4).double(), None]
        values["latency"] = [5, {"cell": "x"}, {"cell": -1.0}, {"cell": math.nan}]
        values["archive"] = [5, {"cell": genes[0] - 1}, {"cell": genes}, {"cell": genes[0].double()}, {"cell": 3}]
    else:
        values["best_top1"] = [None, "x", torch.zeros(())]
    for name, news in values.items():
        for new in news:
            yield f"{name} {new!r:.40}", lambda state, name=name, new=new: state | {name: new}

    def tensors(change):
        return lambda state: state | {"network": {name: change(value) for name, value in state["network"].items()}}

    yield "other shapes", tensors(lambda value: value.flatten()[:1])
    yield "complex weights", tensors(lambda value: value.to(torch.complex64))
    yield "8-bit weights", tensors(lambda value: value.to(torch.int8))
    yield "weights without values", tensors(lambda value: value.to("meta"))
    yield "sparse weights", tensors(lambda value: value.to_sparse())


def test_forged_checkpoint_is_refused(finished, tmp_path):
    run = unfinished(finished.run, tmp_path)
    genuine = (run / "checkpoint.pt").read_bytes()
    state = load_checkpoint(run / "checkpoint.pt")
    state |= {name: json.dumps(state[name]) for name in ("bound", "history")}
    for i, (what, change) in enumerate(forgeries(finished.script)):
        if FULL or i % 9 == 0:
            (run / "checkpoint.pt").write_bytes(checkpoint(saved(change(state))))
            result = outcome(finished.main, "--resume", run, naming=[run])
            assert result == "refused in one line, exit 2", what
            COUNTS["forged checkpoint with the right checksum"][result] += 1
    (run / "checkpoint.pt").write_bytes(genuine)
    assert outcome(finished.main, "--resume", run) == "accepted"
    assert_same_run(run, finished.run)


# ---- changed data


def change_images(root, change):
    """Change the images between two starts of a run; return the difference that is named."""
    if change == "an image removed":
        (root / "train/bee/0.png").unlink()
        return "data/source/train is"
    if change == "an image added":
        shutil.copy(root / "test/cat/0.png", root / "test/cat/new.png")
        return "data/images/test is 7"
    if change == "an image renamed":
        (root / "train/bee/0.png").rename(root / "train/bee/00.png")
        return "data/source/train is"
    if change == "an image replaced":
        Image.new("RGB", (8, 8)).save(root / "train/bee/0.png")
        return "data/source/train is"
    if change == "a class renamed":
        for split in ("train", "test"):
            (root / split / "ant").rename(root / split / "zebra")
        return "data/classes/0 is 'bee'"
    for path in root.glob("*/*/*.png"):
        Image.open(path).resize((12, 12)).save(path)
    return "data/image_size/0 is 12"


@pytest.fixture
def images(make_images):
    """A folder of images to train and test on."""
    make_images("train", 8, [(8, 8)], (".png",))
    return make_images("test", 2, [(8, 8)], (".png",))


def retrained(images, folder):
    """The directory of a retraining on all images but four."""
    train.main(train_line(dataset="folder", data=images, epochs=1, layers=1, train_samples=20, dir=folder))
    (run,) = folder.iterdir()
    return run


def test_changed_data_are_refused_with_the_first_difference(tmp_path, images):
    run = retrained(images, tmp_path / "parent")
    before = contents(run)
    changes = ["removed", "added", "renamed", "replaced"]
    for change in [*(f"an image {verb}" for verb in changes), "a class renamed", "all images resized"]:
        copy = Path(shutil.copytree(images, tmp_path / change))
        first = change_images(copy, change)
        result = outcome(train.main, "--resume", run, "--data", copy, naming=[f"{run}: {first}"])
        assert result == "refused in one line, exit 2", change
        assert contents(run) == before, change
        COUNTS["data changed since a run began"][f"{result}, naming the first difference"] += 1


def test_run_continues_from_elsewhere_and_with_its_data_and_itself_moved(tmp_path, images, monkeypatch):
    """The folder of images was named relative to where the run was started."""
    monkeypatch.chdir(tmp_path)
    run = retrained(images.name, tmp_path / "parent")
    monkeypatch.chdir("parent")
    assert outcome(train.main, "--resume", run.name) == "accepted"
    images.rename(tmp_path / "moved")
    missing = outcome(train.main, "--resume", run.name, naming=[images])
    assert missing == "refused in one line, exit 2"
    assert outcome(train.main, "--resume", run.name, "--data", "../moved") == "accepted"
    run.rename(tmp_path / "elsewhere")
    assert outcome(train.main, "--resume", "../elsewhere", "--data", "../moved") == "accepted"
    COUNTS["run continued from another folder, data moved, run moved"]["works"] += 3
