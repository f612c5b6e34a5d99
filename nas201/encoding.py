"""Architecture parameters of the NAS-Bench-201 space: (..., G, E, O) = (..., 1, 6, 5), one or many."""

import torch

from nas201.genotypes import EDGES, PRIMITIVES, to_arch_string


def random_alphas(P, generator=None):
    """Draw P raw individuals (P, 1, 6, 5), entries uniform in [0, 1), float32, on the generator's device."""
    device = generator and generator.device
    return torch.rand(P, 1, len(EDGES), len(PRIMITIVES), generator=generator, device=device)


def decode(alphas):
    """Return the one-hot form of raw alphas (..., 6, 5): 1 at each edge's best operation, `none` included.

    The lowest index among equals wins. Idempotent.
    """
    best = alphas.argmax(dim=-1)  # argmax, unlike max, promises the lowest index among equals
    return torch.nn.functional.one_hot(best, len(PRIMITIVES)).to(alphas.dtype)


def arch_indices(alphas):
    """Return six operation indices, in edge order, of one individual's alphas, (1, 6, 5) or (6, 5)."""
    if alphas.shape not in ((1, len(EDGES), len(PRIMITIVES)), (len(EDGES), len(PRIMITIVES))):
        raise ValueError(f"alphas of one architecture are (1, 6, 5) or (6, 5), not {tuple(alphas.shape)}")
    return tuple(alphas.reshape(len(EDGES), len(PRIMITIVES)).argmax(dim=-1).tolist())


def arch_string(alphas):
    """Return the arch string of one individual's raw or decoded alphas, (1, 6, 5) or (6, 5)."""
    return to_arch_string(arch_indices(alphas))
