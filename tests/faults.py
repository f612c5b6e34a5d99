"""What the tests of faults share: processes under conditions, an uninterrupted run, outcomes."""

import collections
import contextlib
import ctypes
import hashlib
import importlib
import io
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import conftest
import pytest
import torch
from torch.utils.data import dataloader

from run_settings import SETTINGS
from support import files, signals

from helpers import search_line, train_line

ROOT = Path(__file__).resolve().parents[1]
FULL = os.environ.get("EVNAS_FAULTS") == "full"
SEARCH = search_line(cutout_length=4, layers=1)
RETRAIN = train_line("--cutout", drop_path_prob=0.5, layers=1, batch_size=32)  # three steps an epoch
ARGUMENTS = {"train_search": SEARCH, "train": RETRAIN}
SCRIPTS = list(ARGUMENTS) if FULL else ["train"]
COUNTS = collections.defaultdict(collections.Counter)  # fault -> outcome -> how often


quick_report = (lambda test: test) if FULL else pytest.mark.usefixtures("quick_report")


def few(full, short):
    return full if FULL else short


@pytest.fixture(scope="module", autouse=True)
def counted():
    """Prints the table of faults and outcomes at the end (pytest -s)."""
    yield
    print(f"\n\n{'fault':62} {'tried':>5}  outcome")
    for fault, outcomes in COUNTS.items():
        text = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()) if count)
        print(f"{fault:62} {sum(outcomes.values()):>5}  {text}")
    COUNTS.clear()


@pytest.fixture(scope="module")
def process():
    """`process(script, argv, **conditions)` starts a process, forked from one with torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        # What a run imports (torch._dynamo with its first optimizer): seconds for each process.
        packages = ["torch.utils.tensorboard", "torch._dynamo"]
        packages += ["matplotlib.figure"] if FULL else []  # only one test draws anything
        context.set_forkserver_preload(["faults", "train", "train_search", *packages])

        def start(script, argv, output=os.devnull, **conditions):
            arguments = (script, [str(word) for word in argv], str(output), conditions)
            process = context.Process(target=work, args=arguments)
            process.start()
            return process

        yield start


def exit_code(running, output=os.devnull):
    """The exit code of a process. One that does not end within two minutes is killed and fails."""
    running.join(120)
    if running.exitcode is None:
        running.kill()
        pytest.fail(f"hangs: {Path(output).read_text()}")
    return running.exitcode


def outcome(main, *argv, naming=()):
    """Call `main` and return whether it refused (exit code 2, one line with all of `naming`).

    Anything else fails, and so does a call that takes more than 30 seconds.
    """
    errors = io.StringIO()
    alarm = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(30)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main([str(word) for word in argv])
        return "accepted"
    except SystemExit as stopped:
        text = errors.getvalue()
        assert stopped.code == 2, text
        assert text.startswith("error: "), text
        assert text.count("\n") == 1, text
        assert len(text) < 2000, text
        for name in naming:
            assert str(name) in text, text
        return "refused in one line, exit 2"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)


def saved(value, zipped=True):
    """What torch.save writes."""
    content = io.BytesIO()
    torch.save(value, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


def checkpoint(content):
    """The bytes of a checkpoint with a right checksum."""
    return SETTINGS.checkpoint_magic + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def work(script, argv, output, conditions):
    """Call `main` of a script under conditions, with stdout and stderr in the file `output`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    if not FULL:
        if not conditions.get("drawn"):
            conftest.draw_no_charts()
        # It checks the processes that read images every so many seconds (default 5).
        dataloader._MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.2,)
    if "die_at" in conditions:
        die_at(**conditions["die_at"])
    if "file_size" in conditions:  # bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (conditions["file_size"],) * 2)
    for package in conditions.get("without", []):
        for name in [name for name in sys.modules if f".{name}.".find(f".{package}.") >= 0]:
            del sys.modules[name]
        sys.modules[package] = None
    multiprocessing.set_start_method("fork", force=True)  # as in a script; here it would be this one's own
    os.environ.pop("DISPLAY", None)
    os.environ.update(conditions.get("environment", {}))
    for number in conditions.get("ignored", []):
        signal.signal(number, signal.SIG_IGN)
    if "signal_at" in conditions:
        signal_at(*conditions["signal_at"])
    if "other_weights" in conditions:
        torch.manual_seed = lambda seed: torch.default_generator.manual_seed(seed + 1)
    for name, how in conditions.get("lost", {}).items():
        lose(name, how)
    if "shared_memory" in conditions:  # KiB
        assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
        size = f"size={conditions['shared_memory']}k"
        for mount in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", size, "tmpfs", "/dev/shm"]):
            subprocess.run(["mount", *mount], check=True)
    if "memory" in conditions:  # bytes more than there are
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + conditions["memory"],) * 2)
    importlib.import_module(script).main(argv)


def die_at(call, steps_file=None):
    """Kill this process at the `call`-th step of writing: in a write, after a rename or a flush.

    Writes the numbers of the renames and flushes to `steps_file`.
    """
    calls = 0

    def step(do, half=None):
        nonlocal calls
        calls += 1
        if steps_file and half is None:
            with open(steps_file, "a") as file:
                file.write(f"{calls}\n")
        if calls == call:
            (half or do)()
            os.kill(os.getpid(), signal.SIGKILL)
        return do()

    class File:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            def half():
                self.file.write(content[: len(content) // 2])
                self.file.flush()

            return step(lambda: self.file.write(content), half)

    files.open = lambda path, mode, **how: open(path, mode, **how) if "r" in mode else File(open(path, mode, **how))
    for name in ("replace", "fsync", "link"):
        function = getattr(os, name)
        setattr(os, name, lambda *args, function=function: step(lambda: function(*args)))


def signal_at(call, number):
    """Send this process a signal when it asks for the `call`-th time whether to stop."""
    requested, calls = signals.stop_requested, itertools.count(1)

    def asked(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return requested(*args, **kwargs)

    signals.stop_requested = asked


def lose(name, how):
    """Lose stdout or stderr: it is closed, on a full disk, or a pipe whose reader soon goes."""
    number = {"stdout": 1, "stderr": 2}[name]
    setattr(sys, name, None)
    if how == "closed":
        return os.close(number)
    if how == "full disk":
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    else:
        reader, writer = os.pipe()
        os.dup2(writer, number)
        os.close(writer)
        threading.Thread(target=lambda: (os.read(reader, 1), os.close(reader)), daemon=True).start()
    setattr(sys, name, open(number, "w", closefd=False))


class Whole(NamedTuple):
    """A run that was left alone."""

    script: str
    run: Path  # its directory
    seconds: float  # from its first checkpoint to its end
    steps: list[int]  # the steps of writing (see `die_at`) that were renames or flushes


@pytest.fixture(scope="module", params=SCRIPTS)
def whole(request, process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    steps = dict(call=-1, steps_file=folder / "steps")
    running = process(request.param, [*ARGUMENTS[request.param], "--dir", folder], folder / "output", die_at=steps)
    while not list(folder.glob("*/checkpoint.pt")) and running.is_alive():
        time.sleep(0.01)
    started = time.monotonic()
    assert exit_code(running, folder / "output") == 0, (folder / "output").read_text()
    seconds = time.monotonic() - started
    (run,) = [path for path in folder.iterdir() if path.is_dir()]
    return Whole(request.param, run, seconds, [int(line) for line in (folder / "steps").read_text().split()])
