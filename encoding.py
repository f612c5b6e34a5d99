"""Architecture parameters (alphas) of the DARTS search space, and how they are decoded.

Alphas have the shape (..., G, E, O) = (..., 2, 14, 8): two kinds of cell, 14 edges, 8 operations.
Leading dimensions are free, so a function takes one individual or a whole population.

alphas[..., 0, :, :] is for the normal cell and alphas[..., 1, :, :] for the reduction cell. Edges
are numbered node by node, and by input within a node: edges 0 and 1 lead to the first node, edges 2
to 4 to the second node, and so on. Operations are numbered as in `genotypes.PRIMITIVES`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from genotypes import PRIMITIVES, Genotype

NODE_EDGES = [range(0, 2), range(2, 5), range(5, 9), range(9, 14)]  # the edges into each node


def random_alphas(P: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw P raw individuals (P, 2, 14, 8), uniform in [0, 1), float32, on the generator's device."""
    device = generator.device if generator is not None else None
    return torch.rand(P, 2, NODE_EDGES[-1].stop, len(PRIMITIVES), generator=generator, device=device)


class Ranking(NamedTuple):
    """The best operation of each edge, and each node's edges by strength, for alphas (..., 14, 8)."""

    best_op: Tensor  # (..., 14), number of each edge's best operation
    node_edges: list[Tensor]  # for each node, the numbers of its edges (..., 2 + node), strongest first


def rank(alphas: Tensor) -> Ranking:
    """Rank the operations of each edge and the edges of each node.

    An edge's best operation is the one with the largest alpha, not counting `none`. The edge's
    strength is the softmax probability of its best operation, among all 8 operations. In a tie the
    lower index comes first.
    """
    probabilities = torch.softmax(alphas, dim=-1)[..., 1:]  # (..., 14, 7), without `none`
    best_op = probabilities.argmax(dim=-1) + 1  # in a tie argmax returns the lowest index; max may not
    strength = probabilities.amax(dim=-1)  # (..., 14)
    node_edges = []
    for edges in NODE_EDGES:
        node_strength = strength[..., edges.start : edges.stop]  # (..., 2 + node)
        order = torch.sort(node_strength, dim=-1, descending=True, stable=True).indices
        node_edges.append(order + edges.start)
    return Ranking(best_op, node_edges)


def decode(alphas: Tensor) -> Tensor:
    """Return the one-hot form of raw alphas (..., 14, 8), same shape (EvNAS section 3).

    Each node keeps its two strongest edges (see `rank`). A kept edge has a 1 at its best operation.
    All other entries are 0. Decoding the result again does not change it.
    """
    best_op, node_edges = rank(alphas)
    # The last two axes are flattened, so operation `op` of edge `e` is at position 8 * e + op.
    # fmt: off
    kept = torch.cat([edges[..., :2] for edges in node_edges], dim=-1)        # (..., 8) edges
    position = kept * alphas.shape[-1] + best_op.gather(-1, kept)             # (..., 8), among 14 * 8
    decoded = torch.zeros_like(alphas).flatten(-2).scatter(-1, position, 1.0)
    return decoded.view_as(alphas)                                            # (..., 14, 8)
    # fmt: on


def genotype(alphas: Tensor) -> Genotype:
    """Return the Genotype of one raw individual (2, 14, 8). Each node's stronger edge comes first."""
    best_op, node_edges = rank(alphas)
    cells = []
    for g in range(2):
        pairs = []
        for edges, order in zip(NODE_EDGES, node_edges, strict=True):
            for edge in order[g, :2].tolist():
                source = edge - edges.start  # a node's edges are numbered by input
                pairs.append((PRIMITIVES[best_op[g, edge]], source))
        cells.append(pairs)
    normal, reduce = cells
    return Genotype(normal, [2, 3, 4, 5], reduce, [2, 3, 4, 5])
