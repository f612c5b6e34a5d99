"""Faults of files, tried and counted: malformed texts, hostile files, damaged images, odd names.

The tests try a few of each; `make test-faults` tries them all (EVNAS_FAULTS=full) and prints what came of them.
"""

import argparse
import bz2
import hashlib
import io
import itertools
import json
import lzma
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import genotype_files
import genotypes
import imagenet16
import nas201.data
import retrained
import test_cifar
import train
import train_search
import visualize
from nas201 import benchmark, summary
from nas201.genotypes import NUM_ARCHS, PRIMITIVES, to_arch_string
from reporting import cells, report
from support import files, images, weights
from support.files import UserError
from views import DARTS

import faults
from faults import COUNTS, FULL, ROOT, few, outcome, quick_report, saved
from helpers import Call, bomb, load_checkpoint, reported_run

counted = faults.counted


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
    genotype_files.save(genotypes.EvNASA, folder / "genotype.json")
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
    run = reported_run(folder / "run", space="s2")
    return run / "history.jsonl", visualize.main, ["--report", run]


def valid_summary(name, folder):
    for seed in summary.SEEDS:
        run = reported_run(folder / f"search-digits-seed{seed}", space="s2", steps=5, truth="cifar10 test")
        about = json.loads((run / "args.json").read_text())
        about["args"] |= {"init_channels": 4, "num_cells": 1, "pop_size": 6, "api_path": None}
        files.write_json(run / "args.json", about)
        tau = {"random architectures": {"architectures": 3, "fitness": 0.3, "parameters": 0.5}}
        worth = {"winner": {"fitness": 9.5}, "sentence": "better", "retrain": "train.py", "kendall_tau": tau}
        files.write_json(run / "baselines.json", worth)
        (run / "report.html").touch()  # a finished run has one
    return folder / "search-digits-seed19" / name, summary.main, [folder, "digits"]


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "kind, valid",
    [
        ("genotype", valid_genotype),
        ("table", valid_table),
        ("split file", valid_split),
        ("history", valid_history),
        slow("history of a table of three", partial(valid_summary, "history.jsonl")),
        slow("arguments of a table of three", partial(valid_summary, "args.json")),
        slow("baselines of a table of three", partial(valid_summary, "baselines.json")),
    ],
)
def test_malformed_file_is_read_or_refused_in_one_line(tmp_path, monkeypatch, kind, valid):
    if not FULL:
        monkeypatch.setattr(cells, "svg_of", lambda figure, title, description: title)  # made, but not drawn
    path, main, argv = valid(tmp_path)
    assert outcome(main, *argv) == "accepted"

    @settings(derandomize=True, max_examples=few(40, 8), deadline=None, database=None)
    @given(changed(path.read_bytes()))
    def try_one(content):
        path.write_bytes(content)
        COUNTS[f"malformed {kind}"][outcome(main, *argv)] += 1

    try_one()
    assert COUNTS[f"malformed {kind}"]["refused in one line, exit 2"] > few(5, 0)


def test_malformed_arch_string_is_drawn_or_refused_in_one_line(tmp_path):
    good = to_arch_string((0, 1, 2, 3, 4, 0)).encode()

    @settings(derandomize=True, max_examples=few(40, 8), deadline=None, database=None)
    @given(EDITS.map(lambda edits: "|" + edited(good, edits).decode("latin-1")))
    def try_one(text):
        COUNTS["malformed arch string"][outcome(visualize.main, text, "--output", tmp_path)] += 1

    try_one()
    assert COUNTS["malformed arch string"]["refused in one line, exit 2"] > few(20, 0)


# ---- hostile files

LIMIT = few(250, 80)  # MiB that the reading of all hostile files may take
HUGE = (LIMIT + 50) << 20  # bytes that the bombs unpack to
DEEP = few(1_000_000, 100_000)  # tuples in one another
READERS = {
    "genotype.pickle": genotype_files.load,
    "weights.pt": lambda path: weights.load_weights(torch.nn.Linear(3, 2), path),
    "weights.json": lambda path: retrained.load(path.with_name("weights.pt")),
    "checkpoint.pt": load_checkpoint,
    "table.pth": benchmark.load,
    "table.csv.xz": benchmark.load,
    "meta.pickle.pbz2": lambda path: benchmark.load(path.parent),
    "000001.pickle.pbz2": lambda path: benchmark.load(path.parent).accuracy(1, "cifar10", "test"),
    "001.npz": lambda path: report.operation_shares(path, DARTS),
    "val_data": lambda path: imagenet16.read_batch(path.parent, path.name),
}


