"""Ctrl-C and SIGTERM: the step is finished and saved, the resumed run ends as if it had never stopped."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import test_nas201_search
import test_search
import test_train
import torch
from test_runs import assert_same, make_run

import data
import loaders
import nas201.train_search
import train
import train_search
from support import runs, signals

ROOT = Path(__file__).resolve().parents[1]
SEARCH = test_search.command_line(cutout_length=4, num_elites=1)
# Six batches an epoch, 23 to test; drop path draws from torch's global generator.
RETRAIN = test_train.command_line("--cutout", drop_path_prob=0.5, batch_size=16)


def start(script, *argv):
    """A process of its own group, that Ctrl-C can stop even where the tests run in a script's background."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    heed = lambda: (os.setpgrp(), signal.signal(signal.SIGINT, signal.SIG_DFL))  # noqa: E731
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, argv)], **settings, preexec_fn=heed)


def interrupted_at(process, line, number):
    """Sends the signal to the process' group at a line of its output that contains `line`; returns stderr."""
    for text in process.stdout:
        if line in text:
            os.killpg(process.pid, number)
            break
    else:
        raise AssertionError(f"no {line}: {process.communicate()}")
    return process.communicate(timeout=120)[1]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """An uninterrupted search."""
    train_search.main([*SEARCH, "--dir", str(tmp_path_factory.mktemp("search")), "--run_name", "run"])
    return tmp_path_factory.getbasetemp() / "search0/run"


@pytest.fixture(scope="module")
def retrained(tmp_path_factory):
    """An uninterrupted retraining."""
    folder = tmp_path_factory.mktemp("retrain")
    train.main([*RETRAIN, "--dir", str(folder)])
    return next(folder.glob("eval-*"))


def assert_same_retraining(run, expected):
    saved, reference = (runs.load_checkpoint(folder / "checkpoint.pt") for folder in (run, expected))
    assert saved.keys() == reference.keys() and saved["completed"] == reference["completed"]
    assert all(torch.equal(saved["network"][name], value) for name, value in reference["network"].items())
    for i, momentum in reference["optimizer"]["state"].items():
        assert torch.equal(saved["optimizer"]["state"][i]["momentum_buffer"], momentum["momentum_buffer"])
    assert torch.equal(saved["generators"]["train"], reference["generators"]["train"])
    for name in ("weights.pt", "best_weights.pt"):
        weights = [torch.load(folder / "weights" / name, weights_only=True) for folder in (run, expected)]
        assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())
    assert test_train.history(run) == test_train.history(expected)


# ---- processes


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_search_interrupted_within_a_generation(searched, tmp_path, number, code):
    process = start("train_search.py", *SEARCH, "--dir", tmp_path, "--run_name", "run", "--report_freq", 1)
    errors = interrupted_at(process, "generation 2/3, step 1/3", number)
    run = tmp_path / "run"
    how = f"continue with: python train_search.py --resume {run}"
    assert re.fullmatch(rf"interrupted in generation [23]/3, (step \d/3|fitness); {re.escape(how)}\n", errors), errors
    assert process.returncode == code
    assert "partial" in runs.load_checkpoint(run / "checkpoint.pt")
    assert errors.strip() in (run / "log.txt").read_text()
    train_search.main(["--resume", str(run)])
    test_search.assert_same_runs(run, searched)


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_retraining_interrupted_within_an_epoch(retrained, tmp_path, number, code):
    process = start("train.py", *RETRAIN, "--dir", tmp_path, "--report_freq", 1)
    errors = interrupted_at(process, "epoch 2/3, step 2/6", number)
    (run,) = tmp_path.glob("eval-*")
    how = f"continue with: python train.py --resume {run}"
    assert re.fullmatch(rf"interrupted in epoch [23]/3, (step \d/6|test); {re.escape(how)}\n", errors), errors
    assert process.returncode == code
    train.main(["--resume", str(run)])
    assert_same_retraining(run, retrained)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_workers_that_read_files_are_not_disturbed(make_images, tmp_path, number, code):
    root = make_images("train", 8, [(90, 70)])
    make_images("val", 2, [(90, 70)])
    argv = "--arch EvNASB --dataset imagenet --batch_size 4 --init_channels 4 --layers 3 --device cpu".split()
    argv += ["--epochs", 2, "--drop_path_prob", 0.4, "--data", root, "--report_freq", 1, "--workers", 2]
    whole = start("train.py", *argv, "--dir", tmp_path / "whole")
    assert whole.communicate(timeout=300)[1] == "" and whole.returncode == 0
    process = start("train.py", *argv, "--dir", tmp_path / "stopped")
    errors = interrupted_at(process, "epoch 2/2, step 2/6", number)
    assert (
        process.returncode == code and errors.startswith("interrupted in epoch 2/2, step") and errors.count("\n") == 1
    )
    (run,) = (tmp_path / "stopped").iterdir()
    train.main(["--resume", str(run), "--workers", "0"])
    assert_same_retraining(run, next((tmp_path / "whole").iterdir()))


