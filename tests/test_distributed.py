"""Two gloo processes on the CPU: they compute what one does, and stop if one is lost."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import datasets
import loaders
import train
import train_search
from encoding import decode, random_alphas
from fitness import measure_fitness
from model_search import Network
from support import devices, distributed
from support.files import UserError
from training import TrainingSettings, TrainingState, train_one_epoch

from helpers import checkpoint_bytes, load_checkpoint, torchrun

ROOT = Path(__file__).resolve().parents[1]
SEARCH = "--dataset digits --pop_size 5 --tsize 2 --init_channels 2 --layers 1 --device cpu --baselines 1".split()
SEARCH += "--train_samples 128 --valid_samples 60 --batch_size 32".split()
RETRAIN = "--dataset digits --arch EvNASB --init_channels 2 --layers 3 --device cpu".split()
RETRAIN += "--train_samples 128 --batch_size 32 --drop_path_prob 0.2".split()
SCRIPTS = [pytest.param(train_search, SEARCH, id="search"), pytest.param(train, RETRAIN, id="retraining")]


def measure():
    """The fitness of seven individuals, two of them equal, on the digits."""
    torch.manual_seed(3)
    network = Network(2, 10, 2)
    alphas = random_alphas(7, generator=torch.Generator().manual_seed(4))
    alphas[5] = alphas[1]
    return measure_fitness(network, decode(alphas), digits_loader(shared=False), "batch")


def of_two(tmp_path, call):
    """Return what a call of a function in this file returns in each of two processes."""
    script = tmp_path / "call.py"
    script.write_text(
        "import sys, torch\n"
        "from support import distributed\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import test_distributed\n"
        "torch.set_num_threads(1)\n"
        "distributed.join_process_group(torch.device('cpu'))\n"
        f"torch.save(test_distributed.{call}, {str(tmp_path)!r} + f'/result{{distributed.rank()}}.pt')\n"
        "distributed.leave_process_group()\n"
    )
    assert torchrun(tmp_path / "logs", script).wait(timeout=300) == 0
    return [torch.load(tmp_path / f"result{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_measure_the_fitness_that_one_does(tmp_path):
    expected = measure()
    assert len(expected.unique()) > 1
    for result in of_two(tmp_path, "measure()"):
        assert torch.equal(result, expected)


def digits_loader(shared=True):
    digits = datasets.load_images("digits", None, "test")
    return loaders.Loader(digits, 100, datasets.augmentation("digits", digits), torch.device("cpu"), shared=shared)


def train_one_layer(wrapped):
    """(running statistics after an epoch, each process's own), of a BatchNorm behind the images."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10))
    trained = network
    if wrapped:
        trained = DistributedDataParallel(network)
        trained.broadcast_buffers = False
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    state = TrainingState(network, optimizer, digits_loader(), TrainingSettings(report_freq=1))
    state.trained = trained

    def loss_of(x, y):
        logits = trained(x)
        return nn.functional.cross_entropy(logits, y), logits

    train_one_epoch(state, loss_of, lambda step: (), where="", log=lambda text: None)
    return torch.cat([network[0].running_mean, network[0].running_var]), state.progress.buffers


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
def test_running_statistics_are_the_mean_of_the_processes(tmp_path, wrapped):
    own = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    for x, _ in digits_loader(shared=False):
        for rank, norm in enumerate(own):
            norm(x[rank::2])
    expected = torch.stack([torch.cat([norm.running_mean, norm.running_var]) for norm in own])
    assert (expected[0] - expected[1]).abs().min() > 1e-4
    for buffers, rows in of_two(tmp_path, f"train_one_layer({wrapped})"):
        torch.testing.assert_close(rows, expected)
        assert torch.equal(buffers, rows.mean(0))


def ruined(what):
    """What each process says if the loss, or the statistics, of the second are not finite."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    state = TrainingState(network, optimizer, digits_loader(), TrainingSettings(report_freq=9))

    def loss_of(x, y):
        second = distributed.rank() == 1
        logits = network(x * 1e25 if second and what == "statistics" else x)
        loss = nn.functional.cross_entropy(logits, y)
        return loss * float("nan") if second and what == "loss" else loss, logits

    try:
        train_one_epoch(state, loss_of, lambda step: (), where="epoch 1/1", log=lambda text: None)
    except UserError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("what, words", [("loss", "step 1: the loss is nan"), ("statistics", "no longer finite")])
def test_all_processes_stop_where_one_has_values_that_are_not_finite(tmp_path, what, words):
    for message in of_two(tmp_path, f"ruined({what!r})"):
        assert words in message


@pytest.mark.parametrize("rank, order", [(0, ["block", "barrier"]), (1, ["barrier", "block"])])
def test_first_process_of_a_machine_goes_before_the_others(monkeypatch, rank, order):
    """Also where the block fails: the others must not wait for ever."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    events = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("barrier"))
    for failure in (None, UserError("no download")):
        events.clear()
        with pytest.raises(UserError) if failure else contextlib.nullcontext(), distributed.one_after_the_other():
            events.append("block")
            if failure:
                raise failure
        assert events == order


@pytest.mark.parametrize("device", [None, "cuda"])
def test_each_process_has_a_card_of_its_own(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = argparse.Namespace(device=device, gpu=98, amp=False, compile=False)
    for variables, expected in (({}, "cuda:98"), ({"LOCAL_RANK": "99"}, "cuda:99")):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"device {expected} cannot be used"):  # there are not so many
            devices.choose_device(args)


def wait_for_lines(process, path, count):
    """Waits until history.jsonl below `path` has `count` lines; returns that file."""
    deadline = time.monotonic() + 200
    while not any(len(file.read_text().splitlines()) >= count for file in path.glob("*/history.jsonl")):
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, "no such line came"
        time.sleep(0.2)
    return next(path.glob("*/history.jsonl"))


def finish(main, run, epochs):
    """Resumes a run, shortened so that the test ends, in this process."""
    args, state = json.loads((run / "args.json").read_text()), load_checkpoint(run / "checkpoint.pt")
    args["args"]["epochs"] = state["bound"]["args"]["epochs"] = epochs
    (run / "args.json").write_text(json.dumps(args))
    state |= {name: json.dumps(state[name]) for name in ("bound", "history")}
    (run / "checkpoint.pt").write_bytes(checkpoint_bytes(state))
    main(["--resume", str(run)])
    assert len((run / "history.jsonl").read_text().splitlines()) == epochs


@pytest.mark.slow
@pytest.mark.parametrize("script, argv", SCRIPTS)
def test_lost_process_ends_the_run_in_one_line_and_one_process_continues_it(tmp_path, script, argv):
    argv = [*argv, "--epochs", 40, "--dir", tmp_path / "runs"]
    process = torchrun(tmp_path / "logs", script.__file__, *argv, stderr=subprocess.PIPE)
    history = wait_for_lines(process, tmp_path / "runs", 2)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = {
        next(v for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if v.startswith("RANK=")): int(pid)
        for pid in workers
    }
    os.kill(ranks["RANK=1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    # torchrun adds its own report; ours has no traceback.
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert "another process of this run is gone" in line
    assert f'{Path(script.__file__).name}", line' not in errors, errors
    finish(script.main, history.parent, len(history.read_text().splitlines()) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("script, argv", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_under_torchrun_stops_and_says_how_to_continue(tmp_path, script, argv, number):
    """It passes the signal on; both processes stop at the same step, and one of them saves."""
    argv = [*argv, "--epochs", 40, "--dir", tmp_path / "runs"]
    process = torchrun(tmp_path / "logs", script.__file__, *argv, stderr=subprocess.PIPE)
    history = wait_for_lines(process, tmp_path / "runs", 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    (line,) = (line for line in errors.splitlines() if line.startswith("interrupted in "))
    assert line.endswith(f"python {Path(script.__file__).name} --resume {history.parent}")
    completed = len(history.read_text().splitlines())
    checkpoint = load_checkpoint(history.parent / "checkpoint.pt")
    assert checkpoint["completed"] == completed
    assert checkpoint["partial"]["steps"] > 0
    finish(script.main, history.parent, completed + 1)


def threads_left(module, argv):
    """The names of the threads that a process has after a whole run of a script."""
    module.main(argv)
    distributed.leave_process_group()
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the threads of a process are listed by Linux")
@pytest.mark.parametrize(("script", "argv"), SCRIPTS)
def test_no_thread_outlives_the_process_group(tmp_path, script, argv):
    """One that does can take the interpreter's lock while Python ends, which aborts the process."""
    argv = [*argv, "--epochs", "1", "--dir", str(tmp_path)]
    for names in of_two(tmp_path, f"threads_left(test_distributed.{script.__name__}, {argv})"):
        assert names
        assert not [name for name in names if "gloo" in name]


@pytest.mark.slow
def test_all_processes_refuse_data_that_changed_for_one(tmp_path, make_images):
    """As on two machines, each with a copy of its own."""
    for split in ("train", "test"):
        images = make_images(split, 2, [(8, 8)], (".png",))
    argv = "--dataset folder --arch EvNASB --init_channels 2 --layers 3 --device cpu --batch_size 6 --epochs 1".split()
    train.main([*argv, "--data", str(images), "--dir", str(tmp_path / "parent")])
    (run,) = (tmp_path / "parent").iterdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for rank in (0, 1):
        shutil.copytree(images, tmp_path / f"{rank}")
    (tmp_path / "1/train/bee/0.png").rename(tmp_path / "1/train/bee/new.png")
    script = tmp_path / "resume.py"
    script.write_text(
        "import train\n"
        "from support import distributed\n"
        f"train.main(['--resume', {str(run)!r}, '--data', {str(tmp_path)!r} + f'/{{distributed.rank()}}'])\n"
    )
    process = torchrun(tmp_path / "logs", script, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert 'train.py", line' not in errors, errors  # torchrun adds its own traceback
    lines = [line for line in errors.splitlines() if line.startswith(f"error: {run}: ")]
    assert lines, errors
    for line in lines:
        assert "data/source/train is" in line or "another process" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
