"""The format of a checkpoint: how it is saved, loaded and compared.

A file consists of the program's magic bytes, the SHA-256 of the rest as 64 hexadecimal digits, a
line end, and what torch.save writes. Nothing in it is executed.
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
    """Write the checkpoint `path`, and keep the one before it as checkpoint.prev.pt.

    It holds `state`, the number of steps that are completed, the run's fingerprint (JSON) and the
    rows of its history. Raises UserError.
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
    """Return what `save` wrote: the state, with "completed", "bound" (the fingerprint, a dict) and
    "history" (rows).

    Raises UserError, which names the file, says what is wrong, and how to continue from the
    previous checkpoint.
    """
    previous = path.with_name(PREVIOUS_NAME)
    remedy = f". To continue from the previous one: mv {quoted(previous)} {quoted(path)}" if previous.exists() else ""
    try:
        data = read_bytes(path)
    except UserError as error:
        never = ". The run ended before its first checkpoint: start a new one"
        raise UserError(f"{error}{remedy or never}") from error
    header, _, content = data.partition(b"\n")
    if not header.startswith(settings.checkpoint_magic):
        raise UserError(f"{path}: damaged, or written by another version of the program{remedy}")
    if hashlib.sha256(content).hexdigest().encode() != header.removeprefix(settings.checkpoint_magic):
        raise UserError(f"{path}: damaged: its checksum does not match{remedy}")
    try:
        state = weights.unpickle_tensors(io.BytesIO(content))
    except Exception as error:  # the checksum does not say who wrote the file
        raise UserError(f"{path}: refused: it holds more than tensors and numbers{remedy}") from error
    try:
        return state | checked_fields(state, settings)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or written by another version of the program{remedy}") from error


def checked_fields(state: dict, settings: RunSettings) -> dict[str, object]:
    """Return the decoded "bound" and "history" of a checkpoint's state, which may be hostile.

    Raises ValueError, or what Python raises, for what `save` does not write.
    """
    completed = state["completed"]
    fingerprint = json.loads(state["bound"])
    history = json.loads(state["history"])
    if type(completed) is not int or completed < 0 or not isinstance(fingerprint, dict):
        raise ValueError("not a number of completed steps, or not a fingerprint")
    if not isinstance(history, list) or len(history) != completed:
        raise ValueError("the history does not have a row for each completed step")
    rows = []
    for row in history:
        check_history_row(row, rows, "a row", settings, in_order=True)
        rows.append(row)
    return {"bound": fingerprint, "history": history}


def compare_shapes(now: object, before: object) -> Difference | None:
    """Return the first place where nested dicts and lists hold tensors of another shape, or other
    types, or None.
    """
    return first_difference(now, before, shape_of)


def shape_of(value: object) -> object:
    """Return the dtype, layout and shape of a tensor, as text, and the type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.layout} {list(value.shape)}"
    return type(value)


def digest_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of {name: tensor}: of the names and of the bits."""
    sha = hashlib.sha256()
    for name, value in tensors.items():
        sha.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
