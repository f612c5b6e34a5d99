"""A run's directory: arguments, log, history, checkpoints, TensorBoard, and how to continue. Rank 0 alone writes.

args.json  log.txt  history.jsonl  checkpoint.pt  checkpoint.prev.pt  weights/  runs/  (and what the script adds)
"""

import argparse
import contextlib
import copy
import datetime
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

from support import distributed, signals, weights
from support.files import (
    UserError,
    append_line,
    atomic_write,
    check_history_row,
    end_last_line,
    keep_as,
    make_folder,
    open_regular,
    quoted,
    read_bytes,
    read_history,
    read_json,
    remove_temporary_files,
    sync_folder,
    write_json,
)

MAGIC = b"EvNAS checkpoint 1 "  # the number changes when a checkpoint's content does
PATH_ARGUMENTS = {"data", "api_path", "split_file"}  # a run is bound to what lies there
# Arguments that change the result by rounding at most: a resumed run may have other ones.
FREE_ARGUMENTS = {"device", "gpu", "compile", "cuda_graph", "checkpoint", "image_cache", "workers", "report_freq"}
FREE_ARGUMENTS |= {"self_check"}
FREE_ARGUMENTS |= PATH_ARGUMENTS | {"resume"}
CHECKED_ARGUMENTS = {"config_path", "parallel"}  # compared with the others where they are given, and not saved
OLDER_VALUES = {"seed_scheme": 1}  # of arguments that the runs of older versions lack, if not today's default
NAME_ARGUMENTS = {"dir", "run_name", "save"}  # where a run was made: it may have been moved since
# What a new run finds in its directory where an earlier one ended before its first checkpoint.
BEGUN = {"args.json", "log.txt"}


def parse(parser, argv):
    """Parse a command line; with --resume RUN_DIR the saved arguments are the defaults, before those of new flags.

    Raises UserError for an argument that is given, differs from the saved one and could change the result, and where
    args.json holds what the parser refuses or the checkpoint was not made with.
    """
    args = parser.parse_args(argv)
    if args.resume is None:
        return args
    path = Path(args.resume) / "args.json"
    with required_file():
        content = read_json(path)
    saved = content.get("args") if isinstance(content, dict) and content.get("prog") == parser.prog else None
    if not isinstance(saved, dict):
        raise UserError(f"{args.resume} holds no run of {parser.prog}: {path} says otherwise")
    unknown = ", ".join(f"--{name:.40}" for name in saved if name not in args)
    if unknown:
        raise UserError(f"{args.resume} was started by another version of the program, which had {unknown:.200}")
    older = {name: value for name, value in OLDER_VALUES.items() if name in args and name not in saved}
    try:
        saved = parser.parse_args(command_line(parser, saved | older))
    except UserError as error:
        raise UserError(f"{path} is damaged or of another version of the program: {str(error):.200}") from error
    args = parser.parse_args(argv, copy.copy(saved))  # what is given replaces what was saved
    for name, value in vars(args).items():
        if name in FREE_ARGUMENTS | CHECKED_ARGUMENTS or value == getattr(saved, name):
            continue
        before = getattr(saved, name)
        raise UserError(f"--{name} {value}: {args.resume} was started with {before}; leave the argument out")
    # Sums are split by threads, so a CPU run is bit-identical only with as many of them.
    threads = content.get("threads", torch.get_num_threads())
    if type(threads) is not int or not 0 < threads < 10_000:
        raise UserError(f'{path} is damaged: "threads" is no number of threads')
    now = {name: value for name, value in bound_arguments(saved).items() if name in content["args"]}
    before = load_checkpoint(path.with_name("checkpoint.pt"))["bound"]
    check_bound(path, difference({"args": now, "threads": threads}, before, plain))
    torch.set_num_threads(threads)
    return args


def command_line(parser, values):
    """Return the words that `parser` turns into `values`, {name: value}, so that they pass its types and choices."""
    words = []
    for name, value in values.items():
        if isinstance(value, (dict, list)):
            raise UserError(f"--{name} is no single value")
        if isinstance(value, bool):
            if value is not parser.get_default(name):
                words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def bound_arguments(args):
    """Return the arguments that a run is bound to, {name: value}."""
    return {name: value for name, value in vars(args).items() if name not in FREE_ARGUMENTS | NAME_ARGUMENTS}