def rezipped(content, change=lambda name, data: (name, data), method=zipfile.ZIP_STORED):
    """A zip file with every member changed."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(output, "w", method, compresslevel=1) as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return output.getvalue()


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
    deep = b"\x80\x02N" + b"\x85" * DEEP + b"."
    million = saved({"weight": torch.zeros(123457), "bias": torch.zeros(2)})
    number, terabytes = struct.pack("<i", 123457), b"\x8a\x06" + (2**40).to_bytes(6, "little")
    claimed = rezipped(million, lambda name, data: (name, data.replace(b"J" + number, terabytes)))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2, 14, 8)})
    claims = rezipped(npz(alphas=np.zeros(1)), lambda name, data: (name, header.getvalue()))
    yield "calls os.system", "genotype.pickle", pickle.dumps(system)
    inside = pickle.dumps(genotypes.EvNASA._replace(normal=[evaluate] * 8), 2)
    yield "calls eval inside a cell", "genotype.pickle", inside
    yield "reaches for builtins", "genotype.pickle", b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93."
    claim = b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"."
    yield "claims a terabyte", "genotype.pickle", claim
    yield f"{DEEP} tuples deep", "genotype.pickle", deep
    yield "2^60 references", "genotype.pickle", pickle.dumps(genotypes.EvNASA._replace(normal=bomb()), 3)
    yield "persistent id", "genotype.pickle", b"\x80\x02Pid\n."
    for zipped in (True, False):
        yield f"calls os.system, zip {zipped}", "weights.pt", saved({"weight": system}, zipped)
        yield f"calls eval, zip {zipped}", "table.pth", saved({"meta_archs": archs, "arch2infos": evaluate}, zipped)
    yield "another class", "weights.pt", saved({"weight": argparse.Namespace(a=1)})
    expanded = saved({"weight": torch.zeros(1).expand(2**40), "bias": torch.zeros(2)})
    yield "a shape without memory", "weights.pt", expanded
    yield "claims terabytes", "weights.pt", claimed
    yield "a zip bomb", "weights.pt", huge
    yield "names outside", "weights.pt", rezipped(million, lambda name, data: (f"../../{name}", data))
    nested = rezipped(million, lambda name, data: (name, deep if "data.pkl" in name else data))
    yield f"{DEEP} tuples deep", "weights.pt", nested
    yield "calls os.system, right checksum", "checkpoint.pt", faults.checkpoint(saved({"completed": system}))
    yield "a zip bomb, right checksum", "checkpoint.pt", faults.checkpoint(huge)
    yield "not a dict, right checksum", "checkpoint.pt", faults.checkpoint(saved([1]))
    yield "calls os.system", "meta.pickle.pbz2", bz2.compress(pickle.dumps(system))
    yield "unpacks to gigabytes", "meta.pickle.pbz2", bz2.compress(bytes(16 << 20), 1) * 100
    yield "calls eval", "000001.pickle.pbz2", (meta, bz2.compress(pickle.dumps({"200": evaluate})))
    yield "claims a terabyte", "000001.pickle.pbz2", (meta, bz2.compress(claim))
    for opcode in few([b"]", b"\x8f"], []):  # lists and sets, a byte each; they take seconds to count
        content = bz2.compress(b"\x80\x04" + opcode * (15 << 20) + b".")
        yield f"15 million objects {opcode}", "meta.pickle.pbz2", content
    yield "64 MB of empty lines", "table.csv.xz", lzma.compress(b"\n" * (64 << 20), preset=0)
    empty = b"index,arch,cifar10_test_200\n" + b"\n" * (15 << 20)
    yield "15 MB of empty lines", "table.csv.xz", lzma.compress(empty, preset=0)
    line = "\U0001f600".encode() + b"a" * (15 << 20)
    yield "one line of 15 MB", "table.csv.xz", lzma.compress(line, preset=0)
    yield "pickles inside", "001.npz", npz(alphas=np.array([system], object))
    yield "a zip bomb", "001.npz", npz(alphas=zeros)
    yield "claims terabytes", "001.npz", claims
    yield "calls os.system", "val_data", pickle.dumps({"data": system, "labels": [1]}, 2)


def read_all(folder):
    """Read every hostile file below a folder, in a process of its own; write what came of it."""
    outcomes = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 30),) * 2)
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


def assert_all_are_refused(folder, count):
    """A process that reads `count` files below a folder refuses each in one line, within LIMIT."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, __file__, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((folder / "outcomes.json").read_text())
    assert len(outcomes) == count
    for what, result, grown in outcomes:
        assert result.startswith("UserError: "), (what, result)
        assert "\n" not in result, (what, result)
        assert grown < LIMIT, what


