"""Faults of processes and machines, tried and counted: kills, disks, lost streams, little memory.

These tests are slow, because they start processes. They try a few of each fault. `make test-faults` tries them all
(EVNAS_FAULTS=full) and prints what came of them.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import faults
from faults import ARGUMENTS, COUNTS, FULL, ROOT, exit_code, few
from helpers import assert_same_run, load_checkpoint, search_line, train_line

pytestmark = pytest.mark.slow
counted, process, whole = faults.counted, faults.process, faults.whole


def in_two(process, script, argv, output, last=None, second=None):
    """Return the exit codes of two processes, started as torchrun starts them.

    `last` are conditions of the second process, `second` its own command line.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    conditions = [{"environment": ranks[0]}, {"environment": ranks[1], **(last or {})}]
    words = [argv, second or argv]
    both = [process(script, own, output, **each) for own, each in zip(words, conditions, strict=True)]
    return [exit_code(running, output) for running in both]


def error_lines(output):
    """The error lines of processes that have ended; no traceback."""
    text = output.read_text()
    assert "Traceback" not in text, text
    assert "Exception" not in text, text
    lines = [line.strip(" \0") for line in text.splitlines()]  # PyTorch ends lines of its own with a zero
    return [line for line in lines if line.startswith("error: ")]


def one_line(output):
    """The error line that a process must have ended with; no traceback."""
    (line,) = error_lines(output)
    return line


def refused(process, script, argv, output, **conditions):
    """The error line of a process that must end with exit code 2."""
    code = exit_code(process(script, argv, output, **conditions), output)
    assert code == 2, output.read_text()
    return one_line(output)


def new_run(parent):
    """The only run directory below `parent`."""
    (run,) = parent.iterdir()
    return run


def assert_continues(process, whole, run, output, *flags, **conditions):
    """The run can be resumed, and then equals the uninterrupted one."""
    running = process(whole.script, ["--resume", run, *flags], output, **conditions)
    assert exit_code(running, output) == 0, output.read_text()
    assert_same_run(run, whole.run)


# ---- kill -9


def killed_at_any_moment(running, parent, seconds, luck):
    """Kill a process some time after it has made its run directory; it may have ended by then."""
    while not list(parent.glob("*/args.json")):
        time.sleep(0.01)
    running.join(luck.uniform(0, 1.1 * seconds))
    if luck.random() < 0.3:  # also while it saves what a first signal interrupted
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGTERM)
        running.join(luck.uniform(0, 0.1))
    running.kill()


@pytest.mark.parametrize("where", ["any moment", "a write"])
def test_killed_run_continues_and_ends_bit_identical(whole, process, tmp_path, where):
    """A chain of processes, killed until there were enough kills, one after a checkpoint."""
    fault = f"kill -9 of {whole.script}.py at {where}"
    luck = random.Random(fault)
    output = tmp_path / "output"
    attempt, run = 0, None  # the number of the runs that were begun; the one that goes on
    kills, unproved, proved = 0, 0, 0  # all kills; those after a checkpoint, of `run` and of runs that have ended
    while kills < few(10, 1) or unproved or not proved:
        if run is None:
            attempt += 1
        parent = tmp_path / f"{attempt}"
        argv = ["--resume", run] if run else [*ARGUMENTS[whole.script], "--dir", parent]
        enough = kills >= few(10, 1) and unproved + proved > 0
        call = luck.choice([luck.randint(1, whole.steps[-1]), luck.choice(whole.steps)])  # often a rename or a flush
        dies = where == "a write" and not enough
        running = process(whole.script, argv, output, **({"die_at": dict(call=call)} if dies else {}))
        if where == "any moment" and not enough:
            killed_at_any_moment(running, parent, whole.seconds, luck)
        code = exit_code(running, output)
        assert code in (0, -signal.SIGKILL, -signal.SIGTERM, 143), output.read_text()
        assert "Traceback" not in output.read_text()
        run = new_run(parent) if parent.exists() else None
        begun = run is not None and (run / "checkpoint.pt").exists()
        if code == -signal.SIGKILL:
            kills += 1
            unproved += begun
            COUNTS[fault]["before the first checkpoint, started anew"] += not begun
        if code == 0:
            assert_same_run(run, whole.run)
            COUNTS[fault]["continued, bit-identical"] += unproved
            proved += unproved
            unproved = 0
        if code == 0 or not begun:
            run = None
    assert kills == sum(COUNTS[fault].values())


