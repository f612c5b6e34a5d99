"""Several processes: which one this is, sums over all of them, and what only the first one prints."""

import atexit
import contextlib
import os
import sys

import torch
from tqdm import tqdm

from support.files import UserError


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank(default=0):
    return int(os.environ.get("LOCAL_RANK", default))


def say(text, file=None):
    """Print a line on rank 0, above any progress bar."""
    if rank() == 0:
        tqdm.write(text, file=file)


def progress(batches, title, done=0):
    """A bar with the time left around `batches`, `done` of them over; none where stderr is not a terminal."""
    hidden = rank() > 0 or not sys.stderr.isatty()
    return tqdm(batches, desc=title, initial=done, leave=False, disable=hidden, dynamic_ncols=True)


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
    """The sum of every process's `tensor`. Raises UserError if a process is gone."""
    if world_size() > 1:
        with together():
            if torch.distributed.get_backend() == "nccl":
                tensor = tensor.cuda()  # NCCL sums on GPUs only
            torch.distributed.all_reduce(tensor)
    return tensor


def average_over_ranks(tensors):
    """Replace each floating-point tensor by its mean over the processes: gradients of the shared weights, buffers."""
    if world_size() > 1:
        flat = sum_over_ranks(torch.cat([t.flatten() for t in tensors])) / world_size()
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))
