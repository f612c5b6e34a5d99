"""A run's directory: create or open it, lock it, and write its log, history and checkpoints.

A run directory holds args.json, log.txt, history.jsonl, checkpoint.pt, checkpoint.prev.pt, the
folders weights/ and runs/ (TensorBoard's curves), and the files that a program adds.

Only rank 0 writes files. If a file contradicts the checkpoint, the checkpoint is right: the other
files can be rebuilt from it.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch
from torch import nn

from support import checkpoints, distributed, provenance, signals, weights
from support.agreement import NEW, check_alike
from support.compare import compare_values
from support.files import (
    UserError,
    append_line,
    atomic_write,
    end_last_line,
    make_folder,
    quoted,
    read_history,
    read_json,
    remove_temporary_files,
    step_field,
    sync_folder,
    write_json,
)
from support.resume_args import check_fingerprint, fingerprint_of, fixed_arguments
from support.run_directories import lock, make_directory, refuse_links
from support.settings import RunSettings

# The files of a run that ended before its first checkpoint.
BEGUN = {"args.json", "log.txt"}


class Run:
    """An open run directory, locked against other processes. Made by `Run.create` or `Run.resume`.

    `completed` is the number of steps (such as epochs) that were completed at the last checkpoint.
    `rows` are the rows of the history. `state` is the content of the last checkpoint, or {} in a
    new run. `writes` says whether this process writes files, which only rank 0 does.
    """

    def __init__(self, path: str | os.PathLike, settings: RunSettings) -> None:
        self.path = Path(path)
        self.settings = settings
        self.state: dict = {}
        self.completed = 0
        self.rows: list[dict] = []
        self.writes = distributed.rank() == 0
        self._board = None
        if self.writes:
            refuse_links(self.path, ("weights", *settings.folders, "runs"))
            self._lock = lock(self.path)
            try:
                for folder in (self.path, self.path / "weights", *(self.path / name for name in settings.folders)):
                    remove_temporary_files(folder)
                end_last_line(self.path / "log.txt")
            except BaseException:
                self._lock.close()
                raise
        self._signals = signals.catch()

    @classmethod
    def create(
        cls,
        parent: str | os.PathLike,
        name: str,
        args: argparse.Namespace,
        prog: str,
        settings: RunSettings,
        *,
        inputs: dict[str, object],
        new_name: bool = True,
    ) -> "Run":
        """Make the run directory PARENT/NAME and write args.json. Raises UserError.

        `inputs` holds what the run depends on besides its arguments, such as digests of its data,
        as values for JSON. If the directory exists, -2 (or -3, and so on) is appended to the name.
        With `new_name=False` the name is kept, and an existing directory may only hold a run
        without a checkpoint. The files of that run are moved to PARENT/NAME/old-1 (or old-2, and so
        on).
        """
        fingerprint = fingerprint_of(args, torch.get_num_threads(), inputs, settings)
        check_alike(NEW, fingerprint)
        path = Path(parent) / name
        if distributed.rank() == 0:
            path = make_directory(path, new_name)
        run = cls(path, settings)
        run.fingerprint = json.dumps(fingerprint)
        if run.writes:
            try:
                set_aside(run)
            except BaseException:
                run.close()
                raise
            values = vars(args)
            paths = {name: os.path.abspath(values[name]) for name in settings.path_arguments if values.get(name)}
            write_json(
                run.path / "args.json",
                {
                    **inputs,
                    "prog": prog,
                    "command": " ".join(sys.argv),
                    "args": values | paths,
                    "threads": torch.get_num_threads(),
                    "processes": distributed.world_size(),
                    "versions": provenance.versions(),
                    "git": provenance.git_revision(),
                    "started": datetime.datetime.now().isoformat(timespec="seconds"),
                },
            )
        return run

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike,
        args: argparse.Namespace,
        settings: RunSettings,
        *,
        inputs: dict[str, object],
    ) -> "Run":
        """Open an earlier run at its last checkpoint. Call `restore` next.

        Raises UserError, for example if the arguments, the number of threads or the `inputs` differ
        from the checkpoint's.
        """
        fingerprint = fingerprint_of(args, torch.get_num_threads(), inputs, settings)
        check_alike(path, fingerprint)
        run = cls(path, settings)
        try:
            run.fingerprint = json.dumps(fingerprint)
            run.state = checkpoints.load(run.path / checkpoints.NAME, settings)
            check_fingerprint(run.path, json.loads(run.fingerprint), run.state["bound"])
            run.completed = run.state["completed"]
            run.rows = run.state.pop("history")
        except BaseException:
            run.close()
            raise
        return run

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, exception_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the run. After a second Ctrl-C, log how to continue and exit with code 130."""
        with contextlib.closing(self):
            if exception_type is KeyboardInterrupt and (self.path / checkpoints.NAME).exists():
                self.log_interruption("at once")
                raise SystemExit(130)

    def close(self) -> None:
        """Release the lock, restore the signal handlers, and close TensorBoard's file."""
        signals.release(self._signals)
        if self._board:
            self._board.close()
        if self.writes:
            self._lock.close()

    def log(self, text: str, file: TextIO | None = None) -> None:
        """Print a line above any progress bar, and append it to log.txt. Raises UserError."""
        if self.writes:
            append_line(self.path / "log.txt", f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}")
            distributed.say(text, file)

    def record(self, step: int, entry: dict) -> None:
        """Append one row to the history, to history.jsonl and to TensorBoard's curves.

        The next checkpoint will hold the history.
        """
        if not self.writes:
            return
        self.rows.append(entry)
        append_line(self.path / "history.jsonl", json.dumps(entry), sync=True)
        self._add_to_board(step, entry)

    def _add_to_board(self, step: int, entry: dict) -> None:
        if self._board is None:
            self._board = open_board(self)
        if self._board:
            for name, value in flatten(entry):
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def save_weights(self, network: nn.Module, name: str, about: dict) -> None:
        """Write the network's state dict to weights/NAME, and `about` to a JSON file next to it."""
        if self.writes:
            make_folder(self.path / "weights")
            weights.save_weights(network, self.path / "weights" / name, about)

    def save_checkpoint(self, completed: int, state: dict) -> None:
        """Write checkpoint.pt, and keep the previous one as checkpoint.prev.pt.

        Save the checkpoint before writing any file that can be rebuilt from the checkpoint. After a
        crash, such a file is then never newer than the checkpoint. A resumed run rebuilds files
        that are older than the checkpoint.
        """
        self.completed = completed
        if self.writes:
            checkpoints.save(
                self.path / checkpoints.NAME,
                state,
                completed=completed,
                fingerprint=self.fingerprint,
                rows=self.rows[:completed],
                settings=self.settings,
            )

    def restore(self, state: object) -> None:
        """Load the last checkpoint into `state`, which has state_dict() and load_state_dict().

        A new run saves `state` as its first checkpoint instead. A resumed run also sets
        history.jsonl and TensorBoard's curves back to the checkpoint.

        Raises UserError if the checkpoint does not fit `state`, because it is from another run or
        the arguments have changed. Also raises UserError if processes start with different weights.
        """
        if self.state:
            try:
                expected = state.state_dict()
                expected.pop("optimizer")  # a new optimiser has no momentum buffers to compare
                if found := checkpoints.compare_shapes(expected, self.state):
                    raise ValueError(f"{found.name} is {found.before!r:.100} in the file, not {found.now!r:.100}")
                state.load_state_dict(self.state)
            except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{self.path / checkpoints.NAME}: does not fit the arguments in args.json, or this version of the "
                    f"program ({reason:.200}). Restore the files, or start a new run"
                ) from error
        beginning = {
            "weights": checkpoints.digest_of_tensors(state.state_dict()["network"]),
            "completed": self.completed,
        }
        check_alike(self.path if self.state else NEW, beginning)
        if not self.state:
            self.save_checkpoint(0, state.state_dict())
        elif self.writes:
            self._follow_checkpoint()

    def _follow_checkpoint(self) -> None:
        """Set history.jsonl and TensorBoard's curves back to the checkpoint, and log its step.

        The new curves are complete before the old curves are removed.
        """
        with atomic_write(self.path / "history.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        unit = step_field(self.rows, self.settings)
        self.log(f"continues after {unit} {self.completed}" if self.completed else "continues from the beginning")
        events = list((self.path / "runs").glob("events.out.tfevents.*"))
        if events or self.rows:
            self._board = open_board(self)
        for row in self.rows:
            self._add_to_board(row[unit], row)
        for path in events if self._board else ():
            path.unlink()

    @contextlib.contextmanager
    def saving_when_interrupted(self, state: Callable[[], dict]) -> Iterator[None]:
        """If a signal interrupts the block, save `state()`, log how to continue, and exit.

        The exit code is 128 plus the number of the signal.
        """
        try:
            yield
        except signals.Interrupted as place:
            self.save_checkpoint(self.completed, state())
            self.log_interruption(f"in {place}")
            raise SystemExit(128 + (signals.received or signal.SIGTERM)) from None

    def log_interruption(self, place: str) -> None:
        """Log where the run was interrupted, and the command that continues it."""
        if self.writes:
            prog = read_json(self.path / "args.json")["prog"]
            command = provenance.shell_command(prog, "--resume", self.path)
            self.log(f"interrupted {place}; continue with: {command}", file=sys.stderr)


# ---- earlier and finished runs


def set_aside(run: Run) -> None:
    """Move the files of an earlier run into the folder old-1 (or old-2, ...) of a new run's directory.

    Runs inside the directory stay, because they have copies of everything they need. If args.json
    and log.txt are the only files, they stay too. Raises UserError if the earlier run can be
    continued, or if the directory is not a run directory.
    """
    here = {name for name in os.listdir(run.path) if not re.fullmatch(r"\.lock|old-\d+", name)}
    last = run.path / checkpoints.NAME
    previous = run.path / checkpoints.PREVIOUS_NAME
    if last.name in here:
        raise UserError(f"{run.path}: holds a run. Continue the run with --resume, or choose another name")
    if previous.name in here:
        command = f"mv {quoted(previous)} {quoted(last)}"
        raise UserError(
            f"{run.path}: holds a run. After {command}, continue the run with --resume, or choose another name"
        )
    if here and "args.json" not in here:
        raise UserError(f"{run.path}: holds other files. Empty the directory, or choose another name")
    left = {name for name in here if not name.startswith(run.settings.inner_run_prefix)}
    if left <= BEGUN:
        return
    numbered = (run.path / f"old-{i}" for i in itertools.count(1))
    aside = next(path for path in numbered if not path.exists())
    make_folder(aside)
    # Move args.json last: as long as it is there, the directory is recognised as a run directory.
    for name in sorted(left, key=lambda name: name == "args.json"):
        os.rename(run.path / name, aside / name)
    sync_folder(aside)
    sync_folder(run.path)
    run.log(f"note: moved the files of an earlier run without a checkpoint to {aside}")


def is_finished(
    args: argparse.Namespace, settings: RunSettings, *, completed: int, files: list[str], last_file: str
) -> bool:
    """Return whether `args.resume` is a run that has already finished with these arguments.

    A finished run has a checkpoint of `completed` steps, the same history as the checkpoint, all
    `files`, and a `last_file` that was written after the checkpoint. Without `args.resume` the
    answer is False. Raises UserError.
    """
    if not args.resume:
        return False
    path = Path(args.resume)
    state = checkpoints.load(path / checkpoints.NAME, settings)
    if state["completed"] != completed or "partial" in state:
        return False
    if compare_values({"args": fixed_arguments(args, settings)}, state["bound"]):
        return False
    if not all((path / name).is_file() for name in files):
        return False
    try:
        rows = read_history(path, settings)
        written = os.stat(path / last_file).st_mtime_ns
        saved = os.stat(path / checkpoints.NAME).st_mtime_ns
    except (UserError, OSError):
        return False
    return written >= saved and json.dumps(rows) == json.dumps(state["history"])


# ---- TensorBoard


def open_board(run: Run) -> object:
    """Return a TensorBoard writer for the run's folder runs/.

    If TensorBoard cannot be used, log why and return False.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(run.path / "runs")
    except ImportError:
        run.log("TensorBoard is not installed: no curves in runs/ (pip install tensorboard)")
    except UnicodeError:
        run.log("TensorBoard cannot write to a folder whose name is not UTF-8: no curves in runs/")
    return False


def flatten(entry: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in nested dicts, as ("a/b", number)."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value
