"""Read the arguments of a resumed run from args.json, and compare them with the checkpoint.

A run may only continue under the conditions it started with. The run's fingerprint records these
conditions: the arguments that can change the result, the number of threads, and what the program
adds, such as digests of the data. Checkpoints hold the fingerprint under the key "bound".
"""

import argparse
import contextlib
import copy
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from support import checkpoints
from support.compare import compare_values
from support.files import UserError, quoted, read_json
from support.settings import RunSettings

MOST_THREADS = 10_000


class Saved(NamedTuple):
    """The content of args.json."""

    values: dict[str, object]  # the arguments as args.json has them
    args: argparse.Namespace  # the parsed arguments; those missing in args.json have their defaults
    threads: int


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, settings: RunSettings) -> argparse.Namespace:
    """Parse a command line.

    With --resume RUN_DIR, the saved arguments of that run are the defaults, and PyTorch's number of
    threads is set to the run's. The parser must have the argument --resume.

    Raises UserError if an argument on the command line differs from the saved one and could change
    the result. Also raises UserError if the parser refuses the content of args.json, or if that
    content contradicts the checkpoint.
    """
    args = parser.parse_args(argv)
    if args.resume is None:
        return args
    path = Path(args.resume) / "args.json"
    saved = load_saved(parser, path, settings, known=vars(args))
    args = parser.parse_args(argv, copy.copy(saved.args))  # the command line replaces saved values
    check_overrides(args, saved.args, settings)
    check_against_checkpoint(path, saved, settings)
    return args


def load_saved(parser: argparse.ArgumentParser, path: Path, settings: RunSettings, known: Collection[str]) -> Saved:
    """Read the arguments in the file `path` (args.json) and parse them again.

    `known` are the names of the parser's arguments. Raises UserError.
    """
    with required_file():
        content = read_json(path)
    values = content.get("args") if isinstance(content, dict) and content.get("prog") == parser.prog else None
    if not isinstance(values, dict):
        raise UserError(f"{path}: this is not a run of {parser.prog}. Resume a run with the command that started it")
    unknown = ", ".join(f"--{name:.40}" for name in values if name not in known)
    if unknown:
        raise UserError(
            f"{path}: written by another version of the program, which had {unknown:.200}. "
            "Resume the run with that version"
        )
    missing = {
        name: value for name, value in settings.values_if_missing.items() if name in known and name not in values
    }
    try:
        args = parser.parse_args(command_line(parser, values | missing))
    except UserError as error:
        raise UserError(f"{path}: damaged, or written by another version of the program: {str(error):.200}") from error
    threads = content.get("threads")
    if type(threads) is not int or not 0 < threads < MOST_THREADS:
        raise UserError(f'{path}: damaged: "threads" is not a number of threads. Restore the file, or start a new run')
    return Saved(values, args, threads)


def command_line(parser: argparse.ArgumentParser, values: dict[str, object]) -> list[str]:
    """Return a command line that `parser` parses into `values`.

    Parsing it checks the saved values against the parser's types and choices. Raises UserError for
    a value that a command line cannot express.
    """
    words = []
    for name, value in values.items():
        if isinstance(value, (dict, list)):
            raise UserError(f"--{name} is not a single value")
        if isinstance(value, bool):
            if value is not parser.get_default(name):
                words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def check_overrides(args: argparse.Namespace, saved: argparse.Namespace, settings: RunSettings) -> None:
    """Raise UserError if an argument on the command line differs from the saved one and could
    change the result.
    """
    for name, value in vars(args).items():
        if name in settings.free_arguments | settings.unsaved_arguments or value == getattr(saved, name):
            continue
        before = getattr(saved, name)
        advice = "Leave the argument out"
        if hasattr(args, settings.new_run_argument):
            advice += f", or start a new run with --{settings.new_run_argument} {quoted(args.resume)}"
        raise UserError(f"--{name} {value}: {args.resume} was started with {before}. {advice}")


def check_against_checkpoint(path: Path, saved: Saved, settings: RunSettings) -> None:
    """Compare the saved arguments with the checkpoint's, and set the saved number of threads.

    PyTorch splits sums among threads. So a resumed run on the CPU is bit-identical only with the
    same number of threads. Raises UserError.
    """
    now = {name: value for name, value in fixed_arguments(saved.args, settings).items() if name in saved.values}
    before = checkpoints.load(path.with_name("checkpoint.pt"), settings)["bound"]
    check_fingerprint(path, {"args": now, "threads": saved.threads}, before)
    torch.set_num_threads(saved.threads)


@contextlib.contextmanager
def required_file() -> Iterator[None]:
    """Within this block, each UserError also says that a run cannot continue without the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}. A run cannot continue without this file: restore it, or start a new run") from error


# ---- fingerprints


def fixed_arguments(args: argparse.Namespace, settings: RunSettings) -> dict[str, object]:
    """Return the arguments that a resumed run must not change, {name: value}."""
    changeable = settings.free_arguments | settings.place_arguments
    return {name: value for name, value in vars(args).items() if name not in changeable}


def fingerprint_of(
    args: argparse.Namespace, threads: int, inputs: dict[str, object], settings: RunSettings
) -> dict[str, object]:
    """Return the fingerprint of a run, in a form that JSON can hold.

    `inputs` holds what the run depends on besides its arguments, such as digests of its data.
    """
    return {"args": fixed_arguments(args, settings), "threads": threads, **inputs}


def check_fingerprint(path: Path, now: dict[str, object], before: dict[str, object]) -> None:
    """Raise UserError if the checkpoint's fingerprint `before` differs from `now`.

    The message begins with `path`.
    """
    if found := compare_values(now, before):
        raise UserError(
            f"{path}: {found.name} is {found.now!r:.100} now, but {found.before!r:.100} in the run's checkpoint. "
            "A run can only continue with its original settings and data: restore them, or start a new run"
        )
