"""Signals: who takes them over, and what processes that read files notice; see also test_resume.py."""

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

from helpers import (
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
    assert_same_run(run, next((tmp_path / "whole").iterdir()))


# ---- in this process


@pytest.mark.parametrize("numbers", [[signal.SIGINT] * 2, [signal.SIGTERM, signal.SIGINT], [signal.SIGTERM] * 2])
def test_a_second_signal_stops_at_once(tmp_path, capsys, numbers):
    argv = search_line(dir=tmp_path, run_name="run")
    stop_at("generation 1/3: batch 1", numbers, train_search.main, argv)
    how = f"continue with: python train_search.py --resume {tmp_path / 'run'}"
    assert capsys.readouterr().err == f"interrupted at once; {how}\n" and how in (tmp_path / "run/log.txt").read_text()
    checkpoint = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert checkpoint["completed"] == 0 and "partial" not in checkpoint


def test_ctrl_c_promises_no_more_than_there_is(tmp_path, monkeypatch, capsys):
    """Before the first checkpoint of a new run, and so before there is a run, nothing can be continued."""

    def stop(*args, **settings):
        raise KeyboardInterrupt

    for owner, name in ((datasets, "load_images"), (runs.Run, "restore")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(owner, name, stop)
            search(tmp_path)
        assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


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


def test_signals_are_taken_over_while_a_run_is_open(tmp_path):
    handlers = lambda: [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]  # noqa: E731
    before = handlers()
    run = new_run(tmp_path)
    assert handlers() == [signals._receive] * 3
    run.close()
    with pytest.raises(Exception, match="first checkpoint"):
        resumed_run(run.path)
    assert handlers() == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with new_run(tmp_path, "ignoring"):
            os.kill(os.getpid(), signal.SIGHUP)
            assert handlers() == [signals._receive] * 2 + [signal.SIG_IGN] and signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before[2])
    thread = threading.Thread(target=lambda: new_run(tmp_path, "other").close())  # cannot, and need not
    thread.start()
    thread.join()
    assert (tmp_path / "other/args.json").exists()


# ---- what is left of an epoch


@pytest.mark.parametrize("kind, workers", [("memory", 0), ("files", 0), ("files", 2)])
def test_batches_that_are_over_are_left_out(make_images, monkeypatch, kind, workers):
    side = 8 if kind == "memory" else 80
    split = datasets.load_images("folder", make_images("train", 5, [(side, side)]), "train")
    opened = []
    open_image = loaders.open_image
    monkeypatch.setattr(loaders, "open_image", lambda path: opened.append(path) or open_image(path))

    def make():
        settings = dict(generator=torch.Generator().manual_seed(5), augment=True, workers=workers)
        return loaders.make_loader(split, 4, datasets.augmentation("cifar10"), torch.device("cpu"), **settings)

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
