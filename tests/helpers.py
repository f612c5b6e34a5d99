"""What several test files share: tiny runs of each script, invented runs, signals, equality to the last bit."""

import argparse
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import genotype_files
import genotypes
import nas201.train_search
import retrained
import train
import train_search
from nas201.genotypes import to_arch_string
from nas201.sources import COLUMNS
from run_settings import SETTINGS
from support import checkpoints, distributed, files, runs, weights
from support.files import write_json

ROOT = Path(__file__).resolve().parents[1]

# ---- tiny runs: seconds each on one core

TIMING = {"images_per_second", "seconds", "peak_memory_mb"}  # fields of a history that differ between equal runs

# 70 images in batches of 30: two batches and a smaller one, fewer than individuals; 30 in batches of 20 to validate.
SEARCH_SIZES = {
    "dataset": "digits",
    "pop_size": 4,
    "tsize": 2,
    "train_samples": 70,
    "valid_samples": 30,
    "batch_size": 30,
    "valid_batch_size": 20,
    "init_channels": 2,
    "layers": 2,
    "epochs": 3,
    "device": "cpu",
    "baselines": 2,
    "target_channels": 4,
    "target_layers": 4,
}

S2_SEARCH_LINE = [
    *("--dataset", "digits", "--device", "cpu", "--epochs", "3", "--pop_size", "6", "--tsize", "3"),
    *("--init_channels", "4", "--num_cells", "1", "--batch_size", "32"),
    *("--train_samples", "400", "--valid_samples", "100", "--learning_rate", "0.1"),
    *("--baselines", "3"),
]

TRAIN_SIZES = {
    "dataset": "digits",
    "arch": "EvNASB",
    "train_samples": 96,
    "batch_size": 16,
    "init_channels": 4,
    "layers": 3,
    "epochs": 3,
    "learning_rate": 0.1,
    "device": "cpu",
}


def words_of(sizes):
    """Return the command line of {flag: value}."""
    return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def search_line(**changed):
    """Return the command line of a tiny search of the DARTS space."""
    return words_of({**SEARCH_SIZES, **changed})


def search(parent, *flags, **changed):
    """Run train_search in the new directory `parent`/run and return that directory."""
    train_search.main([*search_line(dir=parent, run_name="run", **changed), *flags])
    return parent / "run"


class TinySupernet(torch.nn.Module):
    """Stands in for the DARTS-space supernet (with --plain): as small as can be, but it prefers some individuals.

    `calls` has ("train" or "fitness", alphas) of every call since one was made last.
    """

    calls = []

    def __init__(self, C, num_classes, layers):
        super().__init__()
        self.classifier = torch.nn.Linear(3, num_classes)
        self.calls.clear()

    def forward(self, x, alphas):
        self.calls.append(("train" if torch.is_grad_enabled() else "fitness", alphas.clone()))
        return self.classifier(x.mean(dim=(2, 3)) * 50 + alphas[..., 1:4].sum((0, 1)))


def s2_search(parent, *flags):
    """Run a tiny search of the NAS-Bench-201 space in the new directory `parent`/run and return that directory."""
    nas201.train_search.main([*S2_SEARCH_LINE, "--dir", str(parent), "--run_name", "run", *map(str, flags)])
    return parent / "run"


def train_line(*flags, **changed):
    """Return the command line of a tiny retraining."""
    return [*words_of({**TRAIN_SIZES, **changed}), *flags]


def retrain(parent, *flags, **changed):
    """Run train.py in a new directory below `parent` and return that directory."""
    train.main(train_line(*flags, dir=parent, **changed))
    return next(parent.glob("eval-*"))


