"""Checks that all processes of a run were started with the same arguments, data and code."""

import argparse
import json
import os

from support import distributed
from support.compare import compare_values
from support.files import UserError
from support.resume_args import fixed_arguments
from support.settings import RunSettings

# What messages call a new run. The name of a new run's directory can differ among processes.
NEW = "new run"


def check_alike(where: str | os.PathLike, value: dict[str, object]) -> None:
    """Check that `value`, which JSON can hold, is the same in all processes of a run.

    Every process has to call this function. If a value differs, all processes raise UserError with
    the first difference and its rank.
    """
    texts = distributed.same_everywhere(json.dumps(value))
    if texts is None:
        return
    rank = next(rank for rank, text in enumerate(texts) if text != texts[0])
    found = compare_values(json.loads(texts[0]), json.loads(texts[rank]))
    reason = "their inputs differ"  # the reason if, for example, only one process has some key
    if found:
        reason = f"{found.name} is {found.now!r:.100} in process 0, but {found.before!r:.100} in process {rank}"
    raise UserError(
        f"{where}: the processes do not agree: {reason}. Start all of them with the same arguments, data and code"
    )


def check_arguments_alike(args: argparse.Namespace, settings: RunSettings) -> None:
    """Check that all processes of a run have the same arguments, except paths.

    Call this after `devices.choose_device`, which joins the process group. The arguments
    decide at which steps processes wait for each other, so different arguments must be found before
    that. If an argument differs, all processes raise UserError.
    """
    fixed = fixed_arguments(args, settings)
    synchronised = {name: getattr(args, name) for name in settings.synchronised_arguments}
    check_alike(args.resume or NEW, {"resumes": bool(args.resume), "args": fixed | synchronised})