def side_files():
    """Yield (description, what differs from the right side file of the network below)."""
    arch, far = to_arch_string([3] * 6), {"init_channels": 4, "layers": 200}
    yield "a million cells", {"layers": 999_999}
    yield "200 cells of NAS-Bench-201 in each stage", far | {"family": "nas201", "genotype": arch}
    yield "200 cells for ImageNet", far | {"family": "imagenet", "image_size": [32, 32]}
    yield "one cell more", {"layers": 4}
    yield "one cell fewer", {"layers": 2}
    yield "4,000 channels", {"init_channels": 4000}
    yield "a million channels", {"init_channels": 999_999}
    wide = {"init_channels": 4096, "family": "nas201", "genotype": arch, "layers": 1}
    yield "4,096 channels of NAS-Bench-201", wide
    yield "an odd number of channels", {"init_channels": 5, "family": "imagenet", "image_size": [32, 32]}
    yield "half a channel", {"init_channels": 0.5}
    yield "images of a million pixels a side", {"image_size": [999_996, 999_996]}
    yield "images without pixels", {"image_size": [0, 0]}
    yield "a hundred thousand classes", {"classes": [str(i) for i in range(100_000)]}
    yield "classes that are no names", {"classes": {"a": 1}}
    yield "another cell", {"genotype": genotype_files.to_dict(genotypes.AmoebaNet)}
    calls = genotype_files.to_dict(genotypes.EvNASA) | {"normal": [["__import__", 0]] * 8}
    yield "an operation that calls", {"genotype": calls}
    yield "an arch string that is none", {"genotype": "|" * 100_000, "family": "nas201"}
    yield "a mean that is no number", {"mean": [float("nan")] * 3}
    yield "lists 100,000 deep", "[" * 100_000
    yield "the checksum of other weights", {"sha256": "0" * 64}


def write_side_files(folder, first):
    """Write them, each next to weights, in folders numbered from `first`; return how many."""
    sizes = {"init_channels": 4, "layers": 3, "auxiliary": False}
    about = {"family": "cifar", "genotype": genotype_files.to_json(genotypes.EvNASB), "classes": ["a", "b", "c"]}
    about |= {"image_size": [16, 16], "resized": True, "mean": [0.5] * 3, "std": [0.2] * 3, **sizes}
    settings = retrained.NetworkSettings(genotypes.EvNASB, "cifar", 3, [16, 16], **sizes)
    network = retrained.make_network(settings)
    weights.save_weights(network, folder / "weights.pt", about)
    retrained.load(folder / "weights.pt")
    about, cases = json.loads((folder / "weights.json").read_text()), list(side_files())
    assert len(cases) == 20
    cases = few(cases, cases[::3])
    for number, (what, changed) in enumerate(cases, first):
        place = folder / f"{number:02d} {what}, weights.json"
        place.mkdir()
        (place / "weights.pt").symlink_to(folder / "weights.pt")
        content = json.dumps(about | changed) if isinstance(changed, dict) else changed
        (place / "weights.json").write_text(content)
    return len(cases)


@pytest.mark.slow
def test_hostile_files_are_refused_and_execute_nothing(tmp_path):
    for count, (what, name, content) in enumerate(hostile_files(tmp_path / "executed"), 1):
        place = tmp_path / f"{count:02d} {what}, {name}"
        place.mkdir()
        if isinstance(content, tuple):
            (place / "meta.pickle.pbz2").write_bytes(content[0])
            content = content[1]
        (place / name).write_bytes(content)
    assert count >= 20
    about_weights = write_side_files(tmp_path, count + 1)
    assert_all_are_refused(tmp_path, count + about_weights)
    assert not list(tmp_path.rglob("executed"))
    assert not list(tmp_path.parent.glob("archive"))
    COUNTS["hostile file"]["refused, nothing executed, less than 250 MiB"] += count
    COUNTS["hostile side file of weights"]["refused in one line, less than 250 MiB"] += about_weights


