"""Costs of retrained networks: exact counts, latency, and budgets in a search."""

import pytest
import torch

import costs
import encoding
import nas201.train_search
import search_cli
import train_search
import utils
from model import NetworkCIFAR
from nas201 import benchmark
from nas201.genotypes import from_arch_string
from nas201.model import cost_table as s2_table
from nas201.sources import ALLOWED, unpacked
from support.files import restricted_unpickle

from helpers import (
    S2_SEARCH_LINE,
    TinySupernet,
    load_checkpoint,
    populations,
    read_history,
    s2_search,
    search,
    search_line,
)

pytestmark = pytest.mark.usefixtures("quick_report")


def costs_of(channels, layers, image_shape, *flags):
    """Return the Costs of a search of the DARTS space whose retrained network has this size."""
    args = search_cli.search_parser("train_search.py", "").parse_args(list(flags))
    args.target_channels = channels
    args.target_layers = layers
    return costs.Costs(args, train_search.S1(), 10, image_shape, torch.device("cpu"))


# ---- counts


@pytest.mark.parametrize(
    ("C", "layers", "image_shape"), [(4, 6, (3, 32, 32)), (6, 3, (3, 8, 12)), (4, 1, (3, 8, 8)), (2, 5, (3, 8, 8))]
)
def test_s1_table_counts_what_the_built_network_has(C, layers, image_shape):
    fixed, choices = costs.s1_table(C, layers, 7, image_shape)
    alphas = encoding.random_alphas(3, generator=torch.Generator().manual_seed(C + layers))
    chosen = encoding.decode(alphas)
    assert (chosen.sum((0, 1, 2)) > 0)[1:].all()  # every operation occurs
    for individual, one_hot in zip(alphas, chosen, strict=True):
        network = NetworkCIFAR(C, 7, layers, False, encoding.genotype(individual))
        parameters, mult_adds = (fixed + choices[one_hot.bool()].sum(0)).tolist()
        assert parameters == sum(p.numel() for p in network.parameters())
        assert mult_adds == round(1e6 * utils.mult_adds_in_millions(network, image_shape))


def test_s2_table_counts_what_the_benchmark_records(shared_data):
    folder = shared_data("NATS-tss-v1_0-3ffb9-simple")
    archs = benchmark.load(folder).archs
    sizes = {"cifar10": (10, 32), "cifar100": (100, 32), "ImageNet16-120": (120, 16)}
    compared = 0
    for index in (0, 11, 284):
        path = folder / f"{index:06d}.pickle.pbz2"
        record = restricted_unpickle(unpacked(str(path)), ALLOWED, path)
        for (dataset, _seed), run in record["200"]["all_results"].items():
            if dataset in sizes:
                classes, size = sizes[dataset]
                fixed, choices = s2_table(16, 5, classes, (3, size, size))
                ops = from_arch_string(archs[index])
                parameters, mult_adds = (fixed + choices[0, range(6), ops].sum(0)).tolist()
                assert parameters == round(1e6 * run["params"])
                assert mult_adds + classes == round(1e6 * run["flop"])  # the record counts the classifier's bias
                compared += 1
    assert compared >= 9


# ---- budgets


def test_violation_adds_the_shares_by_which_costs_exceed_budgets():
    target = costs_of(4, 4, (3, 8, 8), "--max_params", "2", "--max_mult_adds", "100")
    amounts = torch.tensor([[1.0, 100.0], [3.0, 50.0], [2.5, 400.0]], dtype=torch.float64)
    assert target.violation(amounts).tolist() == [0.0, 0.5, 3.25]


def test_violation_of_a_cost_without_budget_is_zero():
    target = costs_of(4, 4, (3, 8, 8), "--max_mult_adds", "100")
    assert target.violation(torch.tensor([[1e9, 150.0]], dtype=torch.float64)).tolist() == [0.5]


S1_BUDGETS = {"max_params": 0.0128, "max_mult_adds": 0.138}
S2_BUDGETS = {"max_params": 0.3, "max_mult_adds": 3}


def search_with_tight_budgets(folder, space, seed):
    """Search with budgets that most individuals miss at first; return the run, the budgets and counts(alphas)."""
    if space == "s1":
        run = search(folder, pop_size=10, tsize=4, epochs=3, seed=seed, train_samples=30, **S1_BUDGETS)
        budgets, decode = S1_BUDGETS, encoding.decode
        fixed, choices = costs.s1_table(4, 4, 10, (3, 8, 8))
    else:
        flags = [word for name, value in S2_BUDGETS.items() for word in (f"--{name}", value)]
        run = s2_search(folder, "--train_samples", 64, "--pop_size", 10, "--seed", seed, *flags)
        budgets, decode = S2_BUDGETS, nas201.train_search.encoding.decode
        fixed, choices = s2_table(16, 5, 10, (3, 8, 8))

    def counts(alphas):
        """Return [parameters, mult-adds] of each individual, in millions."""
        return [((fixed + choices[one_hot.bool()].sum(0)).double() / 1e6).tolist() for one_hot in decode(alphas)]

    return run, list(budgets.values()), counts


