"""Estimate how much memory a run needs, from the sizes of its network, batches and images.

A run that cannot fit into memory is refused. A run that may not fit gets a warning. For its
backward pass, a training step keeps a fixed number of feature maps for each operation. These
feature maps, the weights, their gradients and the momentum are nearly all the memory that a run
needs. `tests/test_memory.py` compares the estimate with the memory that training really takes.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from support import devices, distributed
from support.files import UserError


class Need(NamedTuple):
    """The memory that an operation on C channels needs."""

    maps: int  # number of feature maps, of the output's size, that are kept for the backward pass
    squared: int  # the operation has squared * C * C + linear * C weights
    linear: int


NEEDS = {
    "none": Need(0, 0, 0),
    "skip_connect": Need(0, 0, 0),
    "max_pool_3x3": Need(2, 0, 0),  # its indices take eight bytes each, as much as two maps
    "avg_pool_3x3": Need(0, 0, 0),
    "sep_conv_3x3": Need(6, 2, 18),
    "sep_conv_5x5": Need(6, 2, 50),
    "sep_conv_7x7": Need(6, 2, 98),
    "dil_conv_3x3": Need(3, 1, 9),
    "dil_conv_5x5": Need(3, 1, 25),
    "conv_7x1_1x7": Need(3, 14, 0),
    "nor_conv_1x1": Need(2, 1, 0),
    "nor_conv_3x3": Need(2, 9, 0),
}
PREPROCESSING = {"s1": Need(10, 6, 0), "s2": Need(0, 0, 0)}  # for the inputs of a cell, by search space
# Feature maps that the BatchNorms after the two pools keep, for each edge of a supernet.
POOL_NORM = {"s1": 2, "s2": 0}
REDUCTION = 1.4  # factor for a reduction cell, because its inputs are four times as large
FAST = {"s1": 0.7, "s2": 0.9}  # share of the reference path's maps that the fast path keeps
# The estimate of the activations may be too high. So a run is refused only if even this share of
# the estimated activations does not fit into memory.
SURE = 0.5
MUCH = 0.8  # a run that may need more than this share of the memory gets a warning


class Cell(NamedTuple):
    """The sizes of a cell whose output has C channels for each node and `pixels` pixels."""

    C: int
    pixels: int
    reduction: bool
    operations: tuple[str, ...]  # one name for each operation that runs


class Estimate(NamedTuple):
    """The memory that a network needs, in bytes."""

    weights: int  # weights, gradients and momentum
    activations: float  # feature maps of one image
    checkpointed: float  # feature maps of one image, with --checkpoint


def s1_cells(C: int, layers: int, pixels: int, normal: tuple[str, ...], reduce: tuple[str, ...]) -> list[Cell]:
    """Return the cells of a network of the DARTS space (S1).

    The first cell sees `pixels` pixels.
    """
    cells = []
    for i in range(layers):
        reduction = i in (layers // 3, 2 * layers // 3)
        if reduction:
            C *= 2
            pixels //= 4
        cells.append(Cell(C, pixels, reduction, reduce if reduction else normal))
    return cells


def s2_cells(C: int, N: int, pixels: int, operations: tuple[str, ...]) -> list[Cell]:
    """Return the cells of a network of NAS-Bench-201 (S2): N in each of three stages."""
    # Each stage has twice the channels and a quarter of the pixels of the stage before.
    return [Cell(C << stage, pixels >> 2 * stage, False, operations) for stage in range(3) for _ in range(N)]


def estimate(
    space: str, cells: list[Cell], args: argparse.Namespace, maps_share: float = 1.0, extra_maps: int = 0
) -> Estimate:
    """Estimate the memory that a network of these cells needs. `space` is "s1" or "s2".

    `maps_share` is the share of the feature maps that is kept. `extra_maps` is added to the number
    of feature maps of each cell.
    """
    weights = 0
    kept = []  # for each cell: bytes of the feature maps of one image
    inputs = 0  # bytes of the inputs of all cells, for one image
    for cell in cells:
        needs = [PREPROCESSING[space], *(NEEDS[name] for name in cell.operations)]
        maps = (sum(need.maps for need in needs) + extra_maps) * (REDUCTION if cell.reduction else 1)
        weights += sum(need.squared * cell.C**2 + need.linear * cell.C for need in needs)
        kept.append(4 * maps * maps_share * cell.C * cell.pixels)
        inputs += 4 * (4 if space == "s1" else 1) * cell.C * cell.pixels
    # With --checkpoint only the inputs of all cells are kept. One cell at a time is computed again.
    # Its feature maps and their gradients are then in memory, hence the factor 2.
    copies = 3 if args.momentum else 2  # weights, gradients and, with momentum, the momentum buffers
    return Estimate(4 * copies * weights, sum(kept), inputs + 2 * max(kept))


def supernet(space: str, cells: list[Cell], args: argparse.Namespace) -> Estimate:
    """Estimate the memory that a supernet needs, on the fast path or with --plain. `space` is "s1" or "s2"."""
    edges = {"s1": 14, "s2": 6}[space]
    share = 1.0 if args.plain else FAST[space]
    return estimate(space, cells, args, share, POOL_NORM[space] * edges)


def check_search(
    network: Estimate, args: argparse.Namespace, loaders: Sequence[Any], device: torch.device, genes: int
) -> None:
    """Check that a search fits into memory: its population, and then its training.

    An individual has `genes` float32 numbers. Raises UserError if the search cannot fit, and prints
    a note if it may not fit.
    """
    compared = 24 * args.pop_size**2  # tournaments and the front compare every individual with every other one
    numbers = 4 * genes * (6 * args.pop_size + 3 * args.baselines)
    check({"population": compared + numbers}, torch.device("cpu"), "make --pop_size or --baselines smaller")
    check_training(network, args, loaders, device)


def check_training(network: Estimate, args: argparse.Namespace, loaders: Sequence[Any], device: torch.device) -> None:
    """Check that training fits into memory, with `network`, batches of --batch_size and the images of `loaders`.

    Raises UserError if the training cannot fit, and prints a note if it may not fit.
    """
    activations = network.checkpointed if args.checkpoint else network.activations
    activations *= args.batch_size / distributed.world_size() * (0.5 if args.amp else 1)
    images = sum(loader.memory for loader in loaders)
    needs = {
        "weights, gradients and momentum": network.weights,
        "activations of a training step": activations,
        "images": images,
    }
    sharing = 1 if device.type == "cuda" else distributed.local_world_size()  # processes that share the memory
    needs = {what: size * sharing for what, size in needs.items()}
    advice = "make --init_channels, the number of cells or --batch_size smaller"
    check(needs, device, advice if args.checkpoint else f"give --checkpoint, or {advice}")


def check(needs: dict[str, float], device: torch.device, advice: str) -> None:
    """Compare `needs`, {what: bytes}, with the memory of the device or machine.

    Raises UserError, with `advice`, if the needs cannot fit, and prints a note if they may not fit.
    """
    available = devices.total_memory(device)
    certain = sum(size * (SURE if what.startswith("activations") else 1) for what, size in needs.items())
    total = sum(needs.values())
    parts = ", ".join(f"{what} {gigabytes(size)}" for what, size in needs.items() if size > 0.01 * total)
    owner = "this machine" if device.type == "cpu" else device
    memory = f"the {gigabytes(available)} of memory of {owner}"
    if certain > available:
        raise UserError(
            f"this run needs about {gigabytes(total)} ({parts}), which does not fit into {memory}: {advice}"
        )
    if total > MUCH * available:
        note = f"note: this run may need {gigabytes(total)} ({parts}) of {memory}; if it runs out of memory, {advice}"
        distributed.say(note, file=sys.stderr)


def gigabytes(size: float) -> str:
    """Return a number of bytes as text, in GB."""
    return f"{size / 1e9:,.1f} GB"
