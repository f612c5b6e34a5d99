"""Weights files: plain state dicts, each with a JSON file that describes it.

Reading a weights file executes nothing that the file contains.
"""

import collections
import contextlib
import hashlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import nn

from support.files import (
    AnyPath,
    UserError,
    atomic_write,
    check_unpacked_size,
    open_regular,
    read_bytes,
    read_json,
    write_json,
)

# Parts that DataParallel and torch.compile add to the names in a state dict.
WRAPPERS = ("module", "_orig_mod")


def load_torch(path: AnyPath, what: str = "weights file") -> object:
    """Return what torch.save wrote to `path`, on the CPU. Nothing in the file is executed.

    Raises UserError, which names the file. The message calls the expected kind of file `what`.
    """
    try:
        with open_regular(path) as file:
            return unpickle_tensors(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+\w)", str(error))  # the name that the pickle refers to
        reason = f"the file refers to {found[1]}, and a {what} never does" if found else "not a pickle of tensors"
        raise UserError(f"{path} is refused: {reason}. Nothing in it was executed") from error
    except Exception as error:  # a damaged archive raises nearly any exception
        raise UserError(f"{path} is damaged or not a {what}: {' '.join(str(error).split())[:200]}") from error


def unpickle_tensors(file: IO[bytes]) -> object:
    """Return what torch.save wrote to an open file, on the CPU.

    torch.save does not compress, so a file that unpacks to more than its own size is refused. A
    damaged file raises nearly any exception.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            check_unpacked_size(archive, file.seek(0, os.SEEK_END))
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def read_state(path: AnyPath) -> dict[str, torch.Tensor]:
    """Return the state dict {name: tensor} in a weights file, which may be a published one.

    The file holds the state dict directly or under the key "state_dict". The parts that
    DataParallel and torch.compile add to names are removed. Raises UserError.
    """
    read_info(path)
    state = load_torch(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict (names and tensors)")
    names = [".".join(part for part in str(name).split(".") if part not in WRAPPERS) for name in state]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} holds no state dict: {twice[0]} is in it twice")
    return dict(zip(names, state.values(), strict=True))


def load_weights(model: nn.Module, path: AnyPath) -> None:
    """Load a weights file into `model`, using `read_state` and `load_state`. Raises UserError."""
    load_state(model, read_state(path), path)


def load_as_beginning(model: nn.Module, path: AnyPath, fresh: tuple[str, ...]) -> list[str]:
    """Load a weights file into `model`, except for entries that do not fit and may start anew.

    Those are entries whose names start with one of `fresh`, and which the file lacks or has in
    another shape. They keep the model's values, and their names are returned. Raises UserError if
    another entry does not fit.
    """
    state = read_state(path)
    expected = model.state_dict()
    kept = [
        name
        for name, value in expected.items()
        if name.startswith(fresh) and (name not in state or state[name].shape != value.shape)
    ]
    load_state(model, state | {name: expected[name].cpu() for name in kept}, path, optional=fresh)
    return kept


def load_state(model: nn.Module, state: dict[str, torch.Tensor], path: AnyPath, optional: tuple[str, ...] = ()) -> None:
    """Load a state dict, which `read_state` returned for the file `path`, into `model`.

    A model on the device "meta" is moved to the CPU first. The file may hold entries that the model
    does not have, if their names start with one of `optional` or are in the model's `not_loaded`.
    The file may lack BatchNorm's batch counters, which PyTorch before 0.4.1 did not have and which
    testing does not use. Raises UserError, with up to three examples, if any other entry is
    missing, unexpected, or of another shape.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    known = {*expected, *getattr(model, "not_loaded", ())}
    unknown = [name for name in state if name not in known and not name.startswith(optional)]
    differing = [[f"{name} is missing" for name in missing], [f"{name} is not in the network" for name in unknown]]
    of_known = [(name, state[name]) for name in expected if name in state]
    differing.append([f"{name} {text}" for name, value in of_known for text in problems(value, expected[name])])
    # The message shows three examples, so put one of each kind (missing, unknown, unfit) first.
    first = [texts.pop(0) for texts in differing if texts]
    differing = first + [text for texts in differing for text in texts]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"{path} holds no weights of this network: {'; '.join(differing[:3])}{more}")
    if any(value.is_meta for value in expected.values()):
        model.to_empty(device="cpu")
    counters = {name: torch.zeros((), dtype=value.dtype) for name, value in expected.items() if name not in state}
    model.load_state_dict({name: state[name] for name in expected if name in state} | counters)


def problems(value: torch.Tensor, expected: torch.Tensor) -> Iterator[str]:
    """Yield the reasons why a file's tensor cannot be loaded as the network's tensor of the same
    name.
    """
    if value.is_nested or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        yield "is sparse, nested, quantised or without values"
    elif value.shape != expected.shape:
        yield f"is {tuple(value.shape)}, not {tuple(expected.shape)}"
    elif value.is_complex() or value.dtype is torch.bool or value.is_floating_point() != expected.is_floating_point():
        yield f"is {value.dtype}, not {expected.dtype}"
    elif not value.float().isfinite().all():
        yield "has values that are not finite"


def locate(path: AnyPath) -> AnyPath:
    """Return `path`, or the file of the same name in a folder weights/ next to `path`.

    The file in weights/ is returned only if `path` does not exist. The published scripts have no
    folder weights/, so a path in the published form still works.
    """
    inside = Path(path).parent / "weights" / Path(path).name
    return inside if inside.is_file() and not Path(path).is_file() else path


def info_path(path: AnyPath) -> Path:
    """Return the path of the JSON file that describes the weights at `path`."""
    return Path(path).with_suffix(".json")


def save_weights(model: nn.Module, path: AnyPath, about: dict) -> None:
    """Write the state dict to `path`, and a JSON file with `about` and a checksum next to it.

    A crash or a reader can come between the two writes. So the JSON file is written first and
    describes both the new weights and, under "before", the old ones. Raises UserError.
    """
    content = io.BytesIO()  # in memory, because torch.save to a file hides that a disk is full
    torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, content)
    about = {**about, "sha256": hashlib.sha256(content.getbuffer()).hexdigest()}
    with contextlib.suppress(UserError):  # there are no old weights, or they are damaged
        about["before"] = read_info(path) or {"sha256": hashlib.sha256(read_bytes(path)).hexdigest()}
    write_json(info_path(path), about)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def read_info(path: AnyPath) -> dict:
    """Return the content of the JSON file next to the weights at `path`, or {} without that file.

    Raises UserError if the JSON file describes other weights.
    """
    if not info_path(path).is_file():
        return {}
    about = matching_info(path)
    if about is None:
        raise UserError(
            f"{path} is damaged or was replaced: its checksum is not the one in {info_path(path)} "
            "(delete that file to use the weights anyway)"
        )
    return about


def matching_info(path: AnyPath) -> dict | None:
    """Return the description of the weights at `path` in the JSON file next to them.

    Returns None if the JSON file describes other weights. A run may be writing both files, so they
    are read again until neither changes during the reading. Raises UserError.
    """
    read_at = None
    while (now := [version(file) for file in (info_path(path), path)]) != read_at:
        read_at = now
        about, sha256 = read_json(info_path(path)), hashlib.sha256(read_bytes(path)).hexdigest()
        before = about.pop("before", None) if isinstance(about, dict) else None
        for described in (about, before):
            if isinstance(described, dict) and described.get("sha256") == sha256:
                return described
    return None


def version(path: AnyPath) -> tuple[int, int, int] | None:
    """Return a value that changes when the file `path` is replaced, or None if it does not exist."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None
