"""How much memory a run will take, from its sizes alone: what cannot fit is refused, what may not fit is warned of.

A training step keeps feature maps for its backward pass: so many of each operation, whatever the weights. With the
weights, their gradients and momentum they are nearly all that a run needs. `tests/test_memory.py` compares the estimate
with what runs take.
"""

import sys
from typing import NamedTuple

import torch

from support import devices, distributed
from support.files import UserError

# Of an operation on C channels: feature maps, of its output's size, that are kept; weights, times C * C; times C.
NEEDS = {
    "none": (0, 0, 0),
    "skip_connect": (0, 0, 0),
    "max_pool_3x3": (2, 0, 0),  # indices of eight bytes
    "avg_pool_3x3": (0, 0, 0),
    "sep_conv_3x3": (6, 2, 18),
    "sep_conv_5x5": (6, 2, 50),
    "sep_conv_7x7": (6, 2, 98),
    "dil_conv_3x3": (3, 1, 9),
    "dil_conv_5x5": (3, 1, 25),
    "conv_7x1_1x7": (3, 14, 0),
    "nor_conv_1x1": (2, 1, 0),
    "nor_conv_3x3": (2, 9, 0),
}
INPUTS = {"s1": (10, 6, 0), "s2": (0, 0, 0)}  # the same of what a cell does to its two inputs
POOL_NORM = {"s1": 2, "s2": 0}  # maps that BatchNorm behind the two pools of a supernet's edge keeps
REDUCTION = 1.4  # a reduction cell's, since its inputs are four times as large
FAST = {"s1": 0.7, "s2": 0.9}  # of the maps that the plain path keeps
SURE = 0.5  # of the activations: a run is refused only if this share of them does not fit
MUCH = 0.8  # of the memory: above it there is a warning


class Cell(NamedTuple):
    """The sizes of a cell: its output has C channels a node and so many pixels."""

    C: int
    pixels: int
    reduction: bool
    operations: tuple  # names, one for each that runs


class Estimate(NamedTuple):
    """Bytes: of weights, gradients and momentum; of one image's activations; those with --checkpoint."""

    weights: int
    activations: float
    checkpointed: float


def s1_cells(C: int, layers: int, pixels: int, normal: tuple, reduce: tuple) -> list[Cell]:
    """Return the cells of a network of the DARTS space whose first one sees so many pixels."""
    cells = []
    for i in range(layers):
        reduction = i in (layers // 3, 2 * layers // 3)
        if reduction:
            C, pixels = 2 * C, pixels // 4
        cells.append(Cell(C, pixels, reduction, reduce if reduction else normal))
    return cells


def s2_cells(C: int, N: int, pixels: int, operations: tuple) -> list[Cell]:
    """Return the cells of a network of NAS-Bench-201: N in each of three stages."""
    return [Cell(C << stage, pixels >> 2 * stage, False, operations) for stage in range(3) for _ in range(N)]


def estimate(space: str, cells: list[Cell], args, maps_share: float = 1.0, extra_maps: int = 0) -> Estimate:
    """Estimate a network's needs; `extra_maps` is added to each cell's, and of all maps `maps_share` is kept."""
    weights, kept, inputs = 0, [], 0
    for cell in cells:
        needs = [INPUTS[space], *(NEEDS[name] for name in cell.operations)]
        maps = (sum(need[0] for need in needs) + extra_maps) * (REDUCTION if cell.reduction else 1)
        weights += sum(need[1] * cell.C**2 + need[2] * cell.C for need in needs)
        kept.append(4 * maps * maps_share * cell.C * cell.pixels)
        inputs += 4 * (4 if space == "s1" else 1) * cell.C * cell.pixels
    # With --checkpoint the cells' inputs are kept; one cell at a time is computed again, and has its gradients beside.
    return Estimate(4 * (3 if args.momentum else 2) * weights, sum(kept), inputs + 2 * max(kept))


def supernet(space: str, cells: list[Cell], args) -> Estimate:
    """Estimate a supernet's needs: `estimate` for the path that `args` choose."""
    edges = {"s1": 14, "s2": 6}[space]
    share = 1.0 if args.plain else FAST[space]
    return estimate(space, cells, args, share, POOL_NORM[space] * edges)


def check_search(network: Estimate, args, loaders, device, individual: int) -> None:
    """Check what a search takes: its population, of so many float32 numbers each, and `check_training`."""
    compared = 24 * args.pop_size**2  # tournaments and the front compare all with all
    numbers = 4 * individual * (6 * args.pop_size + 3 * args.baselines)
    check({"population": compared + numbers}, torch.device("cpu"), "make --pop_size or --baselines smaller")
    check_training(network, args, loaders, device)


def check_training(network: Estimate, args, loaders, device) -> None:
    """Check what a run takes that trains `network` on batches of --batch_size from `loaders`.

    Raises UserError if it cannot fit, and prints a note if it may not.
    """
    processes, here = distributed.world_size(), 1 if device.type == "cuda" else distributed.local_world_size()
    activations = network.checkpointed if args.checkpoint else network.activations
    activations *= args.batch_size / processes * (0.5 if args.amp else 1)
    images = sum(loader.memory for loader in loaders)
    needs = {"weights, gradients and momentum": network.weights, "activations of a training step": activations}
    needs = {what: size * here for what, size in (needs | {"images": images}).items()}
    advice = "make --init_channels, the number of cells or --batch_size smaller"
    check(needs, device, advice if args.checkpoint else f"give --checkpoint, or {advice}")


def check(needs: dict, device, advice: str) -> None:
    """Compare `needs`, {what: bytes}, with the memory that there is. Raises UserError; prints a note."""
    there = devices.total_memory(device)
    sure = sum(size * (SURE if what.startswith("activations") else 1) for what, size in needs.items())
    total = sum(needs.values())
    parts = ", ".join(f"{what} {gigabytes(size)}" for what, size in needs.items() if size > 0.01 * total)
    needed, memory = (
        gigabytes(total),
        f"the {gigabytes(there)} of memory of {'this machine' if device.type == 'cpu' else device}",
    )
    if sure > there:
        raise UserError(f"this run needs about {needed} ({parts}), which does not fit into {memory}: {advice}")
    if total > MUCH * there:
        note = f"note: this run may take {needed} ({parts}) of {memory}; if it runs out, {advice}"
        distributed.say(note, file=sys.stderr)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
