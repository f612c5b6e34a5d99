"""Faults of processes and machines, tried and counted: kills, full disks, runs in each other's way, lost streams.

The tests try a few of each; `make test-faults` tries them all (EVNAS_FAULTS=full) and prints what came of them.
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

import numpy as np
import pytest
from PIL import Image

import faults
from faults import ARGUMENTS, COUNTS, FULL, ROOT, few
from helpers import assert_same_run, load_checkpoint, search_line, train_line

counted, process, whole = faults.counted, faults.process, faults.whole


def in_two(process, script, argv, output, last=None, second=None):
    """Exit codes of two processes, as torchrun starts them; `last` are conditions of the second, `second` its argv."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    conditions = [{"environment": ranks[0]}, {"environment": ranks[1], **(last or {})}]
    words = [argv, second or argv]
    both = [process(script, own, output, **each) for own, each in zip(words, conditions, strict=True)]
    for running in both:
        running.join(120)
        if running.exitcode is None:
            running.kill()
    return [running.exitcode for running in both]


def one_line(output):
    """The error line that a process must have ended with; no traceback."""
    lines = (line.strip(" \0") for line in output.read_text().splitlines())  # PyTorch ends lines of its own with a zero
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert "Traceback" not in output.read_text() and "Exception" not in output.read_text(), output.read_text()
    return line


def refused_write(process, script, argv, output, **conditions):
    running = process(script, argv, output, **conditions)
    running.join(120)
    if running.exitcode is None:
        running.kill()
        raise AssertionError(f"hangs: {output.read_text()}")
    assert running.exitcode == 2, (running.exitcode, output.read_text())
    return one_line(output)


# ---- kill -9


@pytest.mark.parametrize("where", ["any moment", "a write"])
def test_kills(whole, process, tmp_path, where):
    """A chain of processes, each killed, until there were enough; a run that ends equals the uninterrupted one."""
    script, expected, seconds, steps = whole
    fault, luck = f"kill -9 of {script}.py at {where}", random.Random(f"{script} {where}")
    kills, unproved, attempt, run = 0, 0, 0, None
    while kills < few(10, 1) or unproved:
        if run is None:
            attempt += 1
            (tmp_path / f"{attempt}").mkdir()
        place = ["--resume", run] if run else [*ARGUMENTS[script], "--dir", tmp_path / f"{attempt}"]
        enough = kills >= few(10, 1)
        dying = where == "a write" and not enough
        call = luck.choice([luck.randint(1, steps[-1]), luck.choice(steps)])  # half of them at a rename or a flush
        conditions = {"die_at": dict(call=call)} if dying else {}
        output = tmp_path / "output"
        running = process(script, place, output, **conditions)
        if where == "any moment" and not enough:
            while not (run or list((tmp_path / f"{attempt}").glob("*/args.json"))):
                time.sleep(0.01)
            running.join(luck.uniform(0, 1.1 * seconds))
            if luck.random() < 0.3:  # also while it saves what a first signal interrupted
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running.pid, signal.SIGTERM)
                running.join(luck.uniform(0, 0.1))
            running.kill()
        running.join(120)
        assert running.exitcode in (0, -signal.SIGKILL, -signal.SIGTERM, 143), output.read_text()
        assert "Traceback" not in output.read_text()
        (run,) = (tmp_path / f"{attempt}").iterdir() if any((tmp_path / f"{attempt}").iterdir()) else (None,)
        begun = run is not None and (run / "checkpoint.pt").exists()
        if running.exitcode == -signal.SIGKILL:
            kills += 1
            unproved += begun
            COUNTS[fault]["before the first checkpoint, started anew"] += not begun
        if running.exitcode == 0:
            assert_same_run(run, expected)
            COUNTS[fault]["continued, bit-identical"] += unproved
            unproved = 0
        if running.exitcode == 0 or not begun:
            run = None
    assert kills == few(10, 1) == sum(COUNTS[fault].values())
    assert COUNTS[fault]["continued, bit-identical"] > 0 or not FULL  # two can both come early


