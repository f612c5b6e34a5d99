"""The device that computes: its flags, its choice, autocast and memory."""

import argparse
import contextlib
import ctypes
import resource
import sys

import torch

from support import distributed
from support.cli import number
from support.files import UserError


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
    name = args.device or (f"cuda:{distributed.local_rank(args.gpu)}" if torch.cuda.is_available() else "cpu")
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
    distributed.join_process_group(device)
    return device


def keep_freed_memory():
    """Let glibc keep freed memory for the next tensor; else a good part of the time on a CPU goes into new pages."""
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes at the top of the heap that are not given back


def autocast(device, enabled):
    """bfloat16 where it is safe, if `enabled`. Its weight cache holds for one block, so a block is one step."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if enabled else contextlib.nullcontext()


def describe_device(device):
    if device.type == "cuda":
        return f"running on {torch.cuda.get_device_name(device)} ({device})"
    return f"running on the {device.type.upper()}, {torch.get_num_threads()} threads"


def peak_memory_mb(device):
    """Peak memory in MiB: of the GPU's allocator, or of this whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
