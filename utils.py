"""Command lines, devices, processes, weights files and small figures, on Linux and macOS."""

import argparse
import atexit
import contextlib
import ctypes
import hashlib
import importlib.metadata
import io
import operator
import os
import pickle
import platform
import re
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from safeio import UserError, atomic_write, check_unpacked_size, read_bytes, read_json, write_json

# ---- command lines


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not None and False, which say nothing."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviations, and one line instead of the usage for a bad argument."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def number(kind, low=None, high=None, above=None):
    """An argparse type: `kind` (int or float), at least `low`, greater than `above`, at most `high`."""
    bounds = [("at least", operator.ge, low), ("greater than", operator.gt, above), ("at most", operator.le, high)]
    bounds = [bound for bound in bounds if bound[2] is not None]

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not abs(value) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if not all(holds(value, bound) for _, holds, bound in bounds):
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(f'{word} {at}' for word, _, at in bounds)}")
        return value

    return parse


def say(text, file=None):
    """Print a line on rank 0, above any progress bar."""
    if rank() == 0:
        tqdm.write(text, file=file)


def progress(batches, title, done=0):
    """A bar with the time left around `batches`, `done` of them over; none where stderr is not a terminal."""
    hidden = rank() > 0 or not sys.stderr.isatty()
    return tqdm(batches, desc=title, initial=done, leave=False, disable=hidden, dynamic_ncols=True)


# ---- devices and processes


def add_device_arguments(group):
    group.add_argument("--gpu", type=number(int, 0), default=0, help="CUDA device")
    group.add_argument("--device", help="any PyTorch device, such as cpu (default: CUDA where there is one, else CPU)")


def add_speed_arguments(group):
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on CUDA only)")
    group.add_argument("--compile", action="store_true", help="torch.compile, cell by cell (not on the CPU)")


def choose_device(args):
    """CUDA device --gpu where there is one, else the CPU, or --device. Settles --amp and joins the other processes.

    Raises UserError for a device that cannot be used.
    """
    name = args.device or (f"cuda:{local_rank(args.gpu)}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    if args.amp is None:
        args.amp = device.type == "cuda"
    if args.compile and device.type == "cpu":
        raise UserError("--compile is not for the CPU: leave it out")
    join_process_group(device)
    return device


def keep_freed_memory():
    """Let glibc keep freed memory for the next tensor; else a good part of the time on a CPU goes into new pages."""
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes at the top of the heap that are not given back


def autocast(device, enabled):
    """bfloat16 where it is safe, if `enabled`. Its weight cache holds for one block, so a block is one step."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def describe_device(device):
    if device.type == "cuda":
        return f"running on {torch.cuda.get_device_name(device)} ({device})"
    return f"running on the {device.type.upper()}, {torch.get_num_threads()} threads"


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank(default=0):
    return int(os.environ.get("LOCAL_RANK", default))


def join_process_group(device):
    """Under torchrun, meet the other processes: NCCL between GPUs, gloo between CPUs."""
    if world_size() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave_process_group)


@contextlib.contextmanager
def one_after_the_other():
    """The first process of each machine goes through the block before the others: for downloads."""
    if world_size() > 1 and local_rank() > 0:
        torch.distributed.barrier()
    yield
    if world_size() > 1 and local_rank() == 0:
        torch.distributed.barrier()


def leave_process_group():
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def together():
    """For code in which the processes wait for each other. Raises UserError if one is gone."""
    try:
        yield
    except RuntimeError as error:
        # What gloo and NCCL raise when a connection ends.
        if world_size() == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise UserError(
            "another process of this run is gone; continue from the last checkpoint with --resume RUN_DIR, "
            "with as many processes as you like"
        ) from error


def sum_over_ranks(tensor):
    """The sum of every process's `tensor`, in place. Raises UserError if a process is gone."""
    if world_size() > 1:
        with together():
            torch.distributed.all_reduce(tensor)
    return tensor


def average_over_ranks(tensors):
    """Replace each floating-point tensor by its mean over the processes: gradients of the shared weights, buffers."""
    if world_size() > 1:
        flat = sum_over_ranks(torch.cat([t.flatten() for t in tensors])) / world_size()
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def peak_memory_mb(device):
    """Peak memory in MiB: of the GPU's allocator, or of this whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def cost(images, start, device):
    """What a generation or epoch with so many images has taken since `start`: images/s, seconds, peak memory."""
    seconds = time.perf_counter() - start
    return {"images_per_second": images / seconds, "seconds": seconds, "peak_memory_mb": peak_memory_mb(device)}


def versions():
    """Of Python and the packages that figures depend on, and of the CUDA that torch was built for."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"python": platform.python_version(), **packages, "cuda": torch.version.cuda}


def git_revision():
    """The project's commit, with a + where files differ from it, or None outside a checkout."""
    command = "git describe --always --exclude=* --abbrev=12 --dirty=+".split()
    settings = dict(cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL, timeout=10)
    try:
        return subprocess.check_output(command, **settings).strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ---- weights


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


def parameters_in_millions(model):
    """Trainable parameters without the auxiliary head, as papers count them."""
    return sum(p.numel() for name, p in model.named_parameters() if "auxiliary" not in name) / 1e6


def mult_adds_in_millions(model, image_shape):
    """Multiply-adds of convolutions and linear layers for one image (C, H, W); leaves `model` in evaluation mode."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops() / 2e6


def make_sgd(parameters, args, device, nesterov=False):
    """SGD of the recipes: one parameter group, weight decay on everything."""
    return torch.optim.SGD(
        parameters,
        args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=nesterov,
        fused=device.type == "cuda",
    )