def meets_budgets(amounts, budgets):
    return all(amount <= budget for amount, budget in zip(amounts, budgets, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "seed"),
    [(space, seed) for space in ("s1", "s2") for seed in range(5)],
)
def test_winners_meet_a_tight_budget(tmp_path, space, seed):
    run, budgets, counts = search_with_tight_budgets(tmp_path, space, seed)
    feasible = []
    for (alphas, fitness), row in zip(populations(run), read_history(run), strict=True):
        amounts = counts(alphas)
        meets = [meets_budgets(individual, budgets) for individual in amounts]
        feasible.append(sum(meets))
        assert meets == sorted(meets, reverse=True)  # individuals that meet the budgets come first
        first = fitness[: sum(meets)].tolist()
        assert first == sorted(first, reverse=True)  # and among them the fitness decides
        assert row["feasible"] == sum(meets)
        assert [row["parameters_M"], row["mult_adds_M"]] == amounts[0]
    assert feasible[0] < 10  # the budgets were tight
    assert feasible[-1] > 0  # and were met in the end


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [
        (train_search, ["--max_params", 0.5], ["--max_params 0.5", "1.370134 M parameters"]),
        (train_search, ["--max_params", 5, "--max_mult_adds", 1], ["--max_mult_adds 1", "14.2"]),
        (train_search, ["--max_params", 0], ["--max_params", "at least 1e-06"]),
        (nas201.train_search, ["--max_mult_adds", 0.1], ["--max_mult_adds 0.1", "0.4"]),
    ],
)
def test_budget_that_nothing_meets_is_refused(fails, module, flags, words):
    paper = search_line(target_channels=36, target_layers=20)
    line = fails(module.main, [*(paper if module is train_search else S2_SEARCH_LINE), *flags])
    assert all(word in line for word in words)


@pytest.mark.parametrize("name, smallest", [("parameters_M", 1.370134), ("mult_adds_M", 227.27232)])
def test_smallest_possible_budget_is_accepted(name, smallest):
    target = costs_of(36, 20, (3, 32, 32))
    target.limits[name] = smallest
    target.check()
    target.limits[name] = smallest - 1e-6
    with pytest.raises(costs.UserError, match=str(smallest)):
        target.check()


def test_search_whose_budget_nothing_met_notes_it(tmp_path, capsys):
    flags = ["--max_mult_adds", 0.49, "--pop_size", 2, "--tsize", 1, "--epochs", 1, "--train_samples", 64]
    run = s2_search(tmp_path, *flags)
    assert "meets the budget" in capsys.readouterr().out
    assert read_history(run)[0]["feasible"] == 0


# ---- latency


@pytest.fixture
def timed_cells(monkeypatch):
    """The cells whose latency is measured, in order. The first one gets 1 ms, the second 2 ms and so on."""
    cells = []

    def measure(self, cell):
        cells.append(str(cell))
        return float(len(cells))

    monkeypatch.setattr(costs.Costs, "measure_latency", measure)
    monkeypatch.setattr(train_search, "Network", TinySupernet)
    return cells


def test_latency_is_measured_once_for_each_cell(tmp_path, timed_cells):
    run = search(tmp_path, "--plain", max_latency=5.5, epochs=2)
    assert len(timed_cells) >= 4
    assert len(set(timed_cells)) == len(timed_cells)
    saved = load_checkpoint(run / "checkpoint.pt")["latency"]
    assert saved == {cell: i + 1.0 for i, cell in enumerate(timed_cells)}
    assert all(row["latency_ms"] <= 5.5 for row in read_history(run))


def test_resumed_search_keeps_the_measured_latency(tmp_path, timed_cells):
    run = search(tmp_path, "--plain", max_latency=5.5, epochs=2)
    before = list(timed_cells)
    (run / "report.html").unlink()
    train_search.main(["--resume", str(run)])
    assert timed_cells == before


def test_latency_of_a_network_is_positive_and_draws_no_random_numbers():
    target = costs_of(4, 3, (3, 8, 8), "--max_latency", "1000")
    alphas = encoding.random_alphas(2, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    latency = {}
    amounts = target.amounts(alphas[[0, 1, 0]], latency)
    first, second = latency.values()
    assert amounts[:, 2].tolist() == [first, second, first]
    assert 0 < first < 1000
    assert 0 < second < 1000
    assert torch.equal(torch.get_rng_state(), state)
