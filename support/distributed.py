"""Several processes under torchrun: ranks, sums over all processes, and output from rank 0 only."""

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

    Raises UserError if the variable is not a number.
    """
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        value = os.environ[name]
        raise UserError(f"the variable {name} is {value!r}: unset it, or start with torchrun") from None


def rank() -> int:
    """Return the rank of this process in the run, counted from 0."""
    return from_torchrun("RANK", 0)


def world_size() -> int:
    """Return the number of processes in the run."""
    return from_torchrun("WORLD_SIZE", 1)


def local_rank(default: int = 0) -> int:
    """Return the rank of this process on its machine, or `default` without torchrun."""
    return from_torchrun("LOCAL_RANK", default)


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return from_torchrun("LOCAL_WORLD_SIZE", world_size())


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line on rank 0 (on stdout unless `file` is given), above any progress bar."""
    if rank() == 0:
        emit(text, file or sys.stdout, tqdm.write)


class UnitBar(tqdm):
    """A progress bar around batches that counts what `update` is called for, not the batches."""

    def __iter__(self) -> Iterator:
        try:
            yield from self.iterable
        finally:
            self.close()


def progress(batches: Iterable, title: str, done: int = 0, units: int | None = None) -> tqdm:
    """Return `batches` with a progress bar that starts at `done`.

    If each batch consists of several `units` of work, the bar counts these, and the caller has to
    call `update` after each. The bar is hidden on other ranks than 0, and if stderr is not a
    terminal. A narrow terminal cuts a line off at its end, so the loss comes before the times.
    """
    hidden = rank() > 0 or not sys.stderr.isatty()
    form = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}, {rate_fmt}] {bar}"
    look = {"desc": title, "leave": False, "disable": hidden, "dynamic_ncols": True, "bar_format": form}
    if units is None:
        return tqdm(batches, initial=done, **look)
    return UnitBar(batches, total=len(batches) * units, **look)


def join_process_group(device: torch.device) -> None:
    """Join the process group under torchrun: NCCL for GPUs, gloo for CPUs. Raises UserError."""
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ) or not 0 <= rank() < world_size():
        raise UserError("RANK and WORLD_SIZE are inconsistent: unset both, or start with torchrun")
    if world_size() > 1 and not torch.distributed.is_initialized():
        # Import torch.distributed.nn before the process group is made. A later import (by
        # torch.compile, for example) stores the group in default arguments of that module. The
        # group's threads then live until Python exits, and can abort the process at its exit.
        importlib.import_module("torch.distributed.nn")
        try:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot connect to the other processes ({reason:.200}): start with torchrun") from error
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
    finally:  # if the first process fails, the others still enter the block, and fail in it too
        if world_size() > 1 and local_rank() == 0:
            torch.distributed.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of `tensor` over all processes. The sum may be computed in place."""
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
    """Return a matrix (processes, elements) with one row for each process.

    A process's row holds its `tensors`, flattened and concatenated.
    """
    row = torch.cat([t.flatten() for t in tensors]) if tensors else torch.empty(0)
    rows = row.new_zeros(world_size(), len(row))
    rows[rank()] = row  # the other rows stay 0, so the sum over processes has everyone's row
    return sum_over_ranks(rows)


def fill(tensors: Sequence[torch.Tensor], row: torch.Tensor) -> None:
    """Copy a row of `stack_over_ranks` into `tensors`."""
    for tensor, part in zip(tensors, row.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def same_everywhere(text: str) -> list[str] | None:
    """Return None if all processes pass the same `text`, else a list of their texts by rank.

    Processes can only exchange tensors of equal shapes, but texts can differ in length. So the
    processes first exchange digests and lengths. If the texts differ, the processes then exchange
    the texts, padded to the greatest length.
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
