"""Signals: who handles them, and what processes that read files notice; see also test_resume.py."""

import os
import signal
import threading

import pytest
import torch

import datasets
import loaders
import train
import train_search
from support import runs, signals
from support.files import UserError

from helpers import (
    assert_same,
    assert_same_run,
    interrupted_at,
    load_checkpoint,
    new_run,
    resumed_run,
    search,
    search_line,
    start,
    stop_at,
)


@pytest.fixture(scope="module")
def photographs(write_images, tmp_path_factory):
    """(command line of a retraining on photographs, the directory of a run that was left alone)"""
    folder = tmp_path_factory.mktemp("photographs")
    write_images(folder / "images", "train", 8, [(90, 70)])
    write_images(folder / "images", "val", 2, [(90, 70)])
    argv = "--arch EvNASB --dataset imagenet --batch_size 4 --init_channels 2 --layers 1 --device cpu".split()
    argv += [*"--epochs 2 --drop_path_prob 0.4 --report_freq 1 --data".split(), str(folder / "images")]
    train.main([*argv, "--workers", "0", "--dir", str(folder / "whole")])
    return argv, next((folder / "whole").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_workers_that_read_files_are_not_disturbed(photographs, tmp_path, number, code):
    argv, expected = photographs
    process = start("train.py", *argv, "--workers", 2, "--dir", tmp_path / "stopped")
    errors = interrupted_at(process, "epoch 2/2, step 2/6", number)
    assert process.returncode == code
    assert errors.startswith("interrupted in epoch 2/2, step")
    assert errors.count("\n") == 1
    (run,) = (tmp_path / "stopped").iterdir()
    train.main(["--resume", str(run), "--workers", "0"])
    assert_same_run(run, expected)


# ---- in this process


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGINT] * 2,
        pytest.param([signal.SIGTERM, signal.SIGINT], marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM] * 2, marks=pytest.mark.slow),
    ],
)
def test_second_signal_stops_at_once(tmp_path, capsys, numbers):
    argv = search_line(dir=tmp_path, run_name="run", layers=1)
    stop_at("generation 1/3: batch 1", numbers, train_search.main, argv)
    errors = capsys.readouterr().err
    assert errors.startswith("interrupted at once; ")
    assert errors.endswith(f"python train_search.py --resume {tmp_path / 'run'}\n")
    assert errors.count("\n") == 1
    assert errors in (tmp_path / "run/log.txt").read_text()
    checkpoint = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert checkpoint["completed"] == 0
    assert "partial" not in checkpoint


@pytest.mark.parametrize("owner, name", [(datasets, "load_images"), (runs.Run, "restore")], ids=["before", "in"])
def test_ctrl_c_promises_no_more_than_there_is(tmp_path, monkeypatch, capsys, owner, name):
    """Before the first checkpoint of a new run, there is nothing to continue."""

    def stop(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, stop)
    with pytest.raises(SystemExit) as stopped:
        search(tmp_path)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_torchrun_passes_a_sigterm_on_that_is_no_second_one(monkeypatch):
    handlers = signals.catch()
    try:
        monkeypatch.setenv("WORLD_SIZE", "2")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not signals.stop_requested("cpu", at_meeting_point=False)  # the others could not know
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.release(handlers)
    assert signals.received is None


TAKEN_OVER = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def handlers():
    return [signal.getsignal(number) for number in TAKEN_OVER]


def test_signals_are_taken_over_while_a_run_is_open(tmp_path):
    before = handlers()
    run = new_run(tmp_path)
    assert handlers() == [signals._receive] * 3
    run.close()
    assert handlers() == before


def test_signals_are_given_back_after_a_resume_that_fails(tmp_path):
    new_run(tmp_path).close()
    before = handlers()
    with pytest.raises(UserError, match="checkpoint"):
        resumed_run(tmp_path / "search-1")
    assert handlers() == before


def test_signal_that_is_ignored_stays_ignored(tmp_path):
    """As SIGHUP does under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with new_run(tmp_path):
            os.kill(os.getpid(), signal.SIGHUP)
            assert handlers() == [signals._receive] * 2 + [signal.SIG_IGN]
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_run_can_be_opened_in_another_thread(tmp_path):
    """It cannot take over signals there, and need not."""
    thread = threading.Thread(target=lambda: new_run(tmp_path).close())
    thread.start()
    thread.join()
    assert (tmp_path / "search-1/args.json").exists()


# ---- what is left of an epoch


@pytest.fixture
def opened(monkeypatch):
    """The paths of the images that a loader has opened in this process."""
    paths = []
    open_image = loaders.open_image
    monkeypatch.setattr(loaders, "open_image", lambda path: paths.append(path) or open_image(path))
    return paths


@pytest.mark.parametrize(
    "side, workers",
    [(8, 0), (80, 0), pytest.param(80, 2, marks=pytest.mark.slow)],
    ids=["memory", "files", "files in workers"],
)
def test_batches_that_are_over_are_left_out(make_images, opened, side, workers):
    split = datasets.load_images("folder", make_images("train", 5, [(side, side)]), "train")

    def make():
        settings = dict(generator=torch.Generator().manual_seed(5), augment=True, workers=workers)
        return loaders.make_loader(split, 4, datasets.augmentation("cifar10"), torch.device("cpu"), **settings)

    whole, part = make(), make()
    for first in (3, 0, 4):  # of the 4 batches
        expected = list(whole)
        opened.clear()
        part.skip = first
        left = list(part)
        assert len(left) == 4 - first
        for pair, other in zip(left, expected[first:], strict=True):
            assert_same(pair, other)
        assert torch.equal(whole.generator.get_state(), part.generator.get_state())
        if side == 80 and workers == 0:
            assert len(opened) == max(0, 15 - 4 * first)