def difference(now, before, view):
    """Return, as text, the first place where `now` and `before`, nested dicts and lists, differ by `view`, or None."""
    found = first_difference(now, before, view)
    return found and f"{found[0]} is {found[2]!r:.100} in its checkpoint, but {found[1]!r:.100} now"


def first_difference(now, before, view, name=""):
    """Return (name, view of `now`, view of `before`) where nested dicts and lists first differ by `view`, or None.

    What one of two dicts lacks is not compared. `before` may be hostile, `now` is not.
    """
    if isinstance(now, dict) and isinstance(before, dict):
        pairs = [(key, now[key], before[key]) for key in now if key in before]
    elif isinstance(now, list) and isinstance(before, list):
        pairs = [(i, *pair) for i, pair in enumerate(itertools.zip_longest(now, before))]
    elif view(now) == view(before):
        return None
    else:
        return name, view(now), view(before)
    found = (first_difference(new, old, view, f"{name}/{key}".lstrip("/")) for key, new, old in pairs)
    return next(filter(None, found), None)


def plain(value):
    return value if value is None or isinstance(value, (str, int, float)) else type(value)


def kind(value):
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.layout} {list(value.shape)}"
    return type(value)


def bound_to(args, bound):
    """Return what a run is bound to: its arguments, the number of threads, and `bound`, all of which JSON can hold."""
    return {"args": bound_arguments(args), "threads": torch.get_num_threads(), **bound}


NEW = "new run"  # what messages call it: its directory may have another name in each process


def check_alike(where: str | os.PathLike, value: dict) -> None:
    """Check that `value`, which JSON can hold, is the same in all processes of a run.

    Every process has to call this. Raises UserError in each of them, with the first difference and its rank.
    """
    texts = distributed.same_everywhere(json.dumps(value))
    if texts is None:
        return
    rank = next(rank for rank, text in enumerate(texts) if text != texts[0])
    first, other = json.loads(texts[0]), json.loads(texts[rank])
    name, *values = first_difference(first, other, plain) or ("what they were given", "one thing", "another")
    raise UserError(
        f"{where}: the processes do not agree: {name} is {values[0]!r:.100} in process 0, but "
        f"{values[1]!r:.100} in process {rank}; start all of them with the same arguments, data and code"
    )


def check_arguments_alike(args: argparse.Namespace) -> None:
    """Check that all processes of a run were given the same arguments, but for paths; call it once they have met.

    Where they wait for each other depends on the arguments. Raises UserError in all of them.
    """
    also = {"report_freq": args.report_freq}  # it says when processes ask each other whether to stop
    check_alike(args.resume or NEW, {"resumes": bool(args.resume), "args": bound_arguments(args) | also})


def check_bound(path, differing):
    """Raises UserError if there is a difference to what a run is bound to."""
    if differing:
        raise UserError(f"{path}: {differing}; a run goes on only as it began: restore that, or start a new run")


