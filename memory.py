"""How much memory a run needs, estimated from its sizes.

A run that cannot fit is refused; one that may not fit gets a warning. A training step keeps feature
maps for its backward pass: a fixed number for each operation, whatever the weights. Together with
the weights, their gradients and the momentum they are nearly all that a run needs.
`tests/test_memory.py` compares the estimate with what runs take.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from support import devices, distributed
from support.files import UserError


class Need(NamedTuple):
    """What an operation on C channels needs."""

    maps: int  # feature maps of its output's size that it keeps for the backward pass
    squared: int  # it has squared * C * C + linear * C weights
    linear: int


NEEDS = {
    "none": Need(0, 0, 0),
    "skip_connect": Need(0, 0, 0),
    "max_pool_3x3": Need(2, 0, 0),  # indices of eight bytes
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
PREPROCESSING = {"s1": Need(10, 6, 0), "s2": Need(0, 0, 0)}  # what a cell of each space does to its inputs
# Maps that the BatchNorms after the two pools of a supernet's edge keep.
POOL_NORM = {"s1": 2, "s2": 0}
REDUCTION = 1.4  # factor for a reduction cell, because its inputs are four times as large
FAST = {"s1": 0.7, "s2": 0.9}  # share of the reference path's maps that the fast path keeps
# A run is refused only if this share of the estimated activations does not fit: the estimate may be
# too high.
SURE = 0.5
MUCH = 0.8  # share of the memory above which there is a warning


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
    checkpointed: float  # the same with --checkpoint


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
    return [Cell(C << stage, pixels >> 2 * stage, False, operations) for stage in range(3) for _ in range(N)]


def estimate(
    space: str, cells: list[Cell], args: argparse.Namespace, maps_share: float = 1.0, extra_maps: int = 0
) -> Estimate:
    """Estimate what a network of these cells needs. `space` is "s1" or "s2".

    `maps_share` is the share of the feature maps that is kept. `extra_maps` is added to the maps of
    each cell.
    """
    weights = 0
    kept = []  # bytes of one image, for each cell
    inputs = 0  # bytes of one image
    for cell in cells:
        needs = [PREPROCESSING[space], *(NEEDS[name] for name in cell.operations)]
        maps = (sum(need.maps for need in needs) + extra_maps) * (REDUCTION if cell.reduction else 1)
        weights += sum(need.squared * cell.C**2 + need.linear * cell.C for need in needs)
        kept.append(4 * maps * maps_share * cell.C * cell.pixels)
        inputs += 4 * (4 if space == "s1" else 1) * cell.C * cell.pixels
    # With --checkpoint the inputs of all cells are kept. One cell at a time is computed again, next
    # to its gradients.
    copies = 3 if args.momentum else 2
    return Estimate(4 * copies * weights, sum(kept), inputs + 2 * max(kept))


def supernet(space: str, cells: list[Cell], args: argparse.Namespace) -> Estimate:
    """Estimate what a supernet needs, on the fast path or with --plain. `space` is "s1" or "s2"."""
    edges = {"s1": 14, "s2": 6}[space]
    share = 1.0 if args.plain else FAST[space]
    return estimate(space, cells, args, share, POOL_NORM[space] * edges)


def check_search(
    network: Estimate, args: argparse.Namespace, loaders: Sequence[Any], device: torch.device, genes: int
) -> None:
    """Check that a search fits into memory: its population, and then its training.

    An individual has `genes` float32 numbers. Raises UserError if it cannot fit, and prints a note
    if it may not.
    """
    compared = 24 * args.pop_size**2  # tournaments and the front compare all individuals with all
    numbers = 4 * genes * (6 * args.pop_size + 3 * args.baselines)
    check({"population": compared + numbers}, torch.device("cpu"), "make --pop_size or --baselines smaller")
    check_training(network, args, loaders, device)


def check_training(network: Estimate, args: argparse.Namespace, loaders: Sequence[Any], device: torch.device) -> None:
    """Check that training `network` on batches of --batch_size from `loaders` fits.

    Raises UserError if it cannot fit, and prints a note if it may not.
    """
    activations = network.checkpointed if args.checkpoint else network.activations
    activations *= args.batch_size / distributed.world_size() * (0.5 if args.amp else 1)
    images = sum(loader.memory for loader in loaders)
    needs = {
        "weights, gradients and momentum": network.weights,
        "activations of a training step": activations,
        "images": images,
    }
    sharing = 1 if device.type == "cuda" else distributed.local_world_size()  # processes that share this memory
    needs = {what: size * sharing for what, size in needs.items()}
    advice = "make --init_channels, the number of cells or --batch_size smaller"
    check(needs, device, advice if args.checkpoint else f"give --checkpoint, or {advice}")


def check(needs: dict[str, float], device: torch.device, advice: str) -> None:
    """Compare `needs`, {what: bytes}, with the memory of the device or machine.

    Raises UserError, with `advice`, if they cannot fit, and prints a note if they may not.
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
    """Return a number of bytes as text."""
    return f"{size / 1e9:,.1f} GB"
