"""Faults of a run's files and data, tried and counted: damaged, missing, edited, forged, of other versions, changed.

The tests try a few of each; `make test-faults` tries them all (EVNAS_FAULTS=full) and prints what came of them.
"""

import importlib
import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import genotype_files
import genotypes
import train
from support.files import UserError

import faults
from faults import COUNTS, FULL, checkpoint, outcome, quick_drawing, saved
from helpers import assert_same_run, load_checkpoint, train_line

counted, process, whole = faults.counted, faults.process, faults.whole


# ---- damaged checkpoints


def test_damaged_checkpoints_are_refused_and_the_previous_one_offered(whole, tmp_path):
    """Cut off, one bit flipped: refused with a line that offers the one before."""
    script, expected, _, _ = whole
    path, luck = tmp_path / "checkpoint.pt", random.Random(2)
    shutil.copy(expected / "checkpoint.prev.pt", tmp_path)
    content = (expected / "checkpoint.pt").read_bytes()
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
            with pytest.raises(UserError, match=rf"{path}: damaged.* mv .*checkpoint\.prev\.pt {path}"):
                load_checkpoint(path)
            COUNTS[f"checkpoint {how}"]["refused, the one before offered"] += 1
    shutil.move(tmp_path / "checkpoint.prev.pt", path)  # what the message says
    assert load_checkpoint(path)["completed"] == 2


# ---- other versions and missing files

WITHOUT_WEIGHTS = {"completed": 0, "bound": "{}", "history": "[]"}


@quick_drawing
def test_missing_files_are_named_or_made_again(whole, process, tmp_path):
    script, expected, _, _ = whole
    needed = {"args.json", "checkpoint.pt"} | ({"genotype.json"} if script == "train" else set())
    lost = {".lock", "log.txt", "checkpoint.prev.pt"}
    files = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    assert needed < {str(name) for name in files}
    for name in files if FULL else ["args.json", "checkpoint.pt", "history.jsonl", "genotype.json", "log.txt"]:
        run = Path(shutil.copytree(expected, tmp_path / "run", dirs_exist_ok=True))
        (run / name).unlink()
        result = outcome(importlib.import_module(script).main, "--resume", run, naming=run / name)
        assert ("refused" in result) == (str(name) in needed), name
        lasting = str(name) not in needed | lost and Path(name).parent.name not in ("runs", "population")
        assert (run / name).exists() or not lasting or Path(name).suffix == ".svg", name
        COUNTS["file of a run missing"][f"{result}, naming it" if str(name) in needed else "continued without it"] += 1


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("checkpoint.pt", lambda content: content.replace(b"checkpoint ", b"checkpoint 9", 1), "another version"),
        ("checkpoint.pt", lambda content: checkpoint(saved(WITHOUT_WEIGHTS)), "args.json"),
        ("checkpoint.pt", lambda content: checkpoint(saved([3])), "another version"),
        ("args.json", lambda content: content.replace(b'"momentum"', b'"moment"'), "another version"),
        ("args.json", lambda content: re.sub(rb'"init_channels": \d+,', b"", content), "args/init_channels"),
        (
            "args.json",
            lambda content: re.sub(rb'"cutout_length": \d+', b'"cutout_length": 9', content),
            "args/cutout_length is 9",
        ),
    ],
)
def test_runs_of_another_version_are_refused(whole, tmp_path, name, change, says, capfd):
    script, expected, _, _ = whole
    run = Path(shutil.copytree(expected, tmp_path / "run"))
    content = (run / name).read_bytes()
    (run / name).write_bytes(change(content))
    assert (run / name).read_bytes() != content
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(["--resume", str(run)])
    line = capfd.readouterr().err
    assert stopped.value.code == 2 and says in line and str(run) in line and line.count("\n") == 1, line
    COUNTS["run of another version"]["refused in one line, exit 2"] += 1


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


@quick_drawing
def test_edited_arguments_and_cells_are_refused_or_change_nothing(whole, tmp_path):
    """Each is refused before the run goes on, or changes nothing."""
    script, expected, _, _ = whole
    for i, (what, name, content) in enumerate(files_of_run_edited(expected, script)):
        if FULL or i % 9 == 0:
            run = unfinished(expected, tmp_path / f"{i}")
            (run / name).write_text(json.dumps(content))
            before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
            result = outcome(importlib.import_module(script).main, "--resume", run)
            if result == "accepted":
                assert_same_run(run, expected)
                result = "makes no difference, bit-identical"
            else:
                assert all(path.read_bytes() == content for path, content in before.items()), what
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


@quick_drawing
def test_forged_checkpoints_are_refused(whole, tmp_path):
    script, expected, _, _ = whole
    run = unfinished(expected, tmp_path)
    genuine = (run / "checkpoint.pt").read_bytes()
    state = load_checkpoint(run / "checkpoint.pt")
    state |= {name: json.dumps(state[name]) for name in ("bound", "history")}
    for i, (what, change) in enumerate(forgeries(script)):
        if FULL or i % 9 == 0:
            (run / "checkpoint.pt").write_bytes(checkpoint(saved(change(state))))
            result = outcome(importlib.import_module(script).main, "--resume", run, naming=run)
            assert result == "refused in one line, exit 2", what
            COUNTS["forged checkpoint with the right checksum"][result] += 1
    (run / "checkpoint.pt").write_bytes(genuine)
    assert outcome(importlib.import_module(script).main, "--resume", run) == "accepted"
    assert_same_run(run, expected)


# ---- changed data


def change_images(root, change):
    """What can happen to a folder of images between two starts of a run; the first difference that is then named."""
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


@quick_drawing
def test_changed_data_are_refused_and_moved_data_accepted(tmp_path, make_images, monkeypatch):
    make_images("train", 8, [(8, 8)], (".png",))
    images = make_images("test", 2, [(8, 8)], (".png",))
    monkeypatch.chdir(tmp_path)
    argv = train_line(dataset="folder", data=images.name, epochs=1, train_samples=20, dir="parent")
    train.main(argv)
    (run,) = (tmp_path / "parent").iterdir()
    changes = ["removed", "added", "renamed", "replaced"]
    for change in [*(f"an image {verb}" for verb in changes), "a class renamed", "all images resized"]:
        copy = Path(shutil.copytree(images, tmp_path / change))
        first = change_images(copy, change)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        result = outcome(train.main, "--resume", run, "--data", copy, naming=f"{run}: {first}")
        assert "refused" in result and all(path.read_bytes() == content for path, content in before.items())
        COUNTS["data changed since a run began"][f"{result}, naming the first difference"] += 1
    monkeypatch.chdir("parent")
    assert outcome(train.main, "--resume", run.name) == "accepted"
    images.rename(tmp_path / "moved")
    assert "refused" in outcome(train.main, "--resume", run.name, naming=f"data directory {images} does not exist")
    assert outcome(train.main, "--resume", run.name, "--data", "../moved") == "accepted"
    run.rename(tmp_path / "elsewhere")
    assert outcome(train.main, "--resume", "../elsewhere", "--data", "../moved") == "accepted"
    COUNTS["run continued from another folder, data moved, run moved"]["works"] += 3
