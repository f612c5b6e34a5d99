"""Several processes: which one this is, sums over all of them, and what only the first one prints."""

import atexit
import contextlib
import hashlib
import importlib
import os
import sys

import torch
from tqdm import tqdm

from support.files import UserError, emit


def from_torchrun(name, default):
    """Return the number in a variable that torchrun sets. Raises UserError."""
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise UserError(f"the variable {name} is {os.environ[name]!r}: unset it, or start with torchrun") from None


def rank():
    return from_torchrun("RANK", 0)


def world_size():
    return from_torchrun("WORLD_SIZE", 1)


def local_rank(default=0):
    return from_torchrun("LOCAL_RANK", default)


def local_world_size():
    """Return the number of processes on this machine."""
    return from_torchrun("LOCAL_WORLD_SIZE", world_size())


def say(text, file=None):
    """Print a line on rank 0, above any progress bar."""
    if rank() == 0:
        emit(text, file or sys.stdout, tqdm.write)


def progress(batches, title, done=0):
    """Put a bar with the time left around `batches`, `done` of them over; none where stderr is not a terminal."""
    hidden = rank() > 0 or not sys.stderr.isatty()
    return tqdm(batches, desc=title, initial=done, leave=False, disable=hidden, dynamic_ncols=True)


def join_process_group(device):
    """Meet the other processes under torchrun: NCCL between GPUs, gloo between CPUs. Raises UserError."""
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ) or not 0 <= rank() < world_size():
        raise UserError("the variables RANK and WORLD_SIZE do not fit each other: unset both, or start with torchrun")
    if world_size() > 1 and not torch.distributed.is_initialized():
        # If it is imported after the group is made (by torch.compile, say), its default arguments hold the group: then
        # the group's threads live on until Python ends, and can abort the process there.
        importlib.import_module("torch.distributed.nn")
        try:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot meet the other processes, start with torchrun ({reason:.200})") from error
        atexit.register(leave_process_group)


@contextlib.contextmanager
def one_after_the_other():
    """Let the first process of each machine go through the block before the others: for downloads."""
    if world_size() > 1 and local_rank() > 0:
        torch.distributed.barrier()
    try:
        yield
    finally:  # the others are let in also where it failed: they find out for themselves
        if world_size() > 1 and local_rank() == 0:
            torch.distributed.barrier()


def leave_process_group():
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sum_over_ranks(tensor):
    """Return the sum of every process's `tensor`."""
    if world_size() > 1:
        if torch.distributed.get_backend() == "nccl":
            tensor = tensor.cuda()  # NCCL sums on GPUs only
        torch.distributed.all_reduce(tensor)
    return tensor


def stack_over_ranks(tensors):
    """Return every process's `tensors`, flattened to a row: (processes, elements)."""
    row = torch.cat([t.flatten() for t in tensors]) if tensors else torch.empty(0)
    rows = row.new_zeros(world_size(), len(row))
    rows[rank()] = row
    return sum_over_ranks(rows)


def same_everywhere(text: str) -> list[str] | None:
    """Return None if every process calls this with the same `text`, else the texts of all processes, by rank.

    What is exchanged first has the same shape whatever the texts are.
    """
    if world_size() == 1:
        return None
    content = text.encode("utf-8", "surrogatepass")
    digest = torch.tensor(list(hashlib.sha256(content).digest() + len(content).to_bytes(8, "big")))
    rows = stack_over_ranks([digest])  # (processes, 32 + 8)
    if (rows == rows[0]).all():
        return None
    lengths = [int.from_bytes(bytes(row[32:]), "big") for row in rows.tolist()]
    padded = torch.tensor(list(content.ljust(max(lengths))))
    rows = stack_over_ranks([padded]).tolist()  # (processes, length of the longest)
    texts = [bytes(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    return [text.decode("utf-8", "surrogatepass") for text in texts]


def fill(tensors, row):
    """Copy into `tensors` what a row of `stack_over_ranks` holds."""
    for tensor, part in zip(tensors, row.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_over_ranks(tensors):
    """Replace each floating-point tensor by its mean over the processes: the gradients of the shared weights."""
    if world_size() > 1:
        fill(tensors, sum_over_ranks(torch.cat([t.flatten() for t in tensors])) / world_size())
