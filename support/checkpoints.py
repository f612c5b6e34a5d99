"""The format of a checkpoint: how it is saved, loaded and compared.

A checkpoint file consists of the program's magic bytes, a SHA-256 as 64 hexadecimal digits, a line
end, and the output of torch.save. The SHA-256 is the checksum of the output of torch.save. Loading
a checkpoint executes nothing that the file contains.
"""

import hashlib
import io
import json
from pathlib import Path

import torch

from support import weights
from support.compare import Difference, first_difference
from support.files import (
    UserError,
    atomic_write,
    check_history_row,
    keep_as,
    quoted,
    read_bytes,
)
from support.settings import RunSettings

NAME = "checkpoint.pt"
PREVIOUS_NAME = "checkpoint.prev.pt"


def save(path: Path, state: dict, *, completed: int, fingerprint: str, rows: list[dict], settings: RunSettings) -> None:
    """Write a checkpoint to `path`, and keep the previous checkpoint as checkpoint.prev.pt.

    The checkpoint holds `state`, the number of completed steps, the run's fingerprint (JSON) and
    the rows of the run's history. Raises UserError.
    """
    content = io.BytesIO()
    history = json.dumps(rows)
    torch.save({**state, "completed": completed, "bound": fingerprint, "history": history}, content)
    content = content.getbuffer()
    if path.exists():
        keep_as(path, path.with_name(PREVIOUS_NAME))
    with atomic_write(path) as file:
        file.write(settings.checkpoint_magic + hashlib.sha256(content).hexdigest().encode() + b"\n")
        file.write(content)


def load(path: Path, settings: RunSettings) -> dict:
    """Return the state that `save` wrote.

    The state also has the entries "completed", "bound" (the fingerprint, a dict) and "history" (a
    list of rows). Raises UserError. The message names the file, says what is wrong, and says how to
    continue from the previous checkpoint.
    """
    previous = path.with_name(PREVIOUS_NAME)
    remedy = ""
    if previous.exists():
        remedy = f". To continue from the previous checkpoint: mv {quoted(previous)} {quoted(path)}"
    try:
        data = read_bytes(path)
    except UserError as error:
        never = ". The run ended before its first checkpoint: start a new run"
        raise UserError(f"{error}{remedy or never}") from error
    header, _, content = data.partition(b"\n")
    if not header.startswith(settings.checkpoint_magic):
        raise UserError(f"{path}: damaged, or written by another version of the program{remedy}")
    if hashlib.sha256(content).hexdigest().encode() != header.removeprefix(settings.checkpoint_magic):
        raise UserError(f"{path}: damaged: its checksum does not match{remedy}")
    try:
        state = weights.unpickle_tensors(io.BytesIO(content))
    except Exception as error:  # a file with a valid checksum can still be hostile
        raise UserError(f"{path}: refused: the file holds more than tensors and numbers{remedy}") from error
    try:
        return state | checked_fields(state, settings)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or written by another version of the program{remedy}") from error


def checked_fields(state: dict, settings: RunSettings) -> dict[str, object]:
    """Return the decoded "bound" and "history" of a checkpoint's state, which may be hostile.

    Raises AttributeError, LookupError, TypeError, ValueError or RecursionError if the state cannot
    come from `save`.
    """
    completed = state["completed"]
    fingerprint = json.loads(state["bound"])
    history = json.loads(state["history"])
    if type(completed) is not int or completed < 0 or not isinstance(fingerprint, dict):
        raise ValueError("the number of completed steps or the fingerprint is not valid")
    if not isinstance(history, list) or len(history) != completed:
        raise ValueError("the history does not have a row for each completed step")
    rows = []
    for row in history:
        check_history_row(row, rows, "a row", settings, in_order=True)
        rows.append(row)
    return {"bound": fingerprint, "history": history}


def compare_shapes(now: object, before: object) -> Difference | None:
    """Return the first difference in tensor shapes or in types between nested dicts and lists.

    Returns None if there is no such difference.
    """
    return first_difference(now, before, shape_of)


def shape_of(value: object) -> object:
    """Return a tensor's dtype, layout and shape as text, or the type of any other value."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.layout} {list(value.shape)}"
    return type(value)


def digest_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names and the bytes of the tensors in {name: tensor}."""
    sha = hashlib.sha256()
    for name, value in tensors.items():
        sha.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
