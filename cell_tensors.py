"""The tensors of a searched cell of the DARTS space, grouped as `fast_search` and `fused_search` read them.

The cells there are functions of tensors, not of modules, so that equal cells share one compiled
graph. Therefore they identify a BatchNorm by a number. Each state has a list of BatchNorms, and
`outgoing_of` assigns the numbers. A number finds the running statistics of its BatchNorm, and the
place where batch statistics are stored.

Shapes: C channels of a cell, E = 14 edges of a cell. States are numbered as in the reference: 0 and
1 are a cell's inputs, and 2, 3, ... are its nodes 0, 1, ...
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genotypes import PRIMITIVES
from model_search import Cell
from operations import FactorizedReduce, Sequence

MAX_POOL = PRIMITIVES.index("max_pool_3x3")
AVG_POOL = PRIMITIVES.index("avg_pool_3x3")
SKIP = PRIMITIVES.index("skip_connect")
POOLS = (MAX_POOL, AVG_POOL)
FIRST_CONV = SKIP + 1  # this operation and all later ones are separable convolutions


def row(node: int, state: int) -> int:
    """Return the number of the edge from a state to a node: its row in the alphas and its index in `Cell._ops`.

    Node n has n + 2 incoming edges, so n * (n + 3) / 2 edges lead to the nodes before it.
    """
    return node * (node + 3) // 2 + state


class Separable(NamedTuple):
    """A depthwise convolution, a 1x1 convolution and a BatchNorm."""

    depthwise: Tensor  # (C, 1, k, k)
    pointwise: Tensor  # (C, C, 1, 1)
    norm: int  # number of its BatchNorm


class Edge(NamedTuple):
    """An edge out of a state."""

    node: int  # the node that the edge leads to
    row: int  # the edge's row in the alphas
    convolutions: list[list[Separable]]  # for each operation from FIRST_CONV on: one if dilated, else two
    pool_norms: list[int] | None  # BatchNorm after each of POOLS; None if all edges of the state share them


class Skips(NamedTuple):
    """The skip_connects on all edges out of one input of a reduction cell, which are computed together."""

    kernels_1: Tensor  # (edges * C / 2, C, 1, 1), each edge's conv_1
    kernels_2: Tensor  # (edges * C / 2, C, 1, 1), each edge's conv_2
    norm: int  # number of the BatchNorm, of edges * C channels


class Outgoing(NamedTuple):
    """All edges out of a state."""

    state: int
    edges: list[Edge]
    skips: Skips | None  # None if the skip_connects are identities
    pool_norms: list[int] | None  # BatchNorm after each of POOLS, for all edges; None with running statistics
    running: list[tuple[Tensor, Tensor]] | None  # (mean, variance) by BatchNorm; None with batch statistics


class CellKernels(NamedTuple):
    """The tensors of a cell, and the BatchNorm modules that the numbers stand for."""

    outgoing: list[Outgoing]  # by state; the last node has no edges out of it
    norms: list[list[list[nn.BatchNorm2d]]]  # for each state and number, the modules that are computed as one
    eps: float  # of all BatchNorms


def outgoing_kernels(cell: Cell, bn: str) -> CellKernels:
    """Return the tensors of a cell for the statistics `bn`, "batch" or "running"."""
    outgoing = []
    norms = []
    for state in range(1 + cell._steps):
        of_state, norms_of_state = outgoing_of(cell, state, bn)
        outgoing.append(of_state)
        norms.append(norms_of_state)
    return CellKernels(outgoing, norms, eps=norms[0][0][0].eps)


def outgoing_of(cell: Cell, state: int, bn: str) -> tuple[Outgoing, list[list[nn.BatchNorm2d]]]:
    """Return the edges out of a state, and the BatchNorm modules of these edges.

    Entry i of the second result lists the modules with number i, which are computed as one.
    """
    nodes = range(max(0, state - 1), cell._steps)
    ops_of_edges = [cell._ops[row(node, state)]._ops for node in nodes]
    norms = []

    def number_of(*modules: nn.BatchNorm2d) -> int:
        norms.append(list(modules))
        return len(norms) - 1

    # The BatchNorms after a pool differ between edges only in their running statistics. So with
    # batch statistics they are computed as one.
    pool_norms = None
    if bn == "batch":
        pool_norms = [number_of(*(ops[pool][1] for ops in ops_of_edges)) for pool in POOLS]
    skips = None
    if isinstance(ops_of_edges[0][SKIP], FactorizedReduce):
        modules = [ops[SKIP] for ops in ops_of_edges]
        skips = Skips(
            kernels_1=torch.cat([skip.conv_1.weight for skip in modules]),
            kernels_2=torch.cat([skip.conv_2.weight for skip in modules]),
            norm=number_of(*(skip.bn for skip in modules)),
        )
    edges = []
    for node, ops in zip(nodes, ops_of_edges, strict=True):
        convolutions = [separables_of(op, number_of) for op in ops[FIRST_CONV:]]
        edge_pool_norms = [number_of(ops[pool][1]) for pool in POOLS] if bn == "running" else None
        edges.append(Edge(node, row(node, state), convolutions, edge_pool_norms))
    running = [joint_statistics(modules) for modules in norms] if bn == "running" else None
    return Outgoing(state, edges, skips, pool_norms, running), norms


def separables_of(op: Sequence, number_of: Callable[[nn.BatchNorm2d], int]) -> list[Separable]:
    """Return the separable convolutions of an operation, one or two."""
    layers = list(op.op)  # four for each separable convolution, see `operations.separable`
    separables = []
    for start in range(0, len(layers), 4):
        _, depthwise_conv, pointwise_conv, norm = layers[start : start + 4]
        separables.append(Separable(depthwise_conv.weight, pointwise_conv.weight, number_of(norm)))
    return separables


def joint_statistics(norms: list[nn.BatchNorm2d]) -> tuple[Tensor, Tensor]:
    """Return the concatenated running mean and variance of BatchNorms, each (norms * C,)."""
    means = torch.cat([norm.running_mean for norm in norms])
    variances = torch.cat([norm.running_var for norm in norms])
    return means, variances


def factorized_reduce(even: Tensor, odd: Tensor, kernels_1: Tensor, kernels_2: Tensor, edges: int = 1) -> Tensor:
    """Compute the FactorizedReduce of several edges at once, without their BatchNorm.

    `even` and `odd` (B, C_in, H, W) are the pixels that the two convolutions of each edge see. The
    kernels are (edges * C / 2, C_in, 1, 1). Returns (B, edges * C, H, W), with the channels of the
    first edge first.
    """
    first_halves = F.conv2d(even, kernels_1).chunk(edges, dim=1)  # for each edge (B, C / 2, H, W)
    second_halves = F.conv2d(odd, kernels_2).chunk(edges, dim=1)
    halves = []
    for first, second in zip(first_halves, second_halves, strict=True):
        halves += [first, second]
    return torch.cat(halves, dim=1)
