"""Faults of files, tried and counted: damaged, malformed, hostile, forged, missing, of other versions, oddly named.

The tests try a few of each; `make test-faults` tries them all (EVNAS_FAULTS=full) and prints what came of them.
"""

import argparse
import bz2
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_train
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_genotypes import Call, bomb
from test_resume import assert_same_run
from test_visualize import make_run

import data
import genotypes
import nas201.data
import test_cifar
import train
import train_search
import visualize
from nas201 import benchmark, imagenet16, summary
from nas201.genotypes import NUM_ARCHS, PRIMITIVES, to_arch_string
from reporting import report
from support import files, images, runs, weights
from support.files import UserError

import faults
from faults import COUNTS, FULL, few

quick_report = (lambda test: test) if FULL else pytest.mark.usefixtures("quick_report")
counted, process, whole = faults.counted, faults.process, faults.whole


def outcome(main, *argv, naming=""):
    """Refused (exit code 2 and one line, with `naming` in it) or accepted; anything else fails, as do 30 seconds."""
    errors = io.StringIO()
    alarm = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(30)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main([str(word) for word in argv])
        return "accepted"
    except SystemExit as stopped:
        text = errors.getvalue()
        assert stopped.code == 2 and text.startswith("error: ") and text.count("\n") == 1 and len(text) < 2000, text
        assert str(naming) in text, text
        return "refused in one line, exit 2"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)


# ---- damaged checkpoints


def test_damaged_checkpoints(whole, tmp_path):
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
            with pytest.raises(UserError, match=rf"{path} is damaged.* mv .*checkpoint\.prev\.pt {path}"):
                runs.load_checkpoint(path)
            COUNTS[f"checkpoint {how}"]["refused, the one before offered"] += 1
    shutil.move(tmp_path / "checkpoint.prev.pt", path)  # what the message says
    assert runs.load_checkpoint(path)["completed"] == 2


# ---- malformed text files

WORDS = st.none() | st.booleans() | st.integers(-2, 99) | st.floats() | st.text(max_size=5) | st.just(10**400)
VALUES = st.recursive(WORDS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=2))
PLACES = st.sampled_from([0.0, 1e-5, 1.0]) | st.floats(0, 1)
EDITS = st.lists(st.tuples(PLACES, st.integers(0, 30), st.binary(max_size=8)), min_size=1, max_size=3)


def edited(content, edits):
    """Bytes with some of them replaced by others."""
    for place, length, new in edits:
        start = int(place * len(content))
        content = content[:start] + new + content[start + length :]
    return content


def replaced(value, path, new):
    """A JSON value in which the one at `path` (shares of the lengths) is `new`."""
    if not path or not isinstance(value, (dict, list)) or not value:
        return new
    key = (list(value) if isinstance(value, dict) else range(len(value)))[int(path[0] * len(value))]
    value = value.copy()
    value[key] = replaced(value[key], path[1:], new)
    return value


def changed(content):
    """Strategy: the bytes edited, or, where they are JSON or lines of it, with a value replaced."""
    strategy = EDITS.map(lambda edits: edited(content, edits))
    try:
        values = [json.loads(line) for line in content.splitlines()]
    except ValueError:
        try:
            values = [json.loads(content)]
        except ValueError:
            return strategy

    def lines(change):
        return b"\n".join(json.dumps(value).encode() for value in replaced(values, *change)) + b"\n"

    # The first of the path chooses the line.
    paths = st.tuples(st.lists(st.floats(0, 0.999), min_size=1, max_size=5), VALUES)
    return strategy | paths.map(lines)


def read_split_main(argv):
    try:
        nas201.data.read_split(argv[0], ("train", "valid"), 50)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def valid_genotype(folder):
    genotypes.save(genotypes.EvNASA, folder / "genotype.json")
    return folder / "genotype.json", visualize.main, [folder / "genotype.json", "--output", folder]