def history(run):
    """Return the rows of a run's history without the fields that are times."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_history(run)]


def populations(run):
    """Return (raw alphas (P, G, E, O), fitness (P,)) of each generation, from its files."""
    files = [np.load(path) for path in sorted((run / "population").glob("*.npz"))]
    return [(torch.from_numpy(file["alphas"]), torch.from_numpy(file["fitness"])) for file in files]


# ---- a NAS-Bench-201 table with invented accuracies

S2_ARCHS = [to_arch_string(operations) for operations in itertools.product(range(5), repeat=6)]
S2_TRUTH = np.round(np.random.RandomState(0).uniform(10, 95, (len(S2_ARCHS), 6)), 3)
ARCH_WITH_DEAD_END = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|none~2|"  # at node 2


def write_table(folder, absent=()):
    """Write a whole table and return its path; absent=("valid",) leaves out columns whose name holds such a word."""
    kept = [k for k, name in enumerate(COLUMNS) if not any(word in name for word in absent)]
    rows = [",".join(["index", "arch", *(COLUMNS[k] for k in kept)])]
    rows += [f"{i},{arch}," + ",".join(map(str, S2_TRUTH[i, kept])) for i, arch in enumerate(S2_ARCHS)]
    path = folder / "table.csv"
    path.write_text("\n".join(rows))
    return path


# ---- runs that nobody ran

REPORTED_ARCH = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|none~0|nor_conv_3x3~1|skip_connect~2|"
REPORTED_SHAPES = {"s1": (2, 14, 8), "s2": (1, 6, 5)}


def reported_run(folder, kind="search", space="s1", steps=4, **changes):
    """A run directory as the scripts write it, with invented figures."""
    (folder / "population").mkdir(parents=True)
    args = {"dataset": "digits", "epochs": 5, "dir": None, "data": "/a/long/path/" + "x" * 90, "cutout": True}
    about = {"kind": kind, "command": "python train_search.py <&>", "git": None, "threads": 2, "started": "2025-01-01"}
    write_json(folder / "args.json", {"args": args, "space": space, "versions": {"torch": "2.6"}, **about})
    rng = np.random.default_rng(0)
    best = REPORTED_ARCH if space == "s2" else genotype_files.to_dict(genotypes.EvNASA)
    write_json(folder / "genotype.json", {"arch": REPORTED_ARCH} if space == "s2" else best)
    with open(folder / "history.jsonl", "w") as file:
        for step in range(1, steps + 1):
            row = {"train_loss": 2 / step, "train_top1": 80 - 30 / step, "lr": 0.025 / step, "images_per_second": 900.5,
                   "seconds": 61.5, "peak_memory_mb": None}  # fmt: skip
            if kind == "eval":
                row |= {"epoch": step, "test_loss": 3 / step, "test_top1": 96.25, "test_top5": 99.5, "best_top1": 96.5}
            else:
                row |= {"generation": step, "fitness_best": 60.0 + step, "fitness_mean": 50.0, "fitness_std": 2.5,
                        "distinct": 17, "best_genotype": best}  # fmt: skip
                alphas = rng.random((6, *REPORTED_SHAPES[space]), dtype=np.float32)
                np.savez(folder / "population" / f"{step:03d}.npz", alphas=alphas, fitness=np.full(6, np.nan))
            if space == "s2":
                true = {"cifar10": {"valid": None, "test": 91.23}, "cifar100": {"valid": 66.5, "test": 67.25}}
                row |= {"true_accuracy": true, "kendall_tau": 0.4, "spearman_rho": None}
            file.write(json.dumps(row | changes) + "\n")
    return folder


RETRAINED_ARCH = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_3x3~2|"
RETRAINED_CELLS = {"cifar": genotypes.EvNASB, "imagenet": genotypes.EvNASA, "nas201": RETRAINED_ARCH}
MEAN = (0.5, 0.4, 0.45)
STD = (0.2, 0.3, 0.25)
CLASSES = ["ant", "bee", "cat"]


def retrained_run(folder, family, pictures, classes=CLASSES):
    """What a retraining leaves of a network with random weights and statistics."""
    side = 32 if family == "imagenet" else 16
    sizes = {"init_channels": 4, "layers": 3 if family != "nas201" else 1, "auxiliary": False}
    about = {
        "family": family,
        "genotype": genotype_files.to_json(RETRAINED_CELLS[family]),
        "dataset": "folder",
        "classes": classes,
    }
    about |= {"image_size": [side, side], "resized": True, "mean": MEAN, "std": STD, **sizes}
    torch.manual_seed(0)
    settings = retrained.NetworkSettings(RETRAINED_CELLS[family], family, 3, [side, side], **sizes)
    network = retrained.make_network(settings)
    for _ in range(3):  # running statistics
        network(torch.randn(8, 3, side, side))
    (folder / "weights").mkdir(parents=True)
    weights.save_weights(network, folder / "weights/weights.pt", about)
    (folder / "args.json").write_text(json.dumps({"args": {"data": str(pictures)}}))
    return network.eval()


# ---- run directories and checkpoints, for tests of support

RUN_DATA = {"classes": ["ant", "bee"], "images": {"train": 6, "valid": 4}, "source": {"train": "3f", "valid": "3f"}}
RUN_INPUTS = {"kind": "search", "data": RUN_DATA}


def new_run(folder, name="search-1", **args):
    return runs.Run.create(folder, name, argparse.Namespace(**args), "prog.py", SETTINGS, inputs=RUN_INPUTS)


def resumed_run(path, found=RUN_DATA, **args):
    return runs.Run.resume(path, argparse.Namespace(**args), SETTINGS, inputs={**RUN_INPUTS, "data": found})


def load_checkpoint(path):
    """Return what a run's checkpoint file holds."""
    return checkpoints.load(path, SETTINGS)