# ---- disks


@contextlib.contextmanager
def disk(folder, size):
    """A file system of `size` KiB at `folder`; skips where that needs rights that the tests do not have."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(whole, process, tmp_path):
    script, expected, _, _ = whole
    total = sum(path.stat().st_size for path in expected.rglob("*") if path.is_file()) // 1024
    for i, share in enumerate(few((0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9), (0.6,))):
        folder, output = tmp_path / f"disk{i}", tmp_path / f"output{i}"
        with disk(folder, int(total * share)) as remount:
            line = refused_write(process, script, [*ARGUMENTS[script], "--dir", folder], output)
            assert "No space left on device" in line and str(folder) in line
            (run,) = folder.iterdir()
            if (run / "checkpoint.pt").exists():
                load_checkpoint(run / "checkpoint.pt")
                remount("size=100m")
                running = process(script, ["--resume", run], output)
                running.join(120)
                assert running.exitcode == 0, output.read_text()
                assert_same_run(run, expected)
                COUNTS["disk full"]["one line, exit 2; continued with room, bit-identical"] += 1
            else:
                COUNTS["disk full"]["one line, exit 2; before the first checkpoint"] += 1


def test_file_size_limit(whole, process, tmp_path):
    script, expected, _, _ = whole
    size = (expected / "checkpoint.pt").stat().st_size
    first = load_checkpoint(expected / "checkpoint.pt")
    assert first["completed"] == 3
    for i, limit in enumerate(few((20_000, size // 4, size // 2, size - 100), (size - 100,))):
        output = tmp_path / f"output{i}"
        argv = [*ARGUMENTS[script], "--dir", tmp_path / f"{i}"]
        line = refused_write(process, script, argv, output, file_size=limit)
        assert "File too large" in line, line
        (run,) = (tmp_path / f"{i}").iterdir()
        for path in run.glob("checkpoint*.pt"):
            load_checkpoint(path)
        COUNTS["file size limit"]["one line, exit 2; the last checkpoint is good"] += 1


def test_read_only_directory(whole, process, tmp_path):
    script, expected, _, _ = whole
    with disk(tmp_path / "disk", 100_000) as remount:
        run = Path(shutil.copytree(expected, tmp_path / "disk/run"))
        (run / "checkpoint.prev.pt").replace(run / "checkpoint.pt")  # it is not finished
        remount("ro")
        for i, argv in enumerate(([*ARGUMENTS[script], "--dir", tmp_path / "disk"], ["--resume", run])):
            line = refused_write(process, script, argv, tmp_path / f"output{i}")
            assert "Read-only file system" in line and str(tmp_path / "disk") in line
            COUNTS["read-only directory"]["one line, exit 2"] += 1


# ---- two at once


def test_two_runs_started_at_once(whole, process, tmp_path):
    script, expected, _, _ = whole
    for i in range(few(3, 1)):
        parent = tmp_path / f"{i}"
        argv = [*ARGUMENTS[script], "--dir", parent]
        both = [process(script, argv, tmp_path / "output") for _ in range(2)]
        for running in both:
            running.join(120)
            assert running.exitcode == 0, (tmp_path / "output").read_text()
        assert len(list(parent.iterdir())) == 2
        for run in parent.iterdir():
            assert_same_run(run, expected)
        COUNTS["two runs started in one second"]["a directory each, both right"] += 1


def test_a_run_resumed_twice_at_once(whole, process, tmp_path):
    script, expected, seconds, _ = whole
    for i in range(few(3, 1)):
        parent = tmp_path / f"{i}"
        running = process(script, [*ARGUMENTS[script], "--dir", parent])
        while not list(parent.glob("*/checkpoint.pt")):
            time.sleep(0.01)
        running.kill()
        running.join()
        (run,) = parent.iterdir()
        outputs = [tmp_path / f"output{i}{k}" for k in range(2)]
        both = [process(script, ["--resume", run], output) for output in outputs]
        for running in both:
            running.join(120)
        codes = [running.exitcode for running in both]
        assert sorted(codes) == [0, 2], [output.read_text() for output in outputs]
        assert "in use by another process" in one_line(outputs[codes.index(2)])
        assert_same_run(run, expected)
        COUNTS["a run resumed twice at once"]["the second refused, the first right"] += 1


# ---- bare hosts


def test_without_tensorboard_and_display(whole, process, tmp_path):
    script, expected, _, _ = whole
    running = process(script, [*ARGUMENTS[script], "--dir", tmp_path / "parent"], without=["tensorboard"])
    running.join(120)
    assert running.exitcode == 0
    (run,) = (tmp_path / "parent").iterdir()
    log = (run / "log.txt").read_text()
    assert log.count("TensorBoard is not installed: no curves in runs/ (pip install tensorboard)") == 1
    assert not (run / "runs").exists()
    assert_same_run(run, expected)
    COUNTS["without TensorBoard and display"]["works, says what is missing"] += 1


# ---- several processes


def test_two_processes_interrupted_and_continued(whole, process, tmp_path):
    """Interrupted within an epoch, at its end and while it is measured, by the signal of one: as if it had not been."""
    script, output = whole[0], tmp_path / "output"
    argv = [*ARGUMENTS[script], "--report_freq", 1, "--epochs", few(3, 2)]
    assert in_two(process, script, [*argv, "--dir", tmp_path / "whole"], output) == [0, 0], output.read_text()
    (expected,) = (tmp_path / "whole").iterdir()
    place, calls = [*argv, "--dir", tmp_path / "part"], few([2, 4, 3, 1, 5], [2])
    for call in calls:
        codes = in_two(process, script, place, output, last={"signal_at": (call, signal.SIGTERM)})
        assert codes == [143, 143], output.read_text()
        (run,) = (tmp_path / "part").iterdir()
        place = ["--resume", run]
    assert in_two(process, script, place, output) == [0, 0], output.read_text()
    assert (run / "log.txt").read_text().count("interrupted in ") == len(calls)
    assert_same_run(run, expected)
    COUNTS["two processes interrupted"]["continued, bit-identical"] += len(calls)


def disagreements(tmp_path, make_images):
    """(what, script, argv, what the second process has in addition, what the message names, its conditions)."""
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
    of_class = "data/classes/0 is 'ant' in process 0, but"
    yield "class order", "train_search", search, ["--data", order], f"{of_class} 'bee'", {}
    yield "cell", "train", retrain, ["--arch", "EvNASA"], "args/arch is 'EvNASB' in process 0, but 'EvNASA'", {}
    yield "class order", "train", retrain, ["--data", order], f"{of_class} 'bee'", {}
    for script, argv in (("train_search", search), ("train", retrain)):
        yield "seed", script, argv, ["--seed", 19], "args/seed is ", {}
        yield "images", script, argv, ["--data", renamed], "data/source/train is ", {}
    yield "classes", "train", retrain, ["--data", more], "data/classes/3 is None in process 0, but 'dog'", {}
    yield "image size", "train", retrain, ["--data", larger], "data/image_size/0 is 8 in process 0, but 12", {}
    yield "individuals", "train_search", search, ["--pop_size", 6], "args/pop_size is 4 in process 0, but 6", {}
    yield "reports", "train_search", search, ["--report_freq", 1], "args/report_freq is 50 in process 0, but 1", {}
    yield "initial weights", "train_search", search, [], "weights is '", {"other_weights": True}


def test_processes_that_disagree(process, tmp_path, make_images):
    """A new run that would train nonsense, or end in a crash of torch, does not begin: one line says why."""
    cases = list(disagreements(tmp_path, make_images))
    for i, (what, script, argv, also, says, last) in enumerate(few(cases, [cases[0], cases[-1]])):
        output, folder = tmp_path / f"output{i}", tmp_path / f"{i}"
        argv = [*argv, "--dir", folder]
        codes = in_two(process, script, argv, output, last=last, second=[*argv, *also])
        lines = [line.strip(" \0") for line in output.read_text().splitlines()]
        errors = [line for line in lines if line.startswith("error: ")]
        assert codes == [2, 2] and len(errors) == 2 and errors[0] == errors[1], (what, output.read_text())
        assert says in errors[0] and " in process 1" in errors[0] and "Traceback" not in output.read_text(), errors
        assert not list(folder.glob("*/checkpoint.pt")) and (what == "initial weights" or not folder.exists())
        COUNTS["processes that disagree"]["refused in one line, exit 2"] += 1


@pytest.mark.slow
def test_killed_with_workers(photographs, process, tmp_path):
    """After kill -9 the two processes that read its images live on for some seconds; it can be resumed at once."""
    argv, expected = photographs
    for i in range(few(4, 1)):
        output = tmp_path / f"output{i}"
        running = process("train", [*argv, "--dir", tmp_path / f"{i}"], output)
        while not output.exists() or "step" not in output.read_text():
            time.sleep(0.01)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(running.pid, signal.SIGKILL)
        running.join(120)
        assert any(Path(f"/proc/{child}").exists() for child in children)
        (run,) = (tmp_path / f"{i}").iterdir()
        running = process("train", ["--resume", run], output)
        running.join(120)
        assert running.exitcode == 0, output.read_text()
        assert_same_run(run, expected)
        COUNTS["kill -9 while others read images"]["continued at once, bit-identical"] += 1


# ---- lost streams and terminals

LOST = [(name, how) for name in ("stdout", "stderr") for how in ("head -1", "full disk", "closed")]


def test_lost_streams(whole, process, tmp_path):
    script, expected, _, _ = whole
    for i, (name, how) in enumerate(few(LOST, LOST[:1])):
        running = process(script, [*ARGUMENTS[script], "--dir", tmp_path / f"{i}"], lost={name: how})
        running.join(120)
        assert running.exitcode == 0, (name, how)
        (run,) = (tmp_path / f"{i}").iterdir()
        assert_same_run(run, expected)
        logs = [(folder / "log.txt").read_text().splitlines() for folder in (run, expected)]
        assert len(logs[0]) == len(logs[1]) > 5 and logs[0][-1].endswith(f"report: {run}/report.html")
        COUNTS["stdout or stderr lost"]["training goes on, every line in log.txt"] += 1


def test_closed_terminals(whole, process, tmp_path):
    """SIGHUP, and nothing can be printed any more; under nohup it is ignored."""
    script, expected, _, _ = whole
    gone = dict.fromkeys(("stdout", "stderr"), "head -1")
    for i, call in enumerate(few([1, 2, 4, 7], [3])):
        argv = [*ARGUMENTS[script], "--dir", tmp_path / f"{i}"]
        running = process(script, argv, lost=gone, signal_at=(call, signal.SIGHUP))
        running.join(120)
        assert running.exitcode == 129
        (run,) = (tmp_path / f"{i}").iterdir()
        assert "interrupted in " in (run / "log.txt").read_text().splitlines()[-1]
        running = process(script, ["--resume", run], ignored=[signal.SIGHUP], signal_at=(1, signal.SIGHUP))
        running.join(120)
        assert running.exitcode == 0
        assert_same_run(run, expected)
        COUNTS["terminal closed (SIGHUP)"]["saved, exit 129; continued, bit-identical"] += 1


def test_ctrl_c_while_torch_is_imported(tmp_path):
    luck, script = random.Random(3), ROOT / "train_search.py"
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    for _ in range(few(15, 1)):
        starting = subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed
        )
        while "numpy" not in Path(f"/proc/{starting.pid}/maps").read_text():  # torch comes after it
            time.sleep(0.005)
        time.sleep(luck.uniform(0, 1))
        starting.send_signal(signal.SIGINT)
        assert starting.communicate(timeout=60) == ("", "interrupted\n") and starting.returncode in (-2, 130)
        COUNTS["Ctrl-C during the imports"]["one line"] += 1


# ---- too little memory


@pytest.fixture(scope="module")
def photographs(process, tmp_path_factory):
    """(arguments of a retraining whose images two worker processes read, its directory when it was left alone)."""
    tmp_path, luck = tmp_path_factory.mktemp("photographs"), np.random.RandomState(5)
    root = tmp_path / "images"
    for place in [f"train/{i % 3}/{i}" for i in range(24)] + [f"val/{i % 3}/{i}" for i in range(6)]:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(luck.randint(0, 256, (70, 90, 3)).astype(np.uint8)).save(root / f"{place}.png")
    argv = "--arch EvNASB --dataset imagenet --batch_size 4 --init_channels 2 --layers 1 --device cpu".split()
    argv += ["--epochs", 2, "--data", root, "--report_freq", 1, "--workers", 2]
    running = process("train", [*argv, "--dir", tmp_path / "whole"])
    running.join(120)
    assert running.exitcode == 0
    return argv, next((tmp_path / "whole").iterdir())


def test_killed_workers(photographs, process, tmp_path):
    (argv, expected), luck = photographs, random.Random(4)
    for i in range(few(8, 1)):
        output = tmp_path / f"output{i}"
        running = process("train", [*argv, "--dir", tmp_path / f"{i}"], output)
        while not output.exists() or "step" not in output.read_text():
            time.sleep(0.01)
        time.sleep(luck.uniform(0, 0.2))
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(luck.choice(children)), signal.SIGKILL)
        running.join(120)
        assert running.exitcode == 2 and "--workers" in one_line(output), output.read_text()
        (run,) = (tmp_path / f"{i}").iterdir()
        running = process("train", ["--resume", run], output)
        running.join(120)
        assert running.exitcode == 0
        assert_same_run(run, expected)
        COUNTS["image-reading process killed"]["one line, exit 2; continued, bit-identical"] += 1


def test_small_shared_memory(photographs, process, tmp_path):
    with disk(tmp_path / "disk", 1):  # or this test cannot mount a small one either
        pass
    argv, expected = photographs
    for i, size in enumerate(few([64, 512, 1024, 2048], [1024])):  # KiB; a batch has 2352
        output = tmp_path / f"output{i}"
        line = refused_write(process, "train", [*argv, "--dir", tmp_path / f"{i}"], output, shared_memory=size)
        assert "/dev/shm" in line and "--workers" in line
        (run,) = (tmp_path / f"{i}").iterdir()
        running = process("train", ["--resume", run, "--workers", 0], shared_memory=size)
        running.join(120)
        assert running.exitcode == 0
        assert_same_run(run, expected)
        COUNTS["too little shared memory"]["one line, exit 2; continued with --workers 0, bit-identical"] += 1


def test_too_little_memory(whole, process, tmp_path):
    script = whole[0]
    argv = [*ARGUMENTS[script], "--init_channels", 128, "--epochs", 1, "--dir", tmp_path / "runs"]
    for size in few(range(0, 160, 10), [40]):  # MiB
        output = tmp_path / f"output{size}"
        running = process(script, argv, output, memory=size << 20)
        running.join(120)
        if running.exitcode == -signal.SIGSEGV:  # C++ code that does not look whether it got its memory: torch's fault
            COUNTS["too little memory"]["torch crashed"] += 1
            continue
        assert running.exitcode == 2, output.read_text()
        assert "out of memory: " in one_line(output) and "--batch_size" in one_line(output)
        COUNTS["too little memory"]["one line, exit 2"] += 1
    assert COUNTS["too little memory"]["one line, exit 2"] >= few(12, 0)