def valid_table(folder):
    archs = [to_arch_string(ops) for ops in itertools.product(range(len(PRIMITIVES)), repeat=6)]
    lines = [f"{i},{arch},{i % 100}.5,90" for i, arch in enumerate(archs)]
    (folder / "t.csv").write_text("\n".join(["index,arch,cifar10_test_200,cifar10_valid_200", *lines]))
    return folder / "t.csv", benchmark.main, ["best", folder / "t.csv"]


def valid_split(folder):
    split = {"train": ["int", [str(i) for i in range(25)]], "valid": ["int", list(range(25, 50))]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder / "split.json", read_split_main, [folder / "split.json"]


def valid_history(folder):
    run = make_run(folder / "run", space="s2")
    return run / "history.jsonl", visualize.main, ["--report", run]


def valid_summary(name, folder):
    for seed in summary.SEEDS:
        run = make_run(folder / f"search-digits-seed{seed}", space="s2", steps=5, truth="cifar10 test")
        about = json.loads((run / "args.json").read_text())
        about["args"] |= {"init_channels": 4, "num_cells": 1, "pop_size": 6, "api_path": None}
        files.write_json(run / "args.json", about)
        tau = {"random architectures": {"architectures": 3, "fitness": 0.3, "parameters": 0.5}}
        worth = {"winner": {"fitness": 9.5}, "sentence": "better", "retrain": "train.py", "kendall_tau": tau}
        files.write_json(run / "baselines.json", worth)
        report.write_report(run)
    return folder / "search-digits-seed19" / name, summary.main, [folder, "digits"]


@pytest.mark.parametrize(
    "kind, valid",
    [
        ("genotype", valid_genotype),
        ("table", valid_table),
        ("split file", valid_split),
        ("history", valid_history),
        ("history of a table of three", partial(valid_summary, "history.jsonl")),
        ("arguments of a table of three", partial(valid_summary, "args.json")),
        ("baselines of a table of three", partial(valid_summary, "baselines.json")),
    ],
)
def test_malformed_files(tmp_path, kind, valid):
    path, main, argv = valid(tmp_path)
    assert outcome(main, *argv) == "accepted"

    @settings(derandomize=True, max_examples=few(40, 8), deadline=None, database=None)
    @given(changed(path.read_bytes()))
    def try_one(content):
        path.write_bytes(content)
        COUNTS[f"malformed {kind}"][outcome(main, *argv)] += 1

    try_one()
    assert COUNTS[f"malformed {kind}"]["refused in one line, exit 2"] > few(5, 0)


def test_malformed_arch_strings(tmp_path):
    good = to_arch_string((0, 1, 2, 3, 4, 0)).encode()

    @settings(derandomize=True, max_examples=few(40, 8), deadline=None, database=None)
    @given(EDITS.map(lambda edits: "|" + edited(good, edits).decode("latin-1")))
    def try_one(text):
        COUNTS["malformed arch string"][outcome(visualize.main, text, "--output", tmp_path)] += 1

    try_one()
    assert COUNTS["malformed arch string"]["refused in one line, exit 2"] > few(20, 0)


# ---- hostile files

HUGE = 300 << 20  # bytes that the bombs unpack to
READERS = {
    "genotype.pickle": genotypes.load,
    "weights.pt": lambda path: weights.load_weights(torch.nn.Linear(3, 2), path),
    "checkpoint.pt": runs.load_checkpoint,
    "table.pth": benchmark.load,
    "meta.pickle.pbz2": lambda path: benchmark.load(path.parent),
    "000001.pickle.pbz2": lambda path: benchmark.load(path.parent).accuracy(1, "cifar10", "test"),
    "001.npz": lambda path: report.operation_shares(path, report.SPACES["s1"]),
    "val_data": lambda path: imagenet16._read_batch(path.parent, path.name),
}


def saved(value, zipped=True):
    content = io.BytesIO()
    torch.save(value, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


def rezipped(content, change=lambda name, data: (name, data), method=zipfile.ZIP_STORED):
    """A zip file with every member changed."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(output, "w", method, compresslevel=1) as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return output.getvalue()


def checkpoint(content):
    return runs.MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def npz(**arrays):
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def hostile_files(canary):
    """(description, file name, content)"""
    system, evaluate = Call(os.system, f"touch {canary}"), Call(eval, f"open({str(canary)!r}, 'w').close()")
    archs = [to_arch_string(ops) for ops in itertools.product(range(len(PRIMITIVES)), repeat=6)]
    meta = bz2.compress(pickle.dumps({"meta_archs": archs, "total_archs": NUM_ARCHS}), 1)
    zeros = np.zeros(HUGE, np.uint8)
    huge = rezipped(saved({"weight": torch.zeros(HUGE // 4)}), method=zipfile.ZIP_DEFLATED)
    million = saved({"weight": torch.zeros(123457), "bias": torch.zeros(2)})
    number, terabytes = struct.pack("<i", 123457), b"\x8a\x06" + (2**40).to_bytes(6, "little")
    claimed = rezipped(million, lambda name, data: (name, data.replace(b"J" + number, terabytes)))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2, 14, 8)})
    claims = rezipped(npz(alphas=np.zeros(1)), lambda name, data: (name, header.getvalue()))
    yield "calls os.system", "genotype.pickle", pickle.dumps(system)
    yield (
        "calls eval inside a cell",
        "genotype.pickle",
        pickle.dumps(genotypes.EvNASA._replace(normal=[evaluate] * 8), 2),
    )
    yield "reaches for builtins", "genotype.pickle", b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93."
    yield "claims a terabyte", "genotype.pickle", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"."
    yield "a million tuples deep", "genotype.pickle", b"\x80\x02N" + b"\x85" * 1_000_000 + b"."
    yield "2^60 references", "genotype.pickle", pickle.dumps(genotypes.EvNASA._replace(normal=bomb()), 3)
    yield "persistent id", "genotype.pickle", b"\x80\x02Pid\n."
    for zipped in (True, False):
        yield f"calls os.system, zip {zipped}", "weights.pt", saved({"weight": system}, zipped)
        yield f"calls eval, zip {zipped}", "table.pth", saved({"meta_archs": archs, "arch2infos": evaluate}, zipped)
    yield "another class", "weights.pt", saved({"weight": argparse.Namespace(a=1)})
    yield (
        "a shape without memory",
        "weights.pt",
        saved({"weight": torch.zeros(1).expand(2**40), "bias": torch.zeros(2)}),
    )
    yield "claims terabytes", "weights.pt", claimed
    yield "a zip bomb", "weights.pt", huge
    yield "names outside", "weights.pt", rezipped(million, lambda name, data: (f"../../{name}", data))
    yield (
        "a million tuples deep",
        "weights.pt",
        rezipped(
            million,
            lambda name, data: (name, b"\x80\x02N" + b"\x85" * 1_000_000 + b"." if "data.pkl" in name else data),
        ),
    )
    yield "calls os.system, right checksum", "checkpoint.pt", checkpoint(saved({"completed": system}))
    yield "a zip bomb, right checksum", "checkpoint.pt", checkpoint(huge)
    yield "not a dict, right checksum", "checkpoint.pt", checkpoint(saved([1]))
    yield "calls os.system", "meta.pickle.pbz2", bz2.compress(pickle.dumps(system))
    yield "unpacks to gigabytes", "meta.pickle.pbz2", bz2.compress(bytes(16 << 20), 1) * 100
    yield "calls eval", "000001.pickle.pbz2", (meta, bz2.compress(pickle.dumps({"200": evaluate})))
    yield (
        "claims a terabyte",
        "000001.pickle.pbz2",
        (meta, bz2.compress(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".")),
    )
    yield "pickles inside", "001.npz", npz(alphas=np.array([system], object))
    yield "a zip bomb", "001.npz", npz(alphas=zeros)
    yield "claims terabytes", "001.npz", claims
    yield "calls os.system", "val_data", pickle.dumps({"data": system, "labels": [1]}, 2)


def main(argv):
    """Reads every hostile file below a folder in a process of its own; writes what came of it."""
    folder, outcomes, before = Path(argv[0]), [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in sorted(path for path in folder.glob("*/*") if path.parent.name.endswith(path.name)):
        imagenet16.MD5[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
        try:
            READERS[path.name](path)
            result = "loaded"
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024  # MiB, since the first file
        outcomes.append([path.parent.name, result, grown])
        (folder / "outcomes.json").write_text(json.dumps(outcomes))


def test_hostile_files(process, tmp_path):
    count = 0
    for count, (what, name, content) in enumerate(hostile_files(tmp_path / "executed"), 1):
        place = tmp_path / f"{count:02d} {what}, {name}"
        place.mkdir()
        if isinstance(content, tuple):
            (place / "meta.pickle.pbz2").write_bytes(content[0])
            content = content[1]
        (place / name).write_bytes(content)
    assert count >= 20
    reading = process("test_fault_files", [tmp_path], tmp_path / "output", memory=8 << 30)
    reading.join(120)
    assert reading.exitcode == 0, (reading.exitcode, (tmp_path / "output").read_text())
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    bad = [line for line in outcomes if not line[1].startswith("UserError: ") or "\n" in line[1] or line[2] > 250]
    assert not bad and len(outcomes) == count, bad
    assert not list(tmp_path.rglob("executed")) and not list(tmp_path.parent.glob("archive"))
    COUNTS["hostile file"]["refused, nothing executed, less than 250 MiB"] += count


# ---- images


def image_files():
    """The bytes of a small image in each allowed format, in its modes, compressions and with metadata."""
    pixels = np.random.RandomState(0).randint(0, 256, (16, 24, 3)).astype(np.uint8)
    color = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    deep, grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), color.convert("L")
    alpha, palette = color.convert("RGBA"), color.convert("P")
    yield from [("JPEG", color, dict(exif=exif)), ("JPEG", grey, dict(progressive=True))]
    yield from [("JPEG", color.convert("CMYK"), {}), ("MPO", color, dict(save_all=True, append_images=[color]))]
    yield from [("PNG", color, dict(exif=exif)), ("PNG", deep, {}), ("PNG", alpha, {}), ("PNG", grey.convert("LA"), {})]
    yield from [
        ("PNG", palette, dict(transparency=b"\0\1\2")),
        ("PNG", color, dict(save_all=True, append_images=[grey])),
    ]
    yield from [("BMP", color, {}), ("BMP", palette, {}), ("BMP", grey.convert("1"), {}), ("BMP", alpha, {})]
    yield from [("WEBP", color, dict(exif=exif)), ("WEBP", alpha, dict(lossless=True))]
    yield from [("WEBP", color, dict(save_all=True, append_images=[grey])), ("PPM", grey, {}), ("PPM", color, {})]
    yield from [("PPM", deep.convert("I"), {}), ("PPM", grey.convert("1"), {}), ("PPM", grey.convert("F"), {})]
    yield from [("TIFF", color, dict(compression=name)) for name in (None, "tiff_lzw", "jpeg", "packbits", "zlib")]
    yield from [("TIFF", color, dict(exif=exif)), ("TIFF", deep, {}), ("TIFF", grey.convert("F"), {})]
    yield from [("TIFF", grey.convert("1"), dict(compression="group4")), ("TIFF", palette, {}), ("TIFF", alpha, {})]
    yield from [("GIF", palette, dict(transparency=3)), ("GIF", color, dict(save_all=True, append_images=[grey] * 2))]


def mutated(content, other, luck):
    """Bytes as a broken disk, a lost connection or an enemy leaves them."""
    content = bytearray(content)
    for _ in range(luck.choice([1, 1, 2, 5])):
        early = luck.random() < 0.5  # headers say the most
        at = luck.randrange(min(len(content), 64) if early else len(content)) if content else 0
        how = luck.randrange(6)
        if how == 0:
            content[at : at + 1] = bytes([luck.randrange(256)])
        elif how == 1:
            size = luck.choice([1, 2, 4])
            content[at : at + size] = luck.choice([b"\0", b"\xff", b"\x7f\xff", b"\0\1", b"\1\0", b"\x80\0"])[:1] * size
        elif how == 2:
            del content[at : at + luck.choice([1, 2, 4, 100, 10_000])]
        elif how == 3:
            content[at:at] = luck.randbytes(luck.choice([1, 2, 4, 30]))
        elif how == 4:
            length, start = luck.choice([4, 20, 200]), luck.randrange(len(other))
            content[at : at + length] = other[start : start + length]
        else:
            content[at : at + 4] = struct.pack(
                luck.choice("<>") + "I", luck.choice([0, 1, 16, 65535, 65536, 2**31 - 1])
            )
    return bytes(content)


def with_checksums(png):
    """The chunks of a PNG file with right checksums, so that a reader goes on to what they hold."""
    content, at = bytearray(png), 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        content[end : end + 4] = zlib.crc32(content[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(content)


@pytest.mark.filterwarnings("ignore::Warning")
def test_mutated_images(tmp_path, capfd):
    """An image, or a UserError that names the file; any other exception of Pillow fails."""
    luck, contents = random.Random(12), []
    for format, image, how in image_files():
        content = io.BytesIO()
        image.save(content, format, **how)
        contents.append((format, content.getvalue()))
    path, count = tmp_path / "x.jpg", few(20_000, 300)
    for i in range(count):
        format, content = contents[i % len(contents)]
        content = mutated(content, luck.choice(contents)[1], luck)
        path.write_bytes(with_checksums(content) if format == "PNG" and i % 2 else content)
        try:
            image = data.open_image(path)
            assert image.mode == "RGB"
            COUNTS[f"mutated image, {format}"]["read"] += 1
        except UserError as error:
            assert str(path) in str(error)
            COUNTS[f"mutated image, {format}"]["refused by name"] += 1
    capfd.readouterr()  # libtiff's own messages
    for suffix in images.FORMATS:
        assert len(COUNTS[f"mutated image, {suffix}"]) == 2


# ---- other versions and missing files


@quick_report
def test_missing_files(whole, process, tmp_path):
    script, expected, _, _ = whole
    needed = {"args.json", "checkpoint.pt", "history.jsonl"} | ({"genotype.json"} if script == "train" else set())
    files = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    assert needed < {str(name) for name in files}
    for name in files if FULL else ["args.json", "checkpoint.pt", "history.jsonl", "genotype.json", "log.txt"]:
        run = Path(shutil.copytree(expected, tmp_path / "run", dirs_exist_ok=True))
        (run / name).unlink()
        result = outcome(importlib.import_module(script).main, "--resume", run, naming=run / name)
        assert ("refused" in result) == (str(name) in needed), name
        COUNTS["file of a run missing"][f"{result}, naming it" if str(name) in needed else "continued without it"] += 1


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("checkpoint.pt", lambda content: content.replace(b"checkpoint ", b"checkpoint 9", 1), "another version"),
        ("checkpoint.pt", lambda content: checkpoint(saved({"completed": 3})), "does not fit"),
        ("checkpoint.pt", lambda content: checkpoint(saved([3])), "another version"),
        ("args.json", lambda content: content.replace(b'"momentum"', b'"moment"'), "another version"),
        ("args.json", lambda content: re.sub(rb'"init_channels": \d+,', b"", content), "in its checkpoint, but"),
        ("args.json", lambda content: re.sub(rb'"cutout_length": \d+', b'"cutout_length": 9', content), "but 9 now"),
    ],
)
def test_runs_of_another_version(whole, tmp_path, name, change, says, capfd):
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
    others = [genotypes.to_dict(genotypes.EvNASA), genotype | {"normal": []}, {}, [], {"arch": "x"}]
    others.append(genotype | {"reduce_concat": genotype["reduce_concat"][:-1]})
    for i, new in enumerate(others):
        yield f"cell {i}", "genotype.json", new


@quick_report
def test_edited_arguments_and_cells(whole, tmp_path):
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


@quick_report
def test_forged_checkpoints(whole, tmp_path):
    script, expected, _, _ = whole
    run = unfinished(expected, tmp_path)
    genuine = (run / "checkpoint.pt").read_bytes()
    state = runs.load_checkpoint(run / "checkpoint.pt")
    state["bound"] = json.dumps(state["bound"])
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
        return "data/images/test is 6 in its checkpoint, but 7 now"
    if change == "an image renamed":
        (root / "train/bee/0.png").rename(root / "train/bee/00.png")
        return "data/source/train is"
    if change == "an image replaced":
        Image.new("RGB", (8, 8)).save(root / "train/bee/0.png")
        return "data/source/train is"
    if change == "a class renamed":
        for split in ("train", "test"):
            (root / split / "ant").rename(root / split / "zebra")
        return "data/classes/0 is 'ant' in its checkpoint, but 'bee' now"
    for path in root.glob("*/*/*.png"):
        Image.open(path).resize((12, 12)).save(path)
    return "data/image_size/0 is 8 in its checkpoint, but 12 now"


@quick_report
def test_changed_and_moved_data(tmp_path, make_images, monkeypatch):
    make_images("train", 8, [(8, 8)], (".png",))
    images = make_images("test", 2, [(8, 8)], (".png",))
    monkeypatch.chdir(tmp_path)
    argv = test_train.command_line(dataset="folder", data=images.name, epochs=1, train_samples=20, dir="parent")
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


# ---- names


NAMES = [os.fsdecode(b"\xff\xfe \xe9"), "na\u00efve \u9032\u5316", "a'b\"c $(touch x) --epochs 9\nd"]


@quick_report
@pytest.mark.parametrize("name", few(NAMES, ["".join(NAMES)]))
def test_names_of_all_kinds(make_images, tmp_path, monkeypatch, name):
    """Of the data, the classes and the run; on a terminal that knows ASCII alone."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    for split in ("train", "test"):
        images = make_images(split, 8, [(8, 8)], classes=("ant", name))
    root, place = images.rename(tmp_path / name), tmp_path / f"runs {name}"
    argv = ["--dataset", "folder", "--data", root, "--init_channels", 2, "--epochs", 1, "--batch_size", 4]
    search = [*argv, "--layers", 1, "--pop_size", 2, "--tsize", 2, "--dir", place, "--run_name", name]
    retrain = [*argv, "--layers", 1, "--dir", place / name, "--save", name]
    assert outcome(train_search.main, *search) == outcome(train.main, *retrain) == "accepted"
    (retrained,) = (place / name).glob("eval-*")
    assert outcome(test_cifar.main, "--dataset", "folder", "--data", root, "--dir", retrained) == "accepted"
    for main, run in ((train_search.main, place / name), (train.main, retrained)):
        assert outcome(main, "--resume", run) == outcome(visualize.main, "--report", run) == "accepted"
        for path in [run / "log.txt", run / "report.html", *run.glob("*.json"), *run.glob("weights/*.json")]:
            path.read_text(encoding="utf-8")
    assert not Path("x").exists()
    COUNTS["names that are not UTF-8, not ASCII, or shell code"]["searched, retrained, tested, resumed"] += 1
