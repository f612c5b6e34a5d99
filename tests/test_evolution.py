"""The genetic algorithm keeps its laws: elites, rates, distributions, randomness, budgets."""

from math import comb

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from evolution import crossover, mutate, next_generation, ranks, tournament

G, E = 2, 14
SHAPE = (G, E, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def population(P, seed=100):
    return torch.rand(P, *SHAPE, generator=generator(seed))


def labelled(P):
    """Every row of individual i holds i + 2: no fresh row in [0, 1) can look like it."""
    return (torch.arange(P) + 2.0).view(P, 1, 1, 1).expand(P, *SHAPE).contiguous()


def breed(alphas, fitness, seed=0, **changes):
    arguments = {"num_elites": 1, "tsize": 3, "mutate_rate": 0.1, "generator": generator(seed), **changes}
    return next_generation(alphas, fitness, **arguments)


def sources(children):
    """Which individual of labelled() each row comes from whole; -1 for a fresh row."""
    label = children[..., 0]
    old = label >= 2
    assert (children == label.unsqueeze(-1))[old].all()  # whole rows only
    fresh = children[~old]
    assert ((fresh >= 0) & (fresh < 1)).all()
    return torch.where(old, label.long() - 2, -1)


# ---- elites


@pytest.mark.parametrize("num_elites", [0, 1, 3, 10])
@pytest.mark.parametrize("variant", ["evnas", "nd", "ndt", "ndf", "mut", "cross"])
def test_elites_are_unchanged_and_first(num_elites, variant):
    alphas = population(10)
    fitness = torch.tensor([5.0, 9, 1, 7, 3, 8, 2, 6, 4, 0])
    children = breed(alphas, fitness, num_elites=num_elites, mutate_rate=1.0, variant=variant)
    assert children.shape == alphas.shape
    assert children.dtype == alphas.dtype
    best = [1, 5, 3, 7, 0, 8, 4, 6, 2, 9][:num_elites]
    assert torch.equal(children[:num_elites], alphas[best])
    if variant != "cross":
        assert not (children[num_elites:].unsqueeze(1) == alphas).all(-1).any()  # every other row is fresh


def test_earlier_elite_comes_first_among_equals():
    alphas = population(6)
    children = breed(alphas, torch.tensor([1.0, 2, 2, 1, 2, 1]), num_elites=4)
    assert torch.equal(children[:4], alphas[[1, 2, 4, 0]])


def test_next_generation_leaves_its_input_unchanged():
    alphas, fitness = population(8), torch.rand(8, generator=generator(1))
    before = alphas.clone(), fitness.clone()
    children = breed(alphas, fitness, num_elites=2)
    children.zero_()
    assert torch.equal(alphas, before[0])
    assert torch.equal(fitness, before[1])


# ---- children


def test_rows_come_whole_from_parents_or_are_fresh():
    rows = sources(breed(labelled(50), torch.rand(50, generator=generator(2)), mutate_rate=0.3))[1:]
    for child in rows.flatten(1).tolist():
        assert len(set(child) - {-1}) <= 2  # two parents
    assert (rows == -1).any()
    assert (rows >= 0).any()


def test_crossover_takes_each_row_from_either_parent_half_the_time():
    first, second = torch.zeros(10_000, *SHAPE), torch.ones(10_000, *SHAPE)
    rows = crossover(first, second, generator())
    assert (rows == rows[..., :1]).all()
    share = rows[..., 0].mean(0)  # (G, E)
    assert ((share - 0.5).abs() < 0.02).all()
    assert abs(share.mean() - 0.5) < 0.005
    covariance = torch.cov(rows[..., 0].flatten(1).T) - 0.25 * torch.eye(G * E)
    assert covariance.abs().max() < 0.02  # rows are independent


@pytest.mark.parametrize("mutate_rate", [0.0, 0.1, 0.35, 1.0])
def test_mutation_replaces_each_row_at_its_rate(mutate_rate):
    rows = sources(mutate(labelled(1).expand(10_000, *SHAPE), mutate_rate, generator()))
    share = (rows == -1).float()
    assert abs(share.mean() - mutate_rate) < 0.003
    assert ((share.mean(0) - mutate_rate).abs() < (0.01 if mutate_rate < 0.2 else 0.02)).all()  # each of the 28 rows
    covariance = torch.cov(share.flatten(1).T) - mutate_rate * (1 - mutate_rate) * torch.eye(G * E)
    assert covariance.abs().max() < 0.02


def test_whole_generations_have_the_rates_of_their_parts():
    """Among 10,000 children."""
    random, alphas, fitness = generator(), labelled(50), torch.zeros(50)
    generations = [breed(alphas, fitness, num_elites=0, tsize=1, generator=random) for _ in range(200)]
    rows = sources(torch.cat(generations)).flatten(1)
    assert abs((rows == -1).float().mean() - 0.1) < 0.01
    lower, upper = rows.masked_fill(rows == -1, 50).amin(1), rows.amax(1)
    rows, lower = rows[lower < upper], lower[lower < upper, None]  # two distinct parents
    share = (rows == lower).sum() / (rows >= 0).sum()
    assert abs(share - 0.5) < 0.02
    assert 0.97 < len(rows) / 10_000 < 0.99  # the parents coincide in one child of 50


def test_fresh_values_are_uniform():
    rows = mutate(torch.full((2000, *SHAPE), 2.0), 1.0, generator())
    assert rows.min() >= 0
    assert rows.max() < 1
    counts = torch.histc(rows, bins=20, min=0, max=1)
    assert chisquare(counts.numpy()).pvalue > 1e-4
    assert len(rows.unique()) > 0.9 * rows.numel()  # each child its own values


# ---- tournaments


def exact_distribution(fitness, tsize):
    """Probability that each individual wins: nobody fitter is drawn, and not only less fit ones; equals share it."""
    P, fitness = len(fitness), np.array(fitness)
    no_fitter = [comb((fitness <= f).sum(), tsize) for f in fitness]
    all_less_fit = [comb((fitness < f).sum(), tsize) for f in fitness]
    equals = [(fitness == f).sum() for f in fitness]
    return (np.array(no_fitter) - all_less_fit) / equals / comb(P, tsize)


FITNESSES = {
    "distinct": [3.0, 9.0, 1.0, 7.0, 5.0, 8.0, 2.0, 6.0],
    "ties": [3.0, 9.0, 3.0, 9.0, 3.0, 9.0, 1.0, 1.0],
    "equal": [4.0] * 8,
}


def assert_wins(winners, fitness, tsize):
    expected = exact_distribution(fitness, tsize)
    counts = np.bincount(winners.numpy(), minlength=len(fitness))
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    if possible.sum() > 1:
        assert chisquare(counts[possible], expected[possible] * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("kind", FITNESSES)
@pytest.mark.parametrize("tsize", [1, 2, 3, 7, 8])
def test_tournament_wins_are_distributed_as_computed_exactly(kind, tsize):
    fitness = FITNESSES[kind]
    assert_wins(tournament(torch.tensor(fitness), tsize, 20_000, generator()), fitness, tsize)


@pytest.mark.parametrize("tsize", [2, 3, 7, 8])
def test_first_drawn_of_equals_wins(tsize):
    """A tournament of one tells who is drawn first; among the fittest, that one wins a tournament of any size."""
    equal, ties = torch.zeros(8), torch.tensor(FITNESSES["ties"])
    first = tournament(equal, 1, 1000, generator())
    assert torch.equal(tournament(equal, tsize, 1000, generator()), first)
    among_best = ties[first] == ties.max()
    winners = tournament(ties, tsize, 1000, generator())
    assert torch.equal(winners[among_best], first[among_best])
    assert 300 < among_best.sum() < 450


@pytest.mark.parametrize("variant", ["evnas", "mut", "cross"])
def test_parents_are_tournament_winners(variant):
    """Rows of a child of a large generation, P = 2,000, are distributed as winners are."""
    P, tsize = 2000, 3
    fitness = torch.arange(P, 0, -1.0)[torch.randperm(P, generator=generator(3))]
    rows = sources(breed(labelled(P), fitness, num_elites=0, tsize=tsize, mutate_rate=0.0, variant=variant))
    places = P - fitness[rows[:, 0, 0]]  # 0 is the best
    expected = np.array([comb(P - lo, tsize) - comb(P - lo - 200, tsize) for lo in range(0, P, 200)]) / comb(P, tsize)
    counts = np.histogram(places.numpy(), bins=np.arange(0, P + 1, 200))[0]
    assert chisquare(counts, expected * P).pvalue > 1e-4


def test_parents_are_drawn_independently():
    """tsize = 1, two individuals: the parents differ half the time."""
    rows = torch.cat(
        [sources(breed(labelled(2), torch.zeros(2), s, num_elites=0, tsize=1, mutate_rate=0.0)) for s in range(1000)]
    )
    mixed = (rows.flatten(1).min(1).values != rows.flatten(1).max(1).values).float().mean()
    assert abs(mixed - 0.5) < 0.05


def test_children_share_no_parent_by_construction():
    """tsize = 1 of 100: two children have a parent in common in 4 % of all cases, neighbours no more often."""
    children = [breed(labelled(100), torch.zeros(100), s, num_elites=0, tsize=1, mutate_rate=0.0) for s in range(20)]
    parents = [[set(child) for child in sources(c).flatten(1).tolist()] for c in children]
    for distance in (1, 50):
        related = [bool(p[i] & p[i - distance]) for p in parents for i in range(100)]
        assert 0.02 < sum(related) / len(related) < 0.06


def test_only_the_best_breeds_when_all_compete():
    rows = sources(breed(labelled(7), torch.tensor([1.0, 2, 6, 3, 6, 0, 5]), tsize=7, mutate_rate=0.2))
    assert set(rows.unique().tolist()) == {-1, 2, 4}  # the two that are equally fit


def test_the_worst_never_wins():
    rows = sources(breed(labelled(5), torch.tensor([4.0, 3, 0, 2, 1]), num_elites=0, tsize=2, mutate_rate=0.0))
    assert 2 not in rows


# ---- variants


def test_variant_mut_has_one_parent():
    rows = sources(breed(labelled(100), torch.zeros(100), tsize=1, mutate_rate=0.5, variant="mut"))[1:].flatten(1)
    assert all(len(set(child) - {-1}) == 1 for child in rows.tolist())
    assert 0.45 < (rows == -1).float().mean() < 0.55


def test_variant_cross_has_no_fresh_rows():
    rows = sources(breed(labelled(100), torch.zeros(100), tsize=1, mutate_rate=1.0, variant="cross"))[1:].flatten(1)
    assert (rows >= 0).all()
    assert sum(len(set(child)) == 2 for child in rows.tolist()) > 80


@pytest.mark.parametrize("variant", ["nd", "ndt", "ndf"])
def test_variants_of_decoding_breed_alike(variant):
    alphas, fitness = population(12), torch.rand(12, generator=generator(4))
    assert torch.equal(breed(alphas, fitness, variant=variant), breed(alphas, fitness))


def test_variant_rand_is_a_fresh_population():
    alphas = labelled(50)
    fresh = breed(alphas, None, variant="rand")
    assert fresh.shape == alphas.shape
    assert fresh.min() >= 0
    assert fresh.max() < 1
    assert len(fresh.unique()) > 0.99 * fresh.numel()
    assert torch.equal(fresh, breed(alphas, torch.rand(50), variant="rand"))


# ---- randomness and sizes


@pytest.mark.parametrize("variant", ["evnas", "mut", "cross", "rand"])
def test_only_the_generator_decides_the_children(variant):
    alphas, fitness = population(20), torch.rand(20, generator=generator(5))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    children = breed(alphas, fitness, 6, variant=variant)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    torch.manual_seed(1234)
    assert torch.equal(breed(alphas, fitness, 6, variant=variant), children)
    assert not torch.equal(breed(alphas, fitness, 7, variant=variant), children)


def test_saved_generator_continues_its_sequence():
    alphas, fitness = population(10), torch.rand(10, generator=generator(8))
    random = generator(9)
    breed(alphas, fitness, generator=random)
    state = random.get_state()
    second = breed(alphas, fitness, generator=random)
    resumed = torch.Generator()
    resumed.set_state(state)
    assert torch.equal(breed(alphas, fitness, generator=resumed), second)


@pytest.mark.parametrize("sizes", [{"num_elites": 6}, {"num_elites": -1}, {"tsize": 6}, {"tsize": 0}, {"tsize": -1}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=str(*sizes.values())):
        breed(population(5), torch.zeros(5), **sizes)


def test_fitness_of_another_population_is_refused():
    with pytest.raises(ValueError):
        breed(population(5), torch.zeros(4))


def test_next_generation_takes_other_shapes():
    alphas = torch.rand(9, 1, 6, 5, generator=generator())
    children = breed(alphas, torch.arange(9.0))
    assert children.shape == (9, 1, 6, 5)
    assert torch.equal(children[0], alphas[8])


# ---- budgets


def test_ranks_compare_violation_first_then_fitness():
    """Of all pairs of 40 individuals, many of them equal in one or both."""
    fitness, violation = (torch.randint(4, (40,), generator=generator(s)).double() for s in (10, 11))
    rank = ranks(fitness, violation)
    keys = list(zip((-violation).tolist(), fitness.tolist(), strict=True))
    for i, one in enumerate(keys):
        assert [(one > other) - (one < other) for other in keys] == (rank[i] - rank).sign().tolist()


@pytest.mark.parametrize("variant", ["evnas", "mut", "cross"])
def test_violation_of_zero_changes_nothing(variant):
    alphas, fitness = population(20), torch.randint(5, (20,), generator=generator(5)).double()
    expected = breed(alphas, fitness, variant=variant)
    assert torch.equal(breed(alphas, fitness, variant=variant, violation=torch.zeros(20)), expected)


FITNESS_WITH_BUDGET = torch.tensor([1.0, 2, 9, 3, 8, 7])
VIOLATION = torch.tensor([0.0, 0, 0.5, 0.2, 0.1, 0.1])


def test_elites_are_feasible_first():
    rows = sources(breed(labelled(6), FITNESS_WITH_BUDGET, violation=VIOLATION, num_elites=6))
    assert rows[:, 0, 0].tolist() == [1, 0, 4, 5, 3, 2]


def test_parents_are_feasible_when_all_compete():
    settings = dict(tsize=6, num_elites=0, mutate_rate=0.0)
    rows = sources(breed(labelled(6), FITNESS_WITH_BUDGET, violation=VIOLATION, **settings))
    assert set(rows.unique().tolist()) == {1}
