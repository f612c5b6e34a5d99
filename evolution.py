"""The genetic algorithm of EvNAS: tournament, crossover, mutation (paper, section 3.3).

This module does not depend on networks. All random numbers come from the generator that is passed
in. The generator and all results are on the CPU.
"""

from typing import NamedTuple

import torch


class Variant(NamedTuple):
    """The settings of one variant in the paper's ablation study. The flag `--variant` selects a variant."""

    decoded_in_training: bool  # the shared weights train with decoded alphas, not with raw ones
    decoded_in_fitness: bool  # fitness is measured with decoded alphas, not with raw ones
    crossover: bool  # a child has two parents, not one
    mutation: bool  # a child mutates
    selection: bool  # a generation is bred from the fittest of the one before; otherwise it is random


VARIANTS = {
    #                training, fitness, crossover, mutation, selection
    "evnas": Variant(True, True, True, True, True),
    "rand": Variant(True, True, False, False, False),
    "nd": Variant(False, False, True, True, True),
    "ndt": Variant(False, True, True, True, True),
    "ndf": Variant(True, False, True, True, True),
    "mut": Variant(True, True, False, True, True),
    "cross": Variant(True, True, True, False, True),
}


def ranks(fitness: torch.Tensor, violation: torch.Tensor | None) -> torch.Tensor:
    """Return ranks (P,), higher is better: smaller violation first, then fitness.

    Ties share a rank (Deb, 2000). Without a violation the fitness (P,) itself is returned, because
    it gives the same order.
    """
    if violation is None:
        return fitness
    rows = torch.stack([-violation, fitness.to(violation)], dim=1)  # (P, 2)
    # `unique` sorts the distinct rows by the first column, then by the second. The inverse index is
    # the place of each individual's row in this order. That place is the rank.
    _, rank = rows.unique(dim=0, return_inverse=True)
    return rank


def non_dominated(points: torch.Tensor) -> torch.Tensor:
    """Return a mask (N,) of the non-dominated points of (N, K); smaller is better.

    A point is dominated if another point is nowhere worse and somewhere better. Equal points do not
    dominate each other.
    """
    nowhere_worse = (points[:, None] <= points).all(-1)  # [i, j]: point i is nowhere worse than point j
    dominates = nowhere_worse & ~nowhere_worse.T  # [i, j]: ... and point j is somewhere worse than point i
    return ~dominates.any(0)


def tournament(fitness: torch.Tensor, tsize: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Hold `count` tournaments among P individuals, and return the numbers (count,) of the winners.

    A winner is the fittest of `tsize` distinct individuals, which are drawn uniformly from all P.
    Among equally fit individuals the one that was drawn first wins, so all have the same chance.
    """
    # The order of P uniform random numbers is a random permutation. Its first `tsize` individuals
    # enter the tournament.
    draws = torch.rand(count, len(fitness), generator=generator, dtype=torch.float64)
    entrants = draws.argsort(dim=1)[:, :tsize]  # (count, tsize)
    fittest = fitness[entrants].argmax(dim=1, keepdim=True)  # in a tie argmax returns the first one
    return entrants.gather(1, fittest).squeeze(1)


def crossover(parent1: torch.Tensor, parent2: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the child of each pair of parents, (N, G, E, O).

    Each of a child's G * E rows is a copy of the row of parent 1 or of parent 2, with probability
    1/2 each.
    """
    take_first = torch.rand(parent1.shape[:-1], generator=generator) < 0.5  # (N, G, E)
    return torch.where(take_first.unsqueeze(-1), parent1, parent2)


def mutate(alphas: torch.Tensor, mutate_rate: float, generator: torch.Generator) -> torch.Tensor:
    """Replace random rows (O,) of `alphas` (N, G, E, O) by new uniform values in [0, 1).

    Each row is replaced with probability `mutate_rate`.
    """
    hit = torch.rand(alphas.shape[:-1], generator=generator) < mutate_rate  # (N, G, E)
    return torch.where(hit.unsqueeze(-1), torch.rand(alphas.shape, generator=generator), alphas)


def next_generation(
    alphas: torch.Tensor,
    fitness: torch.Tensor | None,
    *,
    num_elites: int,
    tsize: int,
    mutate_rate: float,
    generator: torch.Generator,
    variant: str = "evnas",
    violation: torch.Tensor | None = None,
) -> torch.Tensor:
    """Breed the next raw population (P, G, E, O) from `alphas`, a raw population of the same shape.

    The new population begins with the `num_elites` fittest individuals, unchanged and best first.
    The children of tournament winners follow. `fitness` (P,) is the fitness of `alphas`, which need
    not be sorted. `violation` (P,) says by how much individuals exceed the budgets; it is 0 for
    individuals that meet them. See `ranks`.

    `variant` is a key of VARIANTS. A variant without selection returns a new uniform random
    population and needs no fitness.

    Raises ValueError for sizes that do not fit the population, and KeyError for a variant that does
    not exist.
    """
    plan = VARIANTS[variant]
    P = len(alphas)
    if not plan.selection:
        return torch.rand(alphas.shape, generator=generator)
    if not (0 <= num_elites <= P and 1 <= tsize <= P and len(fitness) == P):
        raise ValueError(
            f"num_elites {num_elites}, tsize {tsize} or {len(fitness)} fitness values do not fit {P} individuals"
        )
    rank = ranks(fitness, violation)
    elites = alphas[torch.sort(rank, descending=True, stable=True).indices[:num_elites]]
    children = alphas[tournament(rank, tsize, P - num_elites, generator)]
    if plan.crossover:
        others = alphas[tournament(rank, tsize, P - num_elites, generator)]
        children = crossover(children, others, generator)
    if plan.mutation:
        children = mutate(children, mutate_rate, generator)
    return torch.cat([elites, children])
