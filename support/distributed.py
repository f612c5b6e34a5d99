"""Several processes under torchrun: which one this is, sums over all of them, and what only the
first one prints.
"""

import atexit
import contextlib
import hashlib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

import torch
from tqdm import tqdm

from support.files import UserError, emit


def from_torchrun(name: str, default: int) -> int:
    """Return the number in an environment variable that torchrun sets.

    Raises UserError if it is not a number.
    """
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        value = os.environ[name]
        raise UserError(f"the variable {name} is {value!r}: unset it, or start with torchrun") from None


def rank() -> int:
    """Return the number of this process in the run, from 0."""
    return from_torchrun("RANK", 0)


def world_size() -> int:
    """Return the number of processes in the run."""
    return from_torchrun("WORLD_SIZE", 1)


def local_rank(default: int = 0) -> int:
    """Return the number of this process on its machine, from 0, or `default` without torchrun."""
    return from_torchrun("LOCAL_RANK", default)


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return from_torchrun("LOCAL_WORLD_SIZE", world_size())


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line on rank 0 (on stdout unless `file` is given), above any progress bar."""
    if rank() == 0:
        emit(text, file or sys.stdout, tqdm.write)


def progress(batches: Iterable, title: str, done: int = 0) -> tqdm:
    """Return `batches` with a progress bar, `done` of them over already.

    Without a terminal there is no bar.
    """
    hidden = rank() > 0 or not sys.stderr.isatty()
    return tqdm(batches, desc=title, initial=done, leave=False, disable=hidden, dynamic_ncols=True)


def join_process_group(device: torch.device) -> None:
    """Meet the other processes under torchrun: NCCL between GPUs, gloo between CPUs.

    Raises UserError.
    """
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ) or not 0 <= rank() < world_size():
        raise UserError("RANK and WORLD_SIZE are inconsistent: unset both, or start with torchrun")
    if world_size() > 1 and not torch.distributed.is_initialized():
        # This must be imported before the group is made. Imported later (by torch.compile, for
        # example), its default arguments hold the group. Then the group's threads live until Python
        # ends, and can abort the process there.
        importlib.import_module("torch.distributed.nn")
        try:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot meet the other processes ({reason:.200}): start with torchrun") from error
        atexit.register(leave_process_group)


def leave_process_group() -> None:
    """Leave the process group, if this process is in one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def one_after_the_other() -> Iterator[None]:
    """Let the first process of each machine finish the block before the others enter it.

    Use this for downloads.
    """
    if world_size() > 1 and local_rank() > 0:
        torch.distributed.barrier()
    try:
        yield
    finally:  # if the first process fails, the others enter too, and find out for themselves
        if world_size() > 1 and local_rank() == 0:
            torch.distributed.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of `tensor` over all processes. It may be computed in place."""
    if world_size() > 1:
        if torch.distributed.get_backend() == "nccl":
            tensor = tensor.cuda()  # NCCL only sums on GPUs
        torch.distributed.all_reduce(tensor)
    return tensor


def average_over_ranks(tensors: Sequence[torch.Tensor]) -> None:
    """Replace floating-point tensors, such as gradients, by their mean over all processes."""
    if world_size() > 1:
        fill(tensors, sum_over_ranks(torch.cat([t.flatten() for t in tensors])) / world_size())


def stack_over_ranks(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a row for each process: its `tensors`, flattened and concatenated.

    The shape is (processes, elements).
    """
    row = torch.cat([t.flatten() for t in tensors]) if tensors else torch.empty(0)
    rows = row.new_zeros(world_size(), len(row))
    rows[rank()] = row
    return sum_over_ranks(rows)


def fill(tensors: Sequence[torch.Tensor], row: torch.Tensor) -> None:
    """Copy a row of `stack_over_ranks` into `tensors`."""
    for tensor, part in zip(tensors, row.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def same_everywhere(text: str) -> list[str] | None:
    """Return None if every process calls this with the same `text`, else the texts of all
    processes, by rank.

    Digests and lengths are exchanged first, since they have the same shape in all processes
    whatever the texts are.
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
    rows = stack_over_ranks([padded]).tolist()  # (processes, length of the longest text)
    texts = [bytes(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    return [text.decode("utf-8", "surrogatepass") for text in texts]
