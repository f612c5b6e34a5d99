"""Costs of the networks that would be retrained: exact counts, latency, budgets in the search."""

import math

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

from helpers import S2_SEARCH_LINE, load_checkpoint, populations, read_history, s2_search, search, search_line

pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.mark.parametrize(
    ("C", "layers", "image_shape"), [(4, 6, (3, 32, 32)), (6, 3, (3, 8, 12)), (4, 1, (3, 8, 8)), (2, 20, (3, 8, 8))]
)
def test_counts_are_those_of_the_built_network(C, layers, image_shape):
    fixed, choices = costs.s1_table(C, layers, 7, image_shape)
    alphas = encoding.random_alphas(5, generator=torch.Generator().manual_seed(C + layers))
    chosen = encoding.decode(alphas)
    assert (chosen.sum((0, 1, 2)) > 0)[1:].all()  # every operation occurs
    for individual, one_hot in zip(alphas, chosen, strict=True):
        network = NetworkCIFAR(C, 7, layers, False, encoding.genotype(individual))
        parameters, mult_adds = (fixed + choices[one_hot.bool()].sum(0)).tolist()
        assert parameters == sum(p.numel() for p in network.parameters())
        assert mult_adds == round(1e6 * utils.mult_adds_in_millions(network, image_shape))


def test_counts_of_nas_bench_201_are_the_recorded_ones(shared_data):
    folder = shared_data("NATS-tss-v1_0-3ffb9-simple")
    archs = benchmark.load(folder).archs
    sizes = {"cifar10": (10, 32), "cifar100": (100, 32), "ImageNet16-120": (120, 16)}
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


# ---- budgets


@pytest.mark.parametrize(
    ("space", "seed"),
    [
        ("s2", 0),
        *(pytest.param("s1", seed, marks=pytest.mark.slow) for seed in range(20)),
        *(pytest.param("s2", seed, marks=pytest.mark.slow) for seed in range(1, 20)),
    ],
)
def test_winners_meet_a_tight_budget(tmp_path, space, seed):
    if space == "s1":
        sizes = dict(
            pop_size=10, tsize=4, epochs=3, seed=seed, train_samples=30, max_params=0.0128, max_mult_adds=0.138
        )
        run = search(tmp_path, **sizes)
        limits, decode = (0.0128, 0.138), encoding.decode
        fixed, choices = costs.s1_table(4, 4, 10, (3, 8, 8))
    else:
        flags = ["--pop_size", 10, "--max_params", 0.3, "--max_mult_adds", 3, "--seed", seed]
        run = s2_search(tmp_path, *flags)
        limits, decode = (0.3, 3), nas201.train_search.encoding.decode
        fixed, choices = s2_table(16, 5, 10, (3, 8, 8))
    for (alphas, fitness), line in zip(populations(run), read_history(run), strict=True):
        counts = torch.stack([fixed + choices[one_hot.bool()].sum(0) for one_hot in decode(alphas)]).double() / 1e6
        excess = (counts / torch.tensor(limits, dtype=torch.float64) - 1).clamp(min=0).sum(1)
        ranked = sorted(zip(excess.tolist(), (-fitness).tolist(), strict=True))
        assert list(zip(excess.tolist(), (-fitness).tolist(), strict=True)) == ranked  # feasible first, then fitness
        assert line["feasible"] == (excess == 0).sum()
        assert [line["parameters_M"], line["mult_adds_M"]] == counts[0].tolist()
    assert excess[0] == 0 and read_history(run)[0]["feasible"] < len(excess)  # met at last, and it was tight


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [
        (train_search, ["--max_params", 0.5], "--max_params 0.5: no architecture meets"),
        (train_search, ["--max_params", 5, "--max_mult_adds", 1], "the smallest network has 14.2"),
        (train_search, ["--max_params", 0], "at least 1e-06"),
        (nas201.train_search, ["--max_mult_adds", 0.1], "the smallest network has 0.4"),
    ],
)
def test_a_budget_that_nothing_meets_is_refused(fails, module, flags, words):
    paper = search_line(target_channels=36, target_layers=20)
    argv = paper if module is train_search else S2_SEARCH_LINE
    assert words in fails(module.main, [*argv, *flags])


def test_the_smallest_network_meets_a_budget_of_its_own_size():
    """What the message names is exact: that budget is possible, one below it is not."""
    args = search_cli.search_parser("train_search.py", "").parse_args([])
    args.target_channels, args.target_layers = 36, 20
    target = costs.Costs(args, train_search.S1(), 10, (3, 32, 32), torch.device("cpu"))
    for name, smallest in zip(target.names, (1.370134, 227.27232), strict=True):
        target.limits[name] = smallest
        target.check()
        target.limits[name] = smallest - 1e-6
        with pytest.raises(costs.UserError, match=f"the smallest network has {smallest} "):
            target.check()
        target.limits[name] = None


def test_a_search_says_that_nothing_met_its_budget(tmp_path, capsys):
    flags = ["--max_mult_adds", 0.49, "--pop_size", 2, "--tsize", 1, "--epochs", 1]
    run = s2_search(tmp_path, *flags)
    assert "no individual of the last generation meets the budget" in capsys.readouterr().out
    assert read_history(run)[0]["feasible"] == 0


def test_latency_is_measured_once_and_resumed(tmp_path, monkeypatch):
    measured = []

    def measure(self, cell):
        measured.append(str(cell))
        return float(len(measured))

    monkeypatch.setattr(costs.Costs, "measure_latency", measure)
    run = search(tmp_path, max_latency=5.5, epochs=2)
    assert len(measured) == len(set(measured)) >= 4  # each cell once
    checkpoint = load_checkpoint(run / "checkpoint.pt")
    assert checkpoint["latency"] == {cell: i + 1.0 for i, cell in enumerate(measured)}
    before = list(measured)
    (run / "report.html").unlink()
    train_search.main(["--resume", str(run)])
    assert measured == before
    assert all(line["latency_ms"] <= 5.5 for line in read_history(run))


def test_latency_of_a_network(tmp_path):
    state = torch.get_rng_state()
    args = search_cli.search_parser("train_search.py", "").parse_args(["--max_latency", "1000"])
    args.target_channels, args.target_layers = 4, 3
    target = costs.Costs(args, train_search.S1(), 10, (3, 8, 8), torch.device("cpu"))
    latency = {}
    alphas = encoding.random_alphas(2, generator=torch.Generator().manual_seed(0))
    of = target.amounts(alphas[[0, 1, 0]], latency)
    assert len(latency) == 2 and of[:, 2].tolist() == [list(latency.values())[i] for i in (0, 1, 0)]
    assert all(0 < ms < 1000 and math.isfinite(ms) for ms in latency.values())
    assert torch.equal(torch.get_rng_state(), state)