def read_history(run):
    """Return the rows of a run's history."""
    return files.read_history(run, SETTINGS)


def checkpoint_bytes(state):
    """The bytes of a checkpoint file with the right checksum, whatever it holds."""
    file = io.BytesIO()
    torch.save(state, file)
    content = file.getvalue()
    return SETTINGS.checkpoint_magic + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


# ---- equality to the last bit


def assert_same(a, b):
    """Equal nested dicts and lists, tensors by their bits."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b) and a.dtype == b.dtype
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(run, expected):
    """Equal to the last bit: checkpoint, weights, populations, history without times, cells."""
    states = [load_checkpoint(folder / "checkpoint.pt") for folder in (run, expected)]
    for state, folder in zip(states, (run, expected), strict=True):
        assert state.pop("history") == read_history(folder)
    assert_same(*states)
    assert history(run) == history(expected)
    for path in [
        p
        for name in ("weights/*.pt", "genotype.*", "*.svg", "pareto.json", "individuals.csv")
        for p in expected.glob(name)
    ]:
        same = (run / path.relative_to(expected)).read_bytes() == path.read_bytes()
        assert same, path
    for path in expected.glob("population/*.npz"):
        with np.load(path) as a, np.load(run / path.relative_to(expected)) as b:
            assert all(np.array_equal(a[name], b[name]) for name in ("alphas", "fitness"))


# ---- signals

STOP = [signal.SIGTERM]
AT_ONCE = [signal.SIGTERM, signal.SIGINT]


def signal_at(monkeypatch, event, numbers):
    """Send this process signals at an event: when a loop gets "WHERE: batch I", or "before" or "after checkpoint N"."""
    progress, save_checkpoint = distributed.progress, runs.Run.save_checkpoint

    def happens(this):
        if this == event:
            for number in numbers:
                os.kill(os.getpid(), number)

    class Watched:
        def __init__(self, batches, where, done):
            self.batches, self.where, self.done = batches, where, done

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            for i, batch in enumerate(self.batches, start=self.done):
                happens(f"{self.where}: batch {i}")
                yield batch

    def saving(run, completed, state):
        happens(f"before checkpoint {completed}")
        save_checkpoint(run, completed, state)
        happens(f"after checkpoint {completed}")

    watched = lambda batches, where, done=0, units=None: progress(Watched(batches, where, done), where, done, units)  # noqa: E731
    monkeypatch.setattr(distributed, "progress", watched)
    monkeypatch.setattr(runs.Run, "save_checkpoint", saving)


def stop_at(event, numbers, main, argv):
    """Call `main(argv)`, which signals at `event` must end with the right exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        signal_at(patch, event, numbers)
        main([str(word) for word in argv])
    assert stopped.value.code == (130 if len(numbers) == 2 else 128 + numbers[0]), event


def start(*argv):
    """A process of its own group, whose output comes line by line."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    return subprocess.Popen([sys.executable, *map(str, argv)], **settings, start_new_session=True)


def torchrun(logs, *argv, **settings):
    """Two processes started by torchrun, whose own files go to the folder `logs`; `settings` are Popen's."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--log-dir", logs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*map(str, [*launcher, *argv])], cwd=ROOT, env=environment, text=True, **settings)


def interrupted_at(process, line, number):
    """Sends the signal to the process' group at a line of its output that contains `line`; returns stderr."""
    for text in process.stdout:
        if line in text:
            os.killpg(process.pid, number)
            break
    else:
        raise AssertionError(f"no {line}: {process.communicate()}")
    return process.communicate(timeout=120)[1]


# ---- hostile pickles


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def bomb(levels=60):
    """Nested pairs of 2^60 leaves, a few hundred bytes as a pickle."""
    value = ("skip_connect", 0)
    for _ in range(levels):
        value = (value, value)
    return value
