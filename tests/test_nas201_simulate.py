"""Simulated searches on an invented table of accuracies."""

import argparse
import json

import numpy as np
import pytest
import torch
from scipy import stats

from nas201 import benchmark, encoding, simulate
from nas201.sources import COLUMNS

from helpers import write_table

FLAGS = argparse.Namespace(epochs=20, pop_size=20, tsize=5, num_elites=1, mutate_rate=0.1, seeds=8, taus=[0.0, 1.0])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def source(table):
    return benchmark.load(table)


@pytest.fixture(scope="module")
def truth(source):
    """The validation accuracy on CIFAR-10, (15625,)."""
    return source.full_table()[:, COLUMNS.index("cifar10_valid_200")]


@pytest.fixture(scope="module")
def space(source, truth):
    return simulate.Space(source.archs, truth)


def test_individuals_have_the_index_of_their_arch_string(source, space):
    alphas = encoding.random_alphas(50, generator=torch.Generator().manual_seed(0))
    expected = [source.index(encoding.arch_string(individual)) for individual in alphas]
    assert space.indices(alphas).tolist() == expected
    assert space.indices(encoding.decode(alphas)).tolist() == expected


@pytest.mark.parametrize("tau", [-0.5, 0.0, 0.2, 0.6, 1.0])
def test_fitness_has_the_asked_for_tau(space, truth, tau):
    fitness = simulate.Disturbance(space, tau, seed=3).draw()
    # The standard error of tau over 15,625 architectures is below 0.006.
    assert stats.kendalltau(fitness, truth).statistic == pytest.approx(tau, abs=0.025)


def test_disturbance_is_another_in_each_draw_and_for_each_seed(space):
    disturbance = simulate.Disturbance(space, 0.2, seed=1)
    first = disturbance.draw()
    assert not torch.equal(first, disturbance.draw())
    assert torch.equal(first, simulate.Disturbance(space, 0.2, seed=1).draw())
    assert not torch.equal(first, simulate.Disturbance(space, 0.2, seed=2).draw())


def test_perfect_fitness_finds_better_winners_than_random_fitness(source):
    chance, perfect = simulate.simulate(source, "cifar10_valid_200", FLAGS)
    assert (chance.tau, perfect.tau) == (0, 1)
    for name in simulate.HEADS:
        assert getattr(chance, name).shape == (8,)
        assert getattr(perfect, name).mean() > getattr(chance, name).mean() + 10
    # Without a disturbance it makes no difference how often it is drawn.
    assert perfect.architecture.tolist() == perfect.generation.tolist()


def test_random_search_is_the_fittest_of_its_budget(source, space, truth):
    """Without a disturbance, its expectation is the exact one of the best of pop_size * epochs."""
    flags = argparse.Namespace(pop_size=5, epochs=4)
    winners = truth[[simulate.random_search(space, 1.0, seed, flags) for seed in range(200)]]
    expected = benchmark.best_of(truth, 20)
    assert winners.mean() == pytest.approx(expected, abs=4 * winners.std() / np.sqrt(200))


def test_a_search_of_one_generation_takes_the_fittest_of_the_first_population(space):
    flags = argparse.Namespace(**{**vars(FLAGS), "epochs": 1})
    winner = simulate.search(space, 0.3, 5, flags, fresh=False)
    fitness = simulate.Disturbance(space, 0.3, 5).draw()
    generator = torch.Generator().manual_seed(simulate.derive(5, simulate.POPULATION, scheme=2))
    indices = space.indices(encoding.random_alphas(flags.pop_size, generator=generator))
    assert fitness[winner] == fitness[indices].max()


# ---- the command

QUICK = ("--epochs", "3", "--pop_size", "6", "--tsize", "2", "--seeds", "3", "--taus", "0.2", "0.9")


def test_command_prints_and_writes_the_winners(table, tmp_path, capsys):
    chart = tmp_path / "chart.svg"
    figures = tmp_path / "figures.json"
    benchmark.main(["simulate", str(table), *QUICK, "--chart", str(chart), "--json", str(figures)])
    lines = capsys.readouterr().out.splitlines()
    content = json.loads(figures.read_text())
    assert content["column"] == "cifar10_valid_200"
    assert [row["tau"] for row in content["winners"]] == [0.2, 0.9]
    for line, row in zip(lines[2:], content["winners"], strict=False):
        for name in simulate.HEADS:
            assert len(row[name]) == 3
            assert f"{np.mean(row[name]):.2f} ± {np.std(row[name], ddof=1):.2f}" in line
    assert chart.read_text().startswith("<svg")


def test_command_repeats_itself(table, capsys):
    benchmark.main(["simulate", str(table), *QUICK])
    first = capsys.readouterr().out
    benchmark.main(["simulate", str(table), *QUICK])
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tsize", "9", "--pop_size", "8"], "--tsize"),
        (["--taus", "1.5"], "--taus"),
        (["--seeds", "1"], "--seeds"),
        (["--split", "valid"], "valid"),
        (["--chart", "no-such-folder/chart.svg"], "no-such-folder"),
    ],
)
def test_bad_flag_is_refused_by_name(tmp_path, capsys, flags, named):
    table = write_table(tmp_path, absent=["valid"])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["simulate", str(table), *QUICK, *flags])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