@contextlib.contextmanager
def required_file():
    """Read, in the block, a file without which a run cannot continue: a UserError then also says what to do."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; a run cannot continue without it: restore it, or start a new run") from error


class Run:
    """An open run directory, locked against a second process. `completed` generations or epochs are in `state`.

    Made by `Run.create` or `Run.resume`; `state` is what the last checkpoint holds, {} in a new run; `rows` are those
    of the history. The checkpoint is the truth: whatever else is in the directory follows from it.
    """

    def __init__(self, path):
        self.path, self.state, self.completed = Path(path), {}, 0
        self.rows = []
        self.writes = distributed.rank() == 0
        self._board = None
        if self.writes:
            refuse_links(self.path)
            self._lock = lock(self.path)
            try:
                for folder in (self.path, self.path / "weights", self.path / "population"):
                    remove_temporary_files(folder)
                end_last_line(self.path / "log.txt")
            except BaseException:
                self._lock.close()
                raise
        self._signals = signals.catch()

    @classmethod
    def create(cls, parent, name, args, prog, *, new_name=True, **bound):
        """Make PARENT/NAME and write args.json, with `bound`: what it is bound to beside them. Raises UserError.

        Where it exists, with `new_name` -2, -3 .. is put behind the name; else only a run without a checkpoint may be
        there, which begins anew: what it has left is moved into PARENT/NAME/old-1 (-2, -3 ..).
        """
        check_alike(NEW, bound_to(args, bound))
        path = Path(parent) / name
        if distributed.rank() == 0:
            path = make_directory(path, new_name)
        run = cls(path)
        run.bound = json.dumps(bound_to(args, bound))
        if run.writes:
            try:
                set_aside(run)
            except BaseException:
                run.close()
                raise
            paths = {name: os.path.abspath(p) for name, p in vars(args).items() if name in PATH_ARGUMENTS and p}
            about = bound | {"prog": prog, "command": " ".join(sys.argv), "args": vars(args) | paths}
            about |= {"threads": torch.get_num_threads(), "processes": distributed.world_size()}
            about |= {"versions": versions(), "git": git_revision()}
            about["started"] = datetime.datetime.now().isoformat(timespec="seconds")
            write_json(run.path / "args.json", about)
        return run

    @classmethod
    def resume(cls, path, args, **bound):
        """Open an earlier run at its last checkpoint; `restore` is next. Raises UserError, also for other `bound`."""
        check_alike(path, bound_to(args, bound))
        run = cls(path)
        try:
            run.bound = json.dumps(bound_to(args, bound))
            run.state = load_checkpoint(run.path / "checkpoint.pt")
            check_bound(run.path, difference(json.loads(run.bound), run.state["bound"], plain))
            run.completed, run.rows = run.state["completed"], run.state.pop("history")
            if run.rows is None:  # a checkpoint of an earlier version
                with required_file():
                    run.rows = read_history(run.path, run.completed) if run.completed else []
        except BaseException:
            run.close()
            raise
        return run

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Close the run; after a second Ctrl-C, say how to continue and exit with 130."""
        with contextlib.closing(self):
            if kind is KeyboardInterrupt and (self.path / "checkpoint.pt").exists():
                self.log_interruption("at once")
                raise SystemExit(130)

    def close(self):
        signals.release(self._signals)
        if self._board:
            self._board.close()
        if self.writes:
            self._lock.close()

    def log(self, text, file=None):
        """Print a line, above any progress bar, and add it to log.txt."""
        if self.writes:
            append_line(self.path / "log.txt", f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}")
            distributed.say(text, file)

    def record(self, step, entry):
        """Add one row to the history, which the next checkpoint will hold, to history.jsonl, and to TensorBoard."""
        if not self.writes:
            return
        self.rows.append(entry)
        append_line(self.path / "history.jsonl", json.dumps(entry), sync=True)
        self._add_to_board(step, entry)

    def _add_to_board(self, step, entry):
        if self._board is None:
            self._board = open_board(self)
        if self._board:
            for name, value in flatten(entry):
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def save_weights(self, network, name, about):
        """Write weights/NAME, a plain state dict, and what `about` says of it beside it."""
        if self.writes:
            make_folder(self.path / "weights")
            weights.save_weights(network, self.path / "weights" / name, about)

    def save_checkpoint(self, completed, state):
        """Write checkpoint.pt, keeping the one before as checkpoint.prev.pt; call it before what follows from it.

        It holds the rows of the history. So a crash at any moment leaves files that are as old as the checkpoint or
        older, and `restore` has them made anew.
        """
        self.completed = completed
        if not self.writes:
            return
        content = io.BytesIO()
        history = json.dumps(self.rows[:completed])
        torch.save({**state, "completed": completed, "bound": self.bound, "history": history}, content)
        content = content.getbuffer()
        path = self.path / "checkpoint.pt"
        if path.exists():
            keep_as(path, self.path / "checkpoint.prev.pt")
        with atomic_write(path) as file:
            file.write(MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n")
            file.write(content)

    def restore(self, state):
        """Load the last checkpoint into `state` (state_dict, load_state_dict); a new run saves it as its first one.

        After that the history, the log and TensorBoard are those of the checkpoint again. Raises UserError where the
        checkpoint does not fit (another run's, or changed arguments), and where processes begin with other weights.
        """
        if self.state:
            try:
                expected = state.state_dict()
                expected.pop("optimizer")  # it has no momentum yet
                if differing := difference(expected, self.state, kind):
                    raise ValueError(differing)
                state.load_state_dict(self.state)
            except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"{self.path}/checkpoint.pt does not fit the arguments in args.json or this version of the program:"
                    f" restore the files, or start a new run ({' '.join(str(error).split()):.200})"
                ) from error
        beginning = {"weights": tensors_digest(state.state_dict()["network"]), "completed": self.completed}
        check_alike(self.path if self.state else NEW, beginning)
        if not self.state:
            self.save_checkpoint(0, state.state_dict())
        elif self.writes:
            self._follow_checkpoint()

    def _follow_checkpoint(self):
        """Make history.jsonl, log.txt and TensorBoard those of the checkpoint."""
        with atomic_write(self.path / "history.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        unit = "generation" if any("generation" in row for row in self.rows) else "epoch"
        self.log(f"continues after {unit} {self.completed}" if self.completed else "continues from the beginning")
        if not self.state["bound"]:
            self.log("note: this run is of an older version: whether its data have changed since is not known")
        events = list((self.path / "runs").glob("events.out.tfevents.*"))
        if events or self.rows:
            self._board = open_board(self)
        for row in self.rows:
            self._add_to_board(row[unit], row)
        for path in events if self._board else ():
            path.unlink()

    @contextlib.contextmanager
    def saving_when_interrupted(self, state):
        """Save `state()` when a signal interrupts the block, say how to continue, and exit with 128 + the signal."""
        try:
            yield
        except signals.Interrupted as place:
            self.save_checkpoint(self.completed, state())
            self.log_interruption(f"in {place}")
            raise SystemExit(128 + (signals.received or signal.SIGTERM)) from None

    def log_interruption(self, place):
        """Say that the run is interrupted, and with which command it continues."""
        if self.writes:
            prog = read_json(self.path / "args.json")["prog"]
            self.log(
                f"interrupted {place}; continue with: {shell_command(prog, '--resume', self.path)}", file=sys.stderr
            )


def shell_command(prog, *words):
    """Return the shell command that starts script or module `prog` with these words, from the current directory."""
    root = os.path.relpath(Path(__file__).resolve().parents[1])
    if not prog.startswith("python"):
        prog = f"python {quoted(os.path.normpath(os.path.join(root, prog)))}"
    elif root != ".":
        prog = f"PYTHONPATH={quoted(root)} {prog}"
    return " ".join([prog, *map(quoted, words)])


def refuse_links(path):
    """Raise UserError where a folder of a run is a symbolic link: what is written would land elsewhere."""
    for name in ("weights", "population", "runs"):
        if (path / name).is_symlink():
            raise UserError(f"{path / name} is a symbolic link, through which nothing is written: remove it")


def lock(path):
    """Keep a second process out of a run directory, for as long as this one lives. Raises UserError."""
    try:
        file = open_regular(path / ".lock", "a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A forked process, such as one that reads images, would hold the lock for as long as it outlives this one.
        os.register_at_fork(after_in_child=file.close)
    except BlockingIOError:
        raise UserError(f"{path} is in use by another process") from None
    except OSError as error:
        raise UserError(f"cannot open the run directory {path}: {error.strerror}") from error
    return file


def make_directory(path, new_name=True):
    """Make `path`, or with `new_name` path-2, path-3 .. where it exists: two runs of the same second get one each."""
    try:
        make_folder(path.parent)
        if not new_name:
            make_folder(path)
            return path
        for name in (path.name, *(f"{path.name}-{i}" for i in range(2, 1000))):
            with contextlib.suppress(FileExistsError):
                path.with_name(name).mkdir()
                sync_folder(path.parent)
                return path.with_name(name)
    except OSError as error:
        raise UserError(f"cannot make the run directory {path}: {error.strerror}") from error
    raise UserError(f"cannot make the run directory {path}: there are too many of that name")


def set_aside(run: "Run") -> None:
    """Move what an earlier run left in the directory of a new one into old-1 (-2, -3 ..) there.

    Raises UserError where that can be continued, and for a directory that is not a run's. Arguments and a log alone
    stay, and retrainings, which have copies of their own of what they need.
    """
    here = {name for name in os.listdir(run.path) if not re.fullmatch(r"\.lock|old-\d+", name)}
    last, previous = run.path / "checkpoint.pt", run.path / "checkpoint.prev.pt"
    if last.name in here:
        raise UserError(f"{run.path} holds a run; continue it with --resume, or choose another name")
    if previous.name in here:
        how = f"mv {quoted(previous)} {quoted(last)}"
        raise UserError(f"{run.path} holds a run; continue it with --resume after {how}, or choose another name")
    if here and "args.json" not in here:
        raise UserError(f"{run.path} holds other files, or choose another name")
    left = {name for name in here if not name.startswith("eval-")}
    if left <= BEGUN:
        return
    aside = next(path for i in itertools.count(1) if not (path := run.path / f"old-{i}").exists())
    make_folder(aside)
    # args.json is moved last: until then this remains the directory of a run.
    for name in sorted(left, key=lambda name: name == "args.json"):
        os.rename(run.path / name, aside / name)
    sync_folder(aside)
    sync_folder(run.path)
    run.log(f"note: {run.path} had files of an earlier run without a checkpoint: they are in {aside} now")


def is_finished(args: argparse.Namespace, files: list) -> bool:
    """Tell whether the run that `args.resume` names, if it names one, has come to its end.

    Then it has finished args.epochs generations with these arguments, has the history of its checkpoint and the other
    `files`, and a report that was drawn after the last checkpoint. Raises UserError.
    """
    if not args.resume:
        return False
    path = Path(args.resume)
    state = load_checkpoint(path / "checkpoint.pt")
    if state["completed"] != args.epochs or difference({"args": bound_arguments(args)}, state["bound"], plain):
        return False
    if "partial" in state or not all((path / name).is_file() for name in files):
        return False
    try:
        rows = read_history(path)
        drawn = os.stat(path / "report.html").st_mtime_ns >= os.stat(path / "checkpoint.pt").st_mtime_ns
    except (UserError, OSError):
        return False
    if state["history"] is None:
        return drawn and len(rows) == args.epochs
    return drawn and json.dumps(rows) == json.dumps(state["history"])


def load_checkpoint(path):
    """Return what save_checkpoint wrote, with "history" None where an earlier version did.

    Raises UserError naming the file, what is wrong, and the previous one.
    """
    previous = path.with_name("checkpoint.prev.pt")
    hint = f"; to continue from the one before: mv {quoted(previous)} {quoted(path)}" if previous.exists() else ""
    try:
        data = read_bytes(path)
    except UserError as error:
        raise UserError(f"{error}{hint or '; the run ended before its first checkpoint: start a new one'}") from error
    header, _, content = data.partition(b"\n")
    if not header.startswith(MAGIC):
        raise UserError(f"{path} is damaged or was written by another version{hint}")
    if hashlib.sha256(content).hexdigest().encode() != header.removeprefix(MAGIC):
        raise UserError(f"{path} is damaged: its checksum does not match{hint}")
    try:
        state = weights.unpickle_tensors(io.BytesIO(content))
    except Exception as error:  # a checksum does not say who wrote it
        raise UserError(f"{path} does not hold tensors and numbers alone{hint}") from error
    try:
        bound, completed = json.loads(state.get("bound", "{}")), state["completed"]
        history = json.loads(state["history"]) if "history" in state else None
        rows = []
        for row in history or []:
            check_history_row(row, rows, "a row", in_order=True)
            rows.append(row)
        rows_fit = history is None or (isinstance(history, list) and len(history) == completed)
        if type(completed) is int and completed >= 0 and isinstance(bound, dict) and rows_fit:
            return state | {"bound": bound, "history": history}
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        pass  # none of it is what save_checkpoint writes
    raise UserError(f"{path} is damaged or was written by another version{hint}")


def open_board(run):
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(run.path / "runs")
    except ImportError:
        run.log("TensorBoard is not installed: no curves in runs/ (pip install tensorboard)")
    except UnicodeError:
        run.log("TensorBoard writes to no folder whose name is not UTF-8: no curves in runs/")
    return False


def tensors_digest(tensors: dict) -> str:
    """Return the SHA-256 of {name: tensor}: names and bits."""
    sha = hashlib.sha256()
    for name, value in tensors.items():
        sha.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def versions():
    """Return those of Python and the packages that figures depend on, and of the CUDA that torch was built for."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"python": platform.python_version(), **packages, "cuda": torch.version.cuda}


def git_revision():
    """Return the project's commit, with a + where files differ from it, or None outside a checkout."""
    # Without --git-dir, git would also find a repository that the code merely lies in.
    command = "git --git-dir=.git describe --always --exclude=* --abbrev=12 --dirty=+".split()
    settings = dict(cwd=Path(__file__).parents[1], text=True, stderr=subprocess.DEVNULL, timeout=10)
    try:
        return subprocess.check_output(command, **settings).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def flatten(entry, prefix=""):
    """Yield the numbers in nested dicts, as ("a/b", number)."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value
