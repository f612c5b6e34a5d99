"""Weights files: plain state dicts, read without executing anything, each with a JSON file about it."""

import collections
import contextlib
import hashlib
import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from support.files import UserError, atomic_write, check_unpacked_size, open_regular, read_bytes, read_json, write_json

WRAPPERS = ("module", "_orig_mod")  # in names: what DataParallel and torch.compile call the network that they hold


def load_torch(path, what="weights file"):
    """Read what torch.save wrote to `path`, on the CPU, executing nothing in it. Raises UserError naming the file."""
    try:
        with open_regular(path) as file:
            return unpickle_tensors(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+\w)", str(error))  # what the pickle asked for
        reason = f"it refers to {found[1]}, which a {what} never holds" if found else "not a pickle of tensors"
        raise UserError(f"{path} is refused: {reason}; nothing in it was executed") from error
    except Exception as error:  # a damaged archive raises nearly any exception
        raise UserError(f"{path} is damaged or not a {what}: {' '.join(str(error).split())[:200]}") from error


def unpickle_tensors(file):
    """Read what torch.save, which does not compress, wrote to an open file. Raises nearly anything if it is damaged."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            check_unpacked_size(archive, file.seek(0, os.SEEK_END))
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def read_state(path) -> dict:
    """Return the state dict {name: tensor} of a published or own weights file, whatever network it is of.

    It is the file's content, or what is under `state_dict` in it; the names are without what DataParallel and
    torch.compile put into them. Raises UserError.
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
        raise UserError(f"{path} holds no state dict: {twice[0]} is there twice")
    return dict(zip(names, state.values(), strict=True))


def load_weights(model, path):
    """Load a published or own weights file into `model`, strictly; see `read_state` and `load_state`."""
    load_state(model, read_state(path), path)


def load_state(model, state: dict, path, optional: tuple[str, ...] = ()) -> None:
    """Load what `read_state` made of the file `path` into `model`, which may be on the meta device; then it is filled.

    The file may hold an auxiliary head that the model does not have, and the entries that the model names in
    `not_loaded`. It may lack BatchNorm's counters, which PyTorch before 0.4.1 did not have and a test does not use.
    Anything else missing, unexpected or of another shape raises UserError with the first differing entry of each kind,
    and some more.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    known = {*expected, *getattr(model, "not_loaded", ())}
    unknown = [name for name in state if name not in known and not name.startswith(optional)]
    differing = [[f"{name} is missing" for name in missing], [f"{name} is not in the network" for name in unknown]]
    of_known = [(name, state[name]) for name in expected if name in state]
    differing.append([f"{name} {text}" for name, value in of_known for text in problems(value, expected[name])])
    first = [texts.pop(0) for texts in differing if texts]
    differing = first + [text for texts in differing for text in texts]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"{path} holds no weights of this network: {'; '.join(differing[:3])}{more}")
    if any(value.is_meta for value in expected.values()):
        model.to_empty(device="cpu")
    counters = {name: torch.zeros((), dtype=value.dtype) for name, value in expected.items() if name not in state}
    model.load_state_dict({name: state[name] for name in expected if name in state} | counters)


def problems(value, expected):
    """Yield what keeps the tensor `value` of a file from standing for `expected`, of the same name in the network."""
    if value.is_nested or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        yield "is sparse, nested, quantised or without values"
    elif value.shape != expected.shape:
        yield f"is {tuple(value.shape)}, not {tuple(expected.shape)}"
    elif value.is_complex() or value.dtype is torch.bool or value.is_floating_point() != expected.is_floating_point():
        yield f"is {value.dtype}, not {expected.dtype}"
    elif not value.float().isfinite().all():
        yield "has values that are not finite"


def locate(path):
    """Return `path`, or where that is no file, the one of this name in weights/ beside it, as published runs lack."""
    inside = Path(path).parent / "weights" / Path(path).name
    return inside if inside.is_file() and not Path(path).is_file() else path


def info_path(path):
    return Path(path).with_suffix(".json")


def save_weights(model, path, about):
    """Write the plain state dict to `path`, and next to it a JSON file: `about` (network, normalisation), a checksum.

    These are two files, so a reader can come in between. The JSON file is written first, and under "before" it also
    describes the weights that it finds: whichever of the two a reader, or a crash, leaves next to it is described.
    """
    content = io.BytesIO()  # torch.save does not say that a disk is full
    torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, content)
    about = {**about, "sha256": hashlib.sha256(content.getbuffer()).hexdigest()}
    with contextlib.suppress(UserError):  # there are no weights yet, or they are damaged
        about["before"] = read_info(path) or {"sha256": hashlib.sha256(read_bytes(path)).hexdigest()}
    write_json(info_path(path), about)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def read_info(path):
    """Return what was saved about the weights at `path`, {} where nothing was.

    Raises UserError if the file describes other weights.
    """
    if not info_path(path).is_file():
        return {}
    about = matching_info(path)
    if about is None:
        raise UserError(
            f"{path} is damaged or was replaced: its checksum is not the one in {info_path(path)} "
            "(delete that file to use the weights all the same)"
        )
    return about


def matching_info(path):
    """Return what the JSON file next to the weights at `path` says about these weights, None where it does not.

    A run may be writing both: the files are read again for as long as they change meanwhile. Raises UserError.
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


def version(path):
    """Return what is different once `path` has been replaced by another file."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None