# ---- disks


@contextlib.contextmanager
def disk(folder, size):
    """A file system of `size` KiB at `folder`; skips if the tests may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_run_on_a_full_disk_ends_in_one_line_and_continues_with_room(whole, process, tmp_path):
    total = sum(path.stat().st_size for path in whole.run.rglob("*") if path.is_file()) // 1024
    for i, share in enumerate(few((0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9), (0.6,))):
        folder, output = tmp_path / f"disk{i}", tmp_path / f"output{i}"
        with disk(folder, int(total * share)) as remount:
            line = refused(process, whole.script, [*ARGUMENTS[whole.script], "--dir", folder], output)
            assert "No space left on device" in line
            assert str(folder) in line
            run = new_run(folder)
            if (run / "checkpoint.pt").exists():
                load_checkpoint(run / "checkpoint.pt")
                remount("size=100m")
                assert_continues(process, whole, run, tmp_path / f"resumed{i}")
                COUNTS["disk full"]["one line, exit 2; continued with room, bit-identical"] += 1
            else:
                COUNTS["disk full"]["one line, exit 2; before the first checkpoint"] += 1
    assert COUNTS["disk full"]["one line, exit 2; continued with room, bit-identical"] > 0


def test_run_at_a_file_size_limit_ends_in_one_line_with_good_checkpoints(whole, process, tmp_path):
    size = (whole.run / "checkpoint.pt").stat().st_size
    for i, limit in enumerate(few((20_000, size // 4, size // 2, size - 100), (size - 100,))):
        argv = [*ARGUMENTS[whole.script], "--dir", tmp_path / f"{i}"]
        line = refused(process, whole.script, argv, tmp_path / f"output{i}", file_size=limit)
        assert "File too large" in line
        paths = list(new_run(tmp_path / f"{i}").glob("checkpoint*.pt"))
        for path in paths:
            load_checkpoint(path)
        assert limit < size - 100 or paths  # the first checkpoint is smaller than the last
        COUNTS["file size limit"]["one line, exit 2; the last checkpoint is good"] += 1


def test_run_in_a_read_only_directory_is_refused_in_one_line(whole, process, tmp_path):
    with disk(tmp_path / "disk", 100_000) as remount:
        run = Path(shutil.copytree(whole.run, tmp_path / "disk/run"))
        (run / "checkpoint.prev.pt").replace(run / "checkpoint.pt")  # it is not finished
        remount("ro")
        for i, argv in enumerate(([*ARGUMENTS[whole.script], "--dir", tmp_path / "disk"], ["--resume", run])):
            line = refused(process, whole.script, argv, tmp_path / f"output{i}")
            assert "Read-only file system" in line
            assert str(tmp_path / "disk") in line
            COUNTS["read-only directory"]["one line, exit 2"] += 1


# ---- two at once


def test_runs_started_at_once_get_a_directory_each(whole, process, tmp_path):
    for i in range(few(3, 1)):
        parent, output = tmp_path / f"{i}", tmp_path / "output"
        both = [process(whole.script, [*ARGUMENTS[whole.script], "--dir", parent], output) for _ in range(2)]
        for running in both:
            assert exit_code(running, output) == 0, output.read_text()
        assert len(list(parent.iterdir())) == 2
        for run in parent.iterdir():
            assert_same_run(run, whole.run)
        COUNTS["two runs started in one second"]["a directory each, both right"] += 1


def test_run_resumed_twice_at_once_continues_once(whole, process, tmp_path):
    for i in range(few(3, 1)):
        parent = tmp_path / f"{i}"
        running = process(whole.script, [*ARGUMENTS[whole.script], "--dir", parent])
        while not list(parent.glob("*/checkpoint.pt")):
            time.sleep(0.01)
        running.kill()
        running.join()
        run = new_run(parent)
        outputs = [tmp_path / f"output{i}{k}" for k in range(2)]
        both = [process(whole.script, ["--resume", run], output) for output in outputs]
        codes = [exit_code(running, output) for running, output in zip(both, outputs, strict=True)]
        assert sorted(codes) == [0, 2], [output.read_text() for output in outputs]
        assert f"{run}: in use" in one_line(outputs[codes.index(2)])
        assert_same_run(run, whole.run)
        COUNTS["a run resumed twice at once"]["the second refused, the first right"] += 1


# ---- bare hosts


def test_run_without_tensorboard_and_display_says_what_is_missing(whole, process, tmp_path):
    argv = [*ARGUMENTS[whole.script], "--dir", tmp_path / "parent"]
    running = process(whole.script, argv, tmp_path / "output", without=["tensorboard"], drawn=True)
    assert exit_code(running, tmp_path / "output") == 0, (tmp_path / "output").read_text()
    run = new_run(tmp_path / "parent")
    assert (run / "log.txt").read_text().count("pip install tensorboard") == 1
    assert not (run / "runs").exists()
    drawings = list(run.glob("*.svg"))
    assert drawings
    for path in drawings:
        assert "<path" in path.read_text()
        shutil.copy(whole.run / path.name, path)  # other runs of these tests draw no cells
    assert_same_run(run, whole.run)
    COUNTS["without TensorBoard and display"]["works, says what is missing"] += 1


# ---- several processes


def test_two_interrupted_processes_continue_and_end_bit_identical(whole, process, tmp_path):
    """In an epoch, at its end and while it is measured, by a signal that only one of them gets."""
    script, output = whole.script, tmp_path / "output"
    argv = [*ARGUMENTS[script], "--report_freq", 1, "--epochs", few(3, 2)]
    assert in_two(process, script, [*argv, "--dir", tmp_path / "whole"], output) == [0, 0], output.read_text()
    place, calls = [*argv, "--dir", tmp_path / "part"], few([2, 4, 3, 1, 5], [2])
    for call in calls:
        codes = in_two(process, script, place, output, last={"signal_at": (call, signal.SIGTERM)})
        assert codes == [143, 143], output.read_text()
        run = new_run(tmp_path / "part")
        place = ["--resume", run]
    assert in_two(process, script, place, output) == [0, 0], output.read_text()
    assert (run / "log.txt").read_text().count("interrupted in ") == len(calls)
    assert_same_run(run, new_run(tmp_path / "whole"))
    COUNTS["two processes interrupted"]["continued, bit-identical"] += len(calls)


class Disagreement(NamedTuple):
    """Two processes of a new run that must not begin together."""

    what: str
    script: str
    argv: list
    also: list  # what the second process has in addition
    says: str  # what the message names
    conditions: dict = {}  # of the second process


def disagreements(tmp_path, make_images):
    """Yield every Disagreement."""
    for split, per_class in (("train", 8), ("test", 2)):
        images = make_images(split, per_class, [(8, 8)], (".png",))
    order, renamed, larger, more = (Path(shutil.copytree(images, tmp_path / f"images{i}")) for i in range(4))
    for split in ("train", "test"):
        (order / split / "ant").rename(order / split / "zebra")
        (more / split / "dog").mkdir()
        shutil.copy(more / "train/cat/0.png", more / split / "dog/0.png")
        shutil.copy(more / "train/cat/1.png", more / split / "dog/1.png")
    (renamed / "train/bee/0.png").rename(renamed / "train/bee/x.png")
    for path in larger.glob("*/*/*.png"):
        Image.open(path).resize((12, 12)).save(path)
    sizes = dict(dataset="folder", data=images, epochs=1, batch_size=6)
    search = search_line(**sizes, train_samples=9, valid_samples=6, valid_batch_size=6)
    retrain = train_line(**sizes, train_samples=12)
    first = "data/classes/0 is 'ant' in process 0, but 'bee'"
    yield Disagreement("class order", "train_search", search, ["--data", order], first)
    yield Disagreement("class order", "train", retrain, ["--data", order], first)
    cell = "args/arch is 'EvNASB' in process 0, but 'EvNASA'"
    yield Disagreement("cell", "train", retrain, ["--arch", "EvNASA"], cell)
    for script, argv in (("train_search", search), ("train", retrain)):
        yield Disagreement("seed", script, argv, ["--seed", 19], "args/seed is ")
        yield Disagreement("images", script, argv, ["--data", renamed], "data/source/train is ")
    classes = "data/classes/3 is None in process 0, but 'dog'"
    yield Disagreement("classes", "train", retrain, ["--data", more], classes)
    size = "data/image_size/0 is 8 in process 0, but 12"
    yield Disagreement("image size", "train", retrain, ["--data", larger], size)
    individuals = "args/pop_size is 4 in process 0, but 6"
    yield Disagreement("individuals", "train_search", search, ["--pop_size", 6], individuals)
    reports = "args/report_freq is 50 in process 0, but 1"
    yield Disagreement("reports", "train_search", search, ["--report_freq", 1], reports)
    yield Disagreement("initial weights", "train_search", search, [], "weights is '", {"other_weights": True})


def test_processes_that_disagree_are_refused_in_one_line(process, tmp_path, make_images):
    """A new run that would train nonsense, or end in a crash of torch, does not begin."""
    cases = list(disagreements(tmp_path, make_images))
    for i, case in enumerate(few(cases, [cases[0], cases[-1]])):
        output, folder = tmp_path / f"output{i}", tmp_path / f"{i}"
        argv = [*case.argv, "--dir", folder]
        codes = in_two(process, case.script, argv, output, last=case.conditions, second=[*argv, *case.also])
        assert codes == [2, 2], (case.what, output.read_text())
        one, other = error_lines(output)
        assert one == other
        assert case.says in one
        assert " in process 1" in one
        assert not list(folder.glob("*/checkpoint.pt"))
        assert case.what == "initial weights" or not folder.exists()
        COUNTS["processes that disagree"]["refused in one line, exit 2"] += 1


# ---- processes that read images


@pytest.fixture(scope="module")
def photographs(process, tmp_path_factory):
    """(Whole, arguments) of a retraining whose images two worker processes read."""
    tmp_path, luck = tmp_path_factory.mktemp("photographs"), np.random.RandomState(5)
    root = tmp_path / "images"
    for place in [f"train/{i % 3}/{i}" for i in range(24)] + [f"val/{i % 3}/{i}" for i in range(6)]:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(luck.randint(0, 256, (70, 90, 3)).astype(np.uint8)).save(root / f"{place}.png")
    argv = "--arch EvNASB --dataset imagenet --batch_size 4 --init_channels 2 --layers 1 --device cpu".split()
    argv += ["--epochs", 2, "--data", root, "--report_freq", 1, "--workers", 2]
    running = process("train", [*argv, "--dir", tmp_path / "whole"], tmp_path / "output")
    assert exit_code(running, tmp_path / "output") == 0, (tmp_path / "output").read_text()
    return faults.Whole("train", new_run(tmp_path / "whole"), None, []), argv


def started_to_train(process, argv, output):
    """(process, the ids of its worker processes) of a retraining that has made its first step"""
    running = process("train", argv, output)
    while not output.exists() or "step" not in output.read_text():
        time.sleep(0.01)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    return running, [int(child) for child in children]


def test_run_whose_worker_is_killed_ends_in_one_line_and_continues(photographs, process, tmp_path):
    (whole, argv), luck = photographs, random.Random(4)
    for i in range(few(8, 1)):
        output = tmp_path / f"output{i}"
        running, workers = started_to_train(process, [*argv, "--dir", tmp_path / f"{i}"], output)
        time.sleep(luck.uniform(0, 0.2))
        os.kill(luck.choice(workers), signal.SIGKILL)
        assert exit_code(running, output) == 2, output.read_text()
        assert "--workers" in one_line(output)
        assert_continues(process, whole, new_run(tmp_path / f"{i}"), output)
        COUNTS["image-reading process killed"]["one line, exit 2; continued, bit-identical"] += 1


def test_run_killed_without_its_workers_continues_at_once(photographs, process, tmp_path):
    """After kill -9 the processes that read its images live on for some seconds."""
    whole, argv = photographs
    for i in range(few(4, 1)):
        output = tmp_path / f"output{i}"
        running, workers = started_to_train(process, [*argv, "--dir", tmp_path / f"{i}"], output)
        running.kill()
        running.join(120)
        assert any(Path(f"/proc/{worker}").exists() for worker in workers)
        assert_continues(process, whole, new_run(tmp_path / f"{i}"), output)
        COUNTS["kill -9 while others read images"]["continued at once, bit-identical"] += 1


def test_run_with_little_shared_memory_ends_in_one_line_and_continues(photographs, process, tmp_path):
    with disk(tmp_path / "disk", 1):  # or this test cannot mount a small one either
        pass
    whole, argv = photographs
    for i, size in enumerate(few([64, 512, 1024, 2048], [1024])):  # KiB; a batch has 2352
        output = tmp_path / f"output{i}"
        line = refused(process, "train", [*argv, "--dir", tmp_path / f"{i}"], output, shared_memory=size)
        assert "/dev/shm" in line
        assert "--workers" in line
        run = new_run(tmp_path / f"{i}")
        assert_continues(process, whole, run, output, "--workers", 0, shared_memory=size)
        COUNTS["too little shared memory"]["one line, exit 2; continued with --workers 0, bit-identical"] += 1


# ---- lost streams and terminals

LOST = [(name, how) for name in ("stdout", "stderr") for how in ("head -1", "full disk", "closed")]


def test_run_that_loses_a_stream_goes_on_and_logs_every_line(whole, process, tmp_path):
    for i, (name, how) in enumerate(few(LOST, LOST[:1])):
        argv = [*ARGUMENTS[whole.script], "--dir", tmp_path / f"{i}"]
        assert exit_code(process(whole.script, argv, lost={name: how})) == 0, (name, how)
        run = new_run(tmp_path / f"{i}")
        assert_same_run(run, whole.run)
        lines, expected = ((folder / "log.txt").read_text().splitlines() for folder in (run, whole.run))
        assert len(lines) == len(expected) > 5
        assert lines[-1].endswith(f"{run}/report.html")
        COUNTS["stdout or stderr lost"]["training goes on, every line in log.txt"] += 1


def test_run_whose_terminal_closes_saves_and_continues(whole, process, tmp_path):
    """SIGHUP, and nothing can be printed any more; under nohup it is ignored."""
    gone = dict.fromkeys(("stdout", "stderr"), "head -1")
    for i, call in enumerate(few([1, 2, 4, 7], [2])):
        argv = [*ARGUMENTS[whole.script], "--dir", tmp_path / f"{i}"]
        assert exit_code(process(whole.script, argv, lost=gone, signal_at=(call, signal.SIGHUP))) == 129
        run = new_run(tmp_path / f"{i}")
        assert "interrupted in " in (run / "log.txt").read_text().splitlines()[-1]
        conditions = dict(ignored=[signal.SIGHUP], signal_at=(1, signal.SIGHUP))
        assert_continues(process, whole, run, tmp_path / f"output{i}", **conditions)
        COUNTS["terminal closed (SIGHUP)"]["saved, exit 129; continued, bit-identical"] += 1


def heed_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_while_torch_is_imported_ends_in_one_line():
    luck, command = random.Random(3), [sys.executable, ROOT / "train_search.py"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(few(15, 1)):
        starting = subprocess.Popen(command, **pipes, preexec_fn=heed_ctrl_c)
        while "numpy" not in Path(f"/proc/{starting.pid}/maps").read_text():  # torch comes after it
            time.sleep(0.005)
        time.sleep(luck.uniform(0, 1))
        starting.send_signal(signal.SIGINT)
        assert starting.communicate(timeout=60) == ("", "interrupted\n")
        assert starting.returncode in (-signal.SIGINT, 130)
        COUNTS["Ctrl-C during the imports"]["one line"] += 1


# ---- too little memory


def test_run_with_little_memory_ends_in_one_line(whole, process, tmp_path):
    argv = [*ARGUMENTS[whole.script], "--init_channels", 128, "--epochs", 1, "--dir", tmp_path / "runs"]
    for size in range(0, 160, 10) if FULL else (40, 60, 80):  # MiB
        output = tmp_path / f"output{size}"
        code = exit_code(process(whole.script, argv, output, memory=size << 20), output)
        if code == -signal.SIGSEGV:  # C++ code that does not look whether it got its memory: torch's fault
            COUNTS["too little memory"]["torch crashed"] += 1
            continue
        assert code == 2, output.read_text()
        line = one_line(output)
        assert "out of memory: " in line
        assert "--batch_size" in line
        COUNTS["too little memory"]["one line, exit 2"] += 1
        if not FULL:
            break
    assert COUNTS["too little memory"]["one line, exit 2"] >= few(12, 1)