# ---- at every kind of moment, in this process


def signal_at(monkeypatch, call, numbers):
    """Sends this process signals when a loop asks for the `call`-th time whether to stop."""
    requested, calls = signals.requested, []

    def asked(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return requested(*args, **kwargs)

    monkeypatch.setattr(signals, "requested", asked)


@pytest.mark.parametrize(
    "call, place",
    [(1, "1/3, step 1/3"), (8, "2/3, step 2/3"), (9, "2/3, step 3/3"), (10, "2/3, fitness"), (18, "3/3, fitness")],
)
def test_every_moment_of_a_search(searched, tmp_path, monkeypatch, capsys, call, place):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        signal_at(patch, call, [signal.SIGTERM])
        test_search.search(tmp_path, cutout_length=4, num_elites=1)
    assert stopped.value.code == 143
    assert capsys.readouterr().err.startswith(
        f"interrupted in generation {place}; continue with: python train_search.py"
    )
    run = tmp_path / "run"
    assert runs.load_checkpoint(run / "checkpoint.pt")["completed"] == len(runs.read_history(run)) == int(place[0]) - 1
    train_search.main(["--resume", str(run)])
    test_search.assert_same_runs(run, searched)


@pytest.mark.parametrize(
    "call, place",
    [(1, "1/3, step 1/6"), (60, "3/3, step 2/6"), (35, "2/3, step 6/6"), (36, "2/3, test"), (50, "2/3, test")],
)
def test_every_moment_of_a_retraining(retrained, tmp_path, monkeypatch, capsys, call, place):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        signal_at(patch, call, [signal.SIGINT])
        train.main([*RETRAIN, "--dir", str(tmp_path)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.startswith(f"interrupted in epoch {place}; continue with: python train.py --resume")
    (run,) = tmp_path.glob("eval-*")
    torch.manual_seed(12345)  # the global generator of another process
    train.main(["--resume", str(run)])
    assert_same_retraining(run, retrained)


def test_a_search_of_the_other_space(tmp_path, monkeypatch, capsys):
    test_nas201_search.search(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        signal_at(patch, 8, [signal.SIGTERM])
        test_nas201_search.search(tmp_path / "stopped")
    assert stopped.value.code == 143
    run, whole = (next((tmp_path / name).iterdir()) for name in ("stopped", "whole"))
    line = capsys.readouterr().err
    assert line.startswith("interrupted in generation ") and "partial" in runs.load_checkpoint(run / "checkpoint.pt")
    assert line.endswith(f"continue with: python -m nas201.train_search --resume {run}\n")
    nas201.train_search.main(["--resume", str(run)])
    assert_same(*(runs.load_checkpoint(folder / "checkpoint.pt") for folder in (run, whole)))
    assert test_search.history(run) == test_search.history(whole)


def test_a_run_interrupted_again_and_again(searched, tmp_path, monkeypatch, capsys):
    argv, stops = [*SEARCH, "--dir", str(tmp_path), "--run_name", "run"], 0
    for call in (2, 1, 1, 1, 4, 3, 2, 1, 1, 99):
        with monkeypatch.context() as patch:
            signal_at(patch, call, [signal.SIGINT])
            try:
                train_search.main(argv)
            except SystemExit as stopped:
                stops += stopped.code == 130
        argv = ["--resume", str(tmp_path / "run")]
    assert stops == 9, capsys.readouterr()
    test_search.assert_same_runs(tmp_path / "run", searched)


@pytest.mark.parametrize("numbers", [[signal.SIGINT] * 2, [signal.SIGTERM, signal.SIGINT], [signal.SIGTERM] * 2])
def test_a_second_signal_stops_at_once(searched, tmp_path, monkeypatch, capsys, numbers):
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        signal_at(patch, 8, numbers)
        test_search.search(tmp_path, cutout_length=4, num_elites=1)
    assert stopped.value.code == 130
    how = f"continue with: python train_search.py --resume {run}"
    assert capsys.readouterr().err == f"interrupted at once; {how}\n" and how in (run / "log.txt").read_text()
    checkpoint = runs.load_checkpoint(run / "checkpoint.pt")
    assert checkpoint["completed"] == 1 and "partial" not in checkpoint
    train_search.main(["--resume", str(run)])
    test_search.assert_same_runs(run, searched)


def test_ctrl_c_promises_no_more_than_there_is(tmp_path, monkeypatch, capsys):
    """Before the first checkpoint of a new run, and so before there is a run, nothing can be continued."""

    def stop(*args):
        raise KeyboardInterrupt

    for owner, name in ((data, "load"), (runs.Run, "restore")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(owner, name, stop)
            test_search.search(tmp_path)
        assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_torchrun_passes_a_sigterm_on_that_is_no_second_one(monkeypatch):
    handlers = signals.catch()
    try:
        monkeypatch.setenv("WORLD_SIZE", "2")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not signals.requested("cpu", together=False)  # the others could not know
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.release(handlers)
    assert signals.received is None


def test_signals_are_taken_over_while_a_run_is_open(tmp_path):
    handlers = lambda: [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]  # noqa: E731
    before = handlers()
    run = make_run(tmp_path)
    assert handlers() == [signals._receive] * 3
    run.close()
    with pytest.raises(Exception, match="first checkpoint"):
        runs.Run.resume(run.path)
    assert handlers() == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with make_run(tmp_path, "ignoring"):
            os.kill(os.getpid(), signal.SIGHUP)
            assert handlers() == [signals._receive] * 2 + [signal.SIG_IGN] and signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before[2])
    thread = threading.Thread(target=lambda: make_run(tmp_path, "other").close())  # cannot, and need not
    thread.start()
    thread.join()
    assert (tmp_path / "other/args.json").exists()


# ---- what is left of an epoch


@pytest.mark.parametrize("kind, workers", [("memory", 0), ("files", 0), ("files", 2)])
def test_batches_that_are_over_are_left_out(make_images, monkeypatch, kind, workers):
    side = 8 if kind == "memory" else 80
    split = data.load("folder", make_images("train", 5, [(side, side)]), "train")
    opened, open_image = [], data.open_image
    monkeypatch.setattr(loaders, "open_image", lambda path: opened.append(path) or open_image(path))

    def make():
        settings = dict(generator=torch.Generator().manual_seed(5), augment=True, workers=workers)
        return loaders.make_loader(split, 4, data.AUGMENTATION["cifar10"], torch.device("cpu"), **settings)

    whole, part = make(), make()
    for first in (3, 0, 1, 4):  # of the 4 batches
        expected = list(whole)
        opened.clear()
        part.skip = first
        left = list(part)
        assert len(left) == 4 - first
        for pair, other in zip(left, expected[first:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))
        assert torch.equal(whole.generator.get_state(), part.generator.get_state())
        if kind == "files" and workers == 0:
            assert len(opened) == 15 - 4 * first if first < 4 else not opened
