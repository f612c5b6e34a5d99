"""Architecture parameters of the DARTS space: (..., G, E, O) = (..., 2, 14, 8), one individual or a whole population.

alphas[..., 0, :, :] is the normal cell, 1 the reduction cell. Edges are numbered node by node, within a node by input.
"""

import torch

from genotypes import PRIMITIVES, Genotype

NODE_EDGES = [range(0, 2), range(2, 5), range(5, 9), range(9, 14)]  # the edges into each node


def random_alphas(P, generator=None):
    """Draw P raw individuals (P, 2, 14, 8), entries uniform in [0, 1), on the generator's device."""
    device = generator and generator.device
    return torch.rand(P, 2, NODE_EDGES[-1].stop, len(PRIMITIVES), generator=generator, device=device)


def _select(alphas):
    """Return each edge's best operation (..., 14), and a list of each node's edges, strongest first (..., n_edges)."""
    candidates = torch.softmax(alphas, dim=-1)[..., 1:]  # `none` takes no part
    op = candidates.argmax(dim=-1) + 1  # argmax, unlike max, promises the lowest index among equals
    strength = candidates.amax(dim=-1)
    ranked = [
        torch.sort(strength[..., edges.start : edges.stop], dim=-1, descending=True, stable=True).indices + edges.start
        for edges in NODE_EDGES
    ]
    return op, ranked


def decode(alphas):
    """Return the one-hot form of raw alphas, same shape (EvNAS section 3): two edges a node keep one operation each.

    Of each edge the best operation but `none` counts (the lowest index among equals), of each node the two edges
    strongest in the softmax of that operation (the lower edge among equals). Idempotent.
    """
    op, ranked = _select(alphas)
    kept = torch.cat([edges[..., :2] for edges in ranked], dim=-1)  # (..., 2, 8)
    position = kept * alphas.shape[-1] + op.gather(-1, kept)  # in the flattened (E * O)
    return torch.zeros_like(alphas).flatten(-2).scatter(-1, position, 1.0).view_as(alphas)


def genotype(alphas):
    """Return the Genotype of one raw individual (2, 14, 8); a node's stronger edge comes first."""
    op, ranked = _select(alphas)
    cells = []
    for g in range(2):
        pairs = []
        for edges, order in zip(NODE_EDGES, ranked, strict=True):
            pairs += [(PRIMITIVES[op[g, e]], e - edges.start) for e in order[g, :2].tolist()]
        cells.append(pairs)
    return Genotype(cells[0], [2, 3, 4, 5], cells[1], [2, 3, 4, 5])