# ---- images


def image_files():
    """Yield (format, image, arguments of save): modes, compressions and metadata of each format."""
    pixels = np.random.RandomState(0).randint(0, 256, (16, 24, 3)).astype(np.uint8)
    color = Image.fromarray(pixels)
    grey = color.convert("L")
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    alpha = color.convert("RGBA")
    palette = color.convert("P")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    exif[0x010F] = "camera"
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
    """Return `content` as a broken disk or an attacker leaves it; `other` is another file's."""
    content = bytearray(content)
    for _ in range(luck.choice([1, 1, 2, 5])):
        early = luck.random() < 0.5  # in the header, which matters most
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
            length = luck.choice([4, 20, 200])
            start = luck.randrange(len(other))
            content[at : at + length] = other[start : start + length]
        else:
            content[at : at + 4] = struct.pack(
                luck.choice("<>") + "I", luck.choice([0, 1, 16, 65535, 65536, 2**31 - 1])
            )
    return bytes(content)


def with_checksums(png):
    """Return a PNG file with corrected checksums, so that a reader goes on to its chunks."""
    content = bytearray(png)
    at = 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        content[end : end + 4] = zlib.crc32(content[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(content)


@pytest.mark.filterwarnings("ignore::Warning")
def test_mutated_image_is_read_or_refused_by_name(tmp_path, capfd):
    """Any other exception of Pillow fails."""
    luck = random.Random(12)
    contents = []
    for format, image, how in image_files():
        content = io.BytesIO()
        image.save(content, format, **how)
        contents.append((format, content.getvalue()))
    path = tmp_path / "x.jpg"
    for i in range(few(20_000, 300)):
        format, content = contents[i % len(contents)]
        content = mutated(content, luck.choice(contents)[1], luck)
        path.write_bytes(with_checksums(content) if format == "PNG" and i % 2 else content)
        try:
            image = images.open_image(path)
            assert image.mode == "RGB"
            COUNTS[f"mutated image, {format}"]["read"] += 1
        except UserError as error:
            assert str(path) in str(error)
            COUNTS[f"mutated image, {format}"]["refused by name"] += 1
    capfd.readouterr()  # libtiff's own messages
    for suffix in images.FORMATS:
        assert len(COUNTS[f"mutated image, {suffix}"]) == 2


# ---- names


NAMES = [os.fsdecode(b"\xff\xfe \xe9"), "na\u00efve \u9032\u5316", "a'b\"c $(touch x) --epochs 9\nd"]


@quick_report
@pytest.mark.parametrize("name", few(NAMES, ["".join(NAMES)]))
def test_name_of_any_kind_can_be_searched_retrained_tested_and_resumed(make_images, tmp_path, monkeypatch, name):
    """The name of the data, a class and the run; on a terminal that only knows ASCII."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    for split in ("train", "test"):
        images = make_images(split, 4, [(8, 8)], classes=("ant", name))
    root, place = images.rename(tmp_path / name), tmp_path / f"runs {name}"
    data = ["--dataset", "folder", "--data", root]
    argv = [*data, "--init_channels", 2, "--layers", 1, "--epochs", 1, "--batch_size", 4]
    population = ["--pop_size", 2, "--tsize", 2, "--baselines", 1]
    assert outcome(train_search.main, *argv, *population, "--dir", place, "--run_name", name) == "accepted"
    assert outcome(train.main, *argv, "--dir", place / name, "--save", name) == "accepted"
    (retrained,) = (place / name).glob("eval-*")
    assert outcome(test_cifar.main, *data, "--dir", retrained) == "accepted"
    for main, run in ((train_search.main, place / name), (train.main, retrained)):
        assert outcome(main, "--resume", run) == "accepted"
        assert outcome(visualize.main, "--report", run) == "accepted"
        for path in [run / "log.txt", run / "report.html", *run.glob("*.json"), *run.glob("weights/*.json")]:
            path.read_text(encoding="utf-8")
    assert not Path("x").exists()
    COUNTS["names that are not UTF-8, not ASCII, or shell code"]["searched, retrained, tested, resumed"] += 1


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))
