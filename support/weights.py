"""Weights files: plain state dicts, read without executing anything, each with a JSON file about it."""

import hashlib
import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from support.files import UserError, atomic_write, check_unpacked_size, read_bytes, read_json, write_json


def load_torch(path, what="weights file"):
    """What torch.save wrote to `path`, on the CPU, nothing in it executed. Raises UserError naming the file."""
    if not os.path.isfile(path):
        raise UserError(f"cannot read {path}: no such file")
    try:
        with open(path, "rb") as file:
            return unpickle_tensors(file)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+\w)", str(error))  # what the pickle asked for
        reason = f"it refers to {found[1]}, which a {what} never holds" if found else "not a pickle of tensors"
        raise UserError(f"{path} is refused: {reason}; nothing in it was executed") from error
    except Exception as error:  # a damaged archive raises nearly any exception
        raise UserError(f"{path} is damaged or not a {what}: {' '.join(str(error).split())[:200]}") from error


def unpickle_tensors(file):
    """What torch.save, which does not compress, wrote to an open file. Raises nearly anything for a damaged one."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            check_unpacked_size(archive, file.seek(0, os.SEEK_END))
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def load_weights(model, path):
    """Load a published or own weights file into `model`, strictly.

    Accepts a state dict, or a dict with one under `state_dict`; names with or without `module.`; an auxiliary head that
    the model does not have. Anything else missing, unexpected or of another shape raises UserError with the first
    differing entries.
    """
    side_file_of(path)
    state = load_torch(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict (names and tensors)")
    expected = model.state_dict()
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    differing = [f"{name} is missing" for name in expected if name not in state]
    for name, value in state.items():
        if name in expected and value.shape != expected[name].shape:
            differing.append(f"{name} is {tuple(value.shape)}, not {tuple(expected[name].shape)}")
        elif name not in expected and not name.startswith("auxiliary_head."):
            differing.append(f"{name} is not in the network")
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"{path} holds the weights of another network: {'; '.join(differing[:3])}{more}")
    model.load_state_dict({name: state[name] for name in expected})


def side_file(path):
    return Path(path).with_suffix(".json")


def save_weights(model, path, about):
    """The plain state dict at `path`, and beside it a JSON file: `about` (network, normalisation) and a checksum."""
    content = io.BytesIO()  # torch.save does not say that a disk is full
    torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())
    write_json(side_file(path), {**about, "sha256": hashlib.sha256(content.getbuffer()).hexdigest()})


def side_file_of(path):
    """What was saved about the weights at `path`, {} where nothing was. Raises UserError if they are not those."""
    if not side_file(path).is_file():
        return {}
    about = read_json(side_file(path))
    if not isinstance(about, dict) or about.get("sha256") != hashlib.sha256(read_bytes(path)).hexdigest():
        raise UserError(
            f"{path} is damaged or was replaced: its checksum is not the one in {side_file(path)} "
            "(delete that file to use the weights all the same)"
        )
    return about
