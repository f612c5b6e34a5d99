"""Architecture parameters (alphas) of the NAS-Bench-201 search space.

Alphas have the shape (..., G, E, O) = (..., 1, 6, 5): one kind of cell, six edges, five operations.
Leading dimensions are free, so functions accept one individual or a whole population.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nas201.genotypes import EDGES, PRIMITIVES, to_arch_string


def random_alphas(P: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw P raw individuals (P, 1, 6, 5), uniform in [0, 1), float32, on the generator's device."""
    device = generator.device if generator is not None else None
    return torch.rand(P, 1, len(EDGES), len(PRIMITIVES), generator=generator, device=device)


def decode(alphas: Tensor) -> Tensor:
    """Return the one-hot form of raw alphas (..., 6, 5): 1 at each edge's largest value.

    Unlike in the DARTS space, the operation `none` can be chosen. Among equal values the lowest
    index wins. Decoding decoded alphas changes nothing.
    """
    best = alphas.argmax(dim=-1)  # unlike max, argmax promises the lowest index among equal values
    return F.one_hot(best, len(PRIMITIVES)).to(alphas.dtype)


def arch_string(alphas: Tensor) -> str:
    """Return the arch string of one individual's raw or decoded alphas, (1, 6, 5) or (6, 5).

    Raises ValueError for another shape.
    """
    shape = (len(EDGES), len(PRIMITIVES))
    if alphas.shape not in ((1, *shape), shape):
        raise ValueError(f"alphas of one architecture are (1, 6, 5) or (6, 5), not {tuple(alphas.shape)}")
    operations = alphas.reshape(shape).argmax(dim=-1).tolist()
    return to_arch_string(tuple(operations))
