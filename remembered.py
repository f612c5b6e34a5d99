"""What a run remembers of its images: the defaults of commands that continue with the run.

`train.py --dir SEARCH` retrains on the images of the search, and `test_*.py --dir RETRAINING` tests
on those of the retraining. A search with `--init_from SEARCH` takes over all settings of that
search. A flag on the command line wins.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
from run_settings import INPUTS, SETTINGS
from support import distributed, resume_args
from support.files import UserError, quoted, read_json

FLAGS = ("dataset", "data", "image_size")
NOT_GIVEN = object()


def with_flags_of_run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> list[str]:
    """Return the command line `argv` with the flags of the run in --dir in front of it.

    Prints a line that says which flags were taken over. Nothing is taken over if --dir is not given
    or is not a run of this program, if --resume is given, or if --dataset names another data set
    than the run's. Raises UserError if the command does not offer the run's data set.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # argparse keeps what a namespace already has, unless the command line gives another value.
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(FLAGS, NOT_GIVEN)))
    if given.dir is None or getattr(given, "resume", None):
        return argv
    saved = arguments_of(given.dir)
    dataset = saved.get("dataset")
    if given.dataset not in (NOT_GIVEN, dataset) or not isinstance(dataset, str):
        return argv
    if dataset not in datasets.offered_by(parser.prog):
        raise UserError(
            f"{given.dir} used the data set {dataset:.80}, which {parser.prog} does not offer: give --dataset, "
            "or use another script"
        )
    words = []
    for name in FLAGS:
        value = saved.get(name)
        if getattr(given, name) is NOT_GIVEN and type(value) in (str, int):
            words.append(f"--{name}={value}")
    if words:
        distributed.say(f"as in {given.dir}: {' '.join(map(quoted, words))}")
    return [*words, *argv]


def with_settings_of_search(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> list[str]:
    """Return the command line `argv` with the settings of the search in --init_from in front of it.

    Left out are settings that cannot change the result, such as the device, and the names of
    folders of runs. Prints a line that says which settings were taken over, and a note if another
    seed splits the images anew. Nothing is taken over without --init_from, or with --resume. Raises
    UserError if --init_from names no search of this script.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    given = parser.parse_args(argv)
    if given.init_from is None or given.resume:
        return argv
    about = about_run(given.init_from)
    if about.get("prog") != parser.prog:
        raise UserError(f"--init_from {given.init_from}: this is not a search of {parser.prog}")
    free = SETTINGS.free_arguments - INPUTS | SETTINGS.unsaved_arguments | SETTINGS.place_arguments
    saved = {name: value for name, value in arguments_of(given.init_from).items() if name not in free | {"init_from"}}
    saved = {name: value for name, value in saved.items() if hasattr(given, name) and value != parser.get_default(name)}
    words = resume_args.command_line(parser, saved)
    if words:
        distributed.say(f"as in {given.init_from}: {' '.join(map(quoted, words))}")
    args = parser.parse_args([*words, *argv])
    if args.seed != saved.get("seed", parser.get_default("seed")):
        distributed.say(
            "note: another --seed can split the images in another way. Fitness is too high if images that trained "
            f"the weights of {given.init_from} become validation images",
            file=sys.stderr,
        )
    return [*words, *argv]


def about_run(run_dir: str | Path) -> dict:
    """Return the content of a run's args.json, {} if the folder has none. Raises UserError if it is damaged."""
    path = Path(run_dir) / "args.json"
    about = read_json(path) if path.is_file() else {}
    return about if isinstance(about, dict) else {}


def arguments_of(run_dir: str | Path) -> dict:
    """Return the saved arguments of a run by name, {} if there are none. Raises UserError."""
    arguments = about_run(run_dir).get("args")
    return arguments if isinstance(arguments, dict) else {}


def check_retraining(run_dir: str | Path) -> None:
    """Raise UserError if a folder does not exist, or is a search; the message names the retrainings in it."""
    path = Path(run_dir)
    if not path.exists():
        raise UserError(f"{run_dir}: there is no such file or directory. Give the directory of a retraining")
    if about_run(path).get("kind") != "search":
        return
    inside = ", ".join(str(folder) for folder in sorted(path.glob("eval-*")) if folder.is_dir())
    if inside:
        raise UserError(f"{run_dir} is a search. Give a retraining in it: {inside}")
    raise UserError(
        f"{run_dir} is a search that has not been retrained. First run: python train.py --dir {quoted(run_dir)}"
    )
