"""Seeds: the random streams of a run, and those of runs with other seeds, have nothing in common."""

import itertools

import numpy as np
import pytest
import torch

import baselines
import search_cli
import search_state
import seed_roles
import train
import train_search
from support import seeds

from helpers import search_line, train_line

SEEDS = (18, 19, 20, 2021)  # those of the paper's searches, and that of the random architectures


def test_no_two_roles_and_seeds_share_a_stream():
    derived = [seeds.derive(seed, role, 2) for seed in (*SEEDS, 0, 2**32 + 18, 2**63 - 1) for role in seed_roles.ROLES]
    # torch's CPU generators use the low 32 bits.
    assert len({seed % 2**32 for seed in derived}) == len(derived)
    assert all(0 <= seed < 2**63 for seed in derived)
    draws = [torch.rand(1000, generator=torch.Generator().manual_seed(seed)) for seed in derived]
    correlations = np.corrcoef(torch.stack(draws)) - np.eye(len(draws))
    assert np.abs(correlations).max() < 0.2


def test_derived_seeds_stay_the_same():
    """A run is resumed by later versions too."""
    assert seeds.derive(18, seed_roles.WEIGHTS, 2) == 9140099578219913275
    assert seeds.derive(18, seed_roles.POPULATION, 2) == 1743435427995033961
    old = {"split": 18, "weights": 18, "population": 18, "training images": 19, "validation images": 20}
    old |= {"drop path": 18 * 1_000_000_007, "random architectures": 18, "final validation images": 18}
    assert {role.name: seeds.derive(18, role, 1) for role in seed_roles.ROLES} == old


@pytest.fixture
def begin_search(monkeypatch):
    """`begin_search(seed)`: what a search of the paper's channels begins with, as (network, state)."""
    begun = []
    monkeypatch.setattr(search_cli, "run_search", lambda search, setup, *_: begun.append(setup))

    def begin(seed):
        train_search.main(["--dataset", "digits", "--device", "cpu", "--layers", "1", "--seed", str(seed)])
        setup = begun.pop()
        return setup.network, search_state.SearchState(setup)

    return begin


def correlation(a, b):
    return abs(np.corrcoef(a.flatten(), b.flatten())[0, 1])


def test_weights_and_genes_are_not_correlated(begin_search):
    network, state = begin_search(18)
    first = network.stem[0].weight.detach().flatten()
    assert len(first) == 1296
    assert correlation(first, state.alphas.flatten()[:1296]) < 0.15


def test_searches_with_the_papers_seeds_have_no_stream_in_common(begin_search):
    streams = {}
    for seed in (18, 19, 20):
        _, state = begin_search(seed)
        streams[seed, "population"] = state.alphas.flatten()[:500]
        for name in ("train", "valid"):
            streams[seed, name] = torch.rand(500, generator=state.generators[name])
    for one, other in itertools.combinations(streams, 2):
        assert correlation(streams[one], streams[other]) < 0.25, (one, other)


def test_random_architectures_and_the_images_they_see_are_the_same_for_every_seed():
    args = [search_cli.search_parser("train_search.py", "").parse_args(["--seed", seed]) for seed in ("18", "2021")]
    drawn = [torch.rand(9, generator=baselines.generator(each, seed_roles.RANDOM_ARCHITECTURES)) for each in args]
    born = torch.rand(9, generator=seeds.generator(args[1], seed_roles.POPULATION))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], born)


@pytest.mark.parametrize("script, line", [(train_search, search_line), (train, train_line)])
def test_a_new_run_records_how_its_seeds_were_derived(script, line):
    parser = train.make_parser() if script is train else search_cli.search_parser("train_search.py", "")
    assert parser.parse_known_args(line())[0].seed_scheme == 2
