"""The genetic algorithm of EvNAS (section 3.3): tournament, crossover, mutation. It knows nothing of networks.

All random numbers come from the generator that is passed in; it and the results are on the CPU.
"""

import torch

VARIANTS = ("evnas", "rand", "nd", "ndt", "ndf", "mut", "cross")


def merit(fitness, violation):
    """Return (P,) by which individuals compare: smaller violation first, then fitness; equal for equals (Deb, 2000)."""
    if violation is None:
        return fitness
    # Rows are sorted by their first, then by their second column; what is returned is each one's place.
    return torch.stack([-violation, fitness.to(violation)], dim=1).unique(dim=0, return_inverse=True)[1]


def non_dominated(points):
    """Tell (N,) which of (N, K) points, the smaller the better, no unequal one is at least as good as in everything."""
    no_worse = (points[:, None] <= points).all(-1)  # [i, j]: i nowhere worse than j
    return ~(no_worse & ~no_worse.T).any(0)


def tournament(fitness, tsize, count, generator):
    """Return `count` winners, (count,): each the fittest of `tsize` distinct individuals drawn uniformly from all P.

    Among equally fit entrants the first drawn wins, so each is as likely to.
    """
    # The order of P uniform numbers is a uniform order of drawing; the first tsize enter.
    entrants = torch.rand(count, len(fitness), generator=generator, dtype=torch.float64).argsort(dim=1)[:, :tsize]
    # argmax promises the first of equals.
    return entrants.gather(1, fitness[entrants].argmax(dim=1, keepdim=True)).squeeze(1)


def crossover(parent1, parent2, generator):
    """Return children (N, G, E, O): each of the G * E rows comes whole from parent 1 or 2, with probability 1/2."""
    take_first = torch.rand(parent1.shape[:-1], generator=generator) < 0.5
    return torch.where(take_first.unsqueeze(-1), parent1, parent2)


def mutate(alphas, mutate_rate, generator):
    """Replace each row (O,) of (N, G, E, O), with probability `mutate_rate`, by fresh uniform [0, 1) values."""
    hit = torch.rand(alphas.shape[:-1], generator=generator) < mutate_rate
    return torch.where(hit.unsqueeze(-1), torch.rand(alphas.shape, generator=generator), alphas)


def next_generation(alphas, fitness, *, num_elites, tsize, mutate_rate, generator, variant="evnas", violation=None):
    """Breed the next population.

    alphas (P, G, E, O) raw, fitness (P,), in any order -> (P, G, E, O) raw: the `num_elites` fittest unchanged, best
    first, then children of tournament winners. variant="mut" leaves out crossover, "cross" mutation; "rand" returns a
    fresh uniform population (fitness may be None). With `violation` (P,), 0 where a budget is met, individuals compare
    by `merit`. Raises ValueError for sizes that do not fit the population.
    """
    P = len(alphas)
    if variant == "rand":
        return torch.rand(alphas.shape, generator=generator)
    if not (0 <= num_elites <= P and 1 <= tsize <= P and len(fitness) == P):
        raise ValueError(f"num_elites {num_elites}, tsize {tsize} or {len(fitness)} fitness do not fit {P} individuals")
    fitness = merit(fitness, violation)
    elites = alphas[torch.sort(fitness, descending=True, stable=True).indices[:num_elites]]
    parents = [alphas[tournament(fitness, tsize, P - num_elites, generator)]]
    if variant == "mut":
        children = parents[0]
    else:
        parents.append(alphas[tournament(fitness, tsize, P - num_elites, generator)])
        children = crossover(*parents, generator)
    if variant != "cross":
        children = mutate(children, mutate_rate, generator)
    return torch.cat([elites, children])
