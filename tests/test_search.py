"""The search loop, compared with a plain re-implementation of the paper; fitness; losses that are not finite."""

import argparse
import contextlib
import copy
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import baselines
import datasets
import encoding
import evolution
import genotype_files
import search_cli
import search_space
import seed_roles
import train_search
from fitness import batch_norm_mode, measure_fitness, unique
from model_search import Network
from support import seeds, signals
from support.files import UserError
from training import TrainingSettings, TrainingState, check_optimizer_state, train_one_epoch

from golden import fill
from helpers import TinySupernet, history, load_checkpoint, populations, search, search_line

pytestmark = pytest.mark.usefixtures("quick_report")
SEEDED = argparse.Namespace(seed=18, seed_scheme=2)  # as these searches are by default


def raw_bytes(alphas):
    return [individual.numpy().tobytes() for individual in alphas]


def raw_individuals(alphas):
    return sorted(raw_bytes(alphas))


# ---- a finished run; stopped ones are in test_resume.py


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_reports):
    """Two generations."""
    return search(tmp_path_factory.mktemp("finished"), cutout_length=4, num_elites=1, epochs=2, layers=1)


def contents(run):
    """Return {path: bytes} of the files that a finished run keeps as they are; the report is not among them."""
    names = ("checkpoint.pt", "log.txt", "pareto.json", "baselines.json", "weights/*", "genotype.*", "population/*")
    paths = [path for name in names for path in run.glob(name)]
    return {path: path.read_bytes() for path in [*paths, run / "history.jsonl"]}


def test_resume_of_a_finished_search_changes_nothing(finished, capsys):
    before = contents(finished)
    train_search.main(["--resume", str(finished), "--report_freq", "7"])
    assert contents(finished) == before
    assert capsys.readouterr().out == f"{finished} is finished\n"


@pytest.mark.parametrize(
    "missing",
    [["report.html"], ["weights/weights.pt", "population/002.npz", "genotype.json", "history.jsonl"]],
    ids=["report", "results"],
)
def test_resume_of_a_finished_search_restores_missing_files(finished, capsys, missing):
    """They follow from the checkpoint, so nothing is measured again."""
    before = contents(finished)
    for name in missing:
        (finished / name).unlink()
    train_search.main(["--resume", str(finished)])
    now = contents(finished)
    assert (finished / "report.html").exists()
    assert now.keys() == before.keys()
    differing = {path for path in now if now[path] != before[path]} - {finished / "weights/weights.json"}
    assert differing == {finished / "log.txt"}
    out = capsys.readouterr().out
    assert "random architectures" not in out
    assert out.count("report.html") == 1


def test_finished_search_has_its_files(finished):
    for name in ("log.txt", "args.json", "checkpoint.prev.pt", "cell_reduce.svg", "report.html", "weights/weights.pt"):
        assert (finished / name).is_file()
    assert list((finished / "runs").glob("events*"))


@pytest.mark.parametrize("name", ["genotype.json", "genotype.pickle"])
def test_genotype_file_holds_the_best_of_the_last_generation(finished, name):
    alphas, _ = populations(finished)[-1]
    assert genotype_files.load(finished / name) == encoding.genotype(alphas[0])


def test_history_describes_the_saved_populations(finished):
    for line, (alphas, fitness) in zip(history(finished), populations(finished), strict=True):
        assert line["fitness_best"] == fitness.max().item()
        assert line["fitness_mean"] == fitness.mean().item()
        assert line["fitness_std"] == pytest.approx(fitness.numpy().std())
        assert line["distinct"] == len(set(raw_bytes(encoding.decode(alphas))))
        assert line["best_genotype"] == json.loads(json.dumps(genotype_files.to_dict(encoding.genotype(alphas[0]))))


# ---- the loop against a plain one


def plain_search(args, network, train_loader, valid_loader):
    """Section by section what the paper does, with nothing clever. Yields (sorted alphas, fitness) a generation."""
    breeding = seeds.generator(args, seed_roles.POPULATION)
    alphas = torch.rand(args.pop_size, 2, 14, 8, generator=breeding)
    momenta = [torch.zeros_like(p) for p in network.parameters()]
    for g in range(args.epochs):
        if g > 0:
            alphas = evolution.next_generation(
                alphas,
                fitness,  # noqa: F821
                num_elites=args.num_elites,
                tsize=args.tsize,
                mutate_rate=args.mutate_rate,
                generator=breeding,
            )
        lr = args.learning_rate_min + (args.learning_rate - args.learning_rate_min) * 0.5 * (
            1 + math.cos(math.pi * g / args.epochs)
        )
        for t, (x, y) in enumerate(train_loader):
            network.train()
            network.zero_grad()
            cross_entropy(network(x, encoding.decode(alphas[t % args.pop_size])), y).backward()
            norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in network.parameters()))
            scale = min(1.0, args.grad_clip / (norm + 1e-6))
            with torch.no_grad():
                for p, momentum in zip(network.parameters(), momenta, strict=True):
                    momentum.mul_(args.momentum).add_(p.grad * scale + args.weight_decay * p)
                    p.sub_(lr * momentum)
        batches, measured = list(valid_loader), copy.deepcopy(network)
        fitness = torch.tensor([accuracy(measured, encoding.decode(a), batches, args.bn) for a in alphas])
        order = sorted(range(len(alphas)), key=lambda i: -fitness[i].item())  # stable
        alphas, fitness = alphas[order], fitness[order]
        yield alphas, fitness


@torch.no_grad()
def accuracy(network, alphas, batches, bn):
    """Percent, of one individual; running statistics change where they are not used."""
    network.train(bn == "batch")
    hits = np.concatenate([(network(x, alphas).argmax(1) == y).tolist() for x, y in batches])
    return 100 * hits.sum() / len(hits)


SHORT = dict(pop_size=2, tsize=2, num_elites=1, layers=1, train_samples=50, batch_size=20, baselines=0, seed=20)
SHORT |= dict(grad_clip=0.3, learning_rate=0.1)  # gradients are larger
HIGH_RATES = dict(learning_rate=0.1, learning_rate_min=0.05, momentum=0.5)


@pytest.fixture(
    scope="module",
    params=[
        # Seed 20: one with which rounding does not grow within these few steps.
        ([], SHORT),  # fewer individuals than batches
        pytest.param(([], dict(seed=20)), marks=pytest.mark.slow),  # more
        pytest.param(([], SHORT | dict(layers=2, bn="running", valid_transform="test")), marks=pytest.mark.slow),
        # Rates at which the fast path's rounding grows within a few steps.
        pytest.param(
            (["--plain"], dict(num_elites=0, mutate_rate=0.5, grad_clip=0.3, **HIGH_RATES)), marks=pytest.mark.slow
        ),
    ],
    ids=["short", "default", "running", "high rates"],
)
def compared(request, tmp_path_factory, quick_reports):
    """A run, its arguments, and the populations and the network of a plain search with these arguments."""
    flags, changed = request.param
    run = search(tmp_path_factory.mktemp("compared"), *flags, **changed)
    args = train_search.make_parser().parse_args(search_line(**changed))
    train, valid, augmentation = datasets.search_splits(args)
    loaders = search_cli.search_loaders(args, train, valid, augmentation, torch.device("cpu"))
    torch.manual_seed(seeds.derive(args.seed, seed_roles.WEIGHTS, 2))
    network = Network(args.init_channels, 10, args.layers)
    return run, args, list(plain_search(args, network, *loaders)), network


def test_populations_are_those_of_the_plain_search(compared):
    run, _, expected, _ = compared
    for (alphas, fitness), (expected_alphas, expected_fitness) in zip(populations(run), expected, strict=True):
        assert torch.equal(fitness, expected_fitness)
        assert torch.equal(alphas, expected_alphas)


def test_shared_weights_are_those_of_the_plain_search(compared):
    run, _, _, network = compared
    weights = torch.load(run / "weights/weights.pt", weights_only=True)
    for name, value in network.state_dict().items():
        assert torch.allclose(weights[name].double(), value.double(), rtol=1e-4, atol=1e-5), name


def test_learning_rate_is_a_cosine(compared):
    run, args, _, _ = compared
    low, high = args.learning_rate_min, args.learning_rate
    expected = [low + (high - low) * (1 + math.cos(math.pi * g / 3)) / 2 for g in range(3)]
    assert [line["lr"] for line in history(run)] == pytest.approx(expected)


def test_equal_fitness_keeps_the_order_of_individuals(tmp_path, monkeypatch):
    monkeypatch.setattr(search_space, "measure_fitness", lambda *_, **__: torch.tensor([1.0, 2, 1, 2]))
    monkeypatch.setattr(train_search, "Network", TinySupernet)
    run = search(tmp_path, "--plain", epochs=1, baselines=0)
    born = encoding.random_alphas(4, generator=seeds.generator(SEEDED, seed_roles.POPULATION))
    alphas, fitness = populations(run)[0]
    assert torch.equal(alphas, born[[1, 3, 0, 2]])
    assert fitness.tolist() == [2, 2, 1, 1]


# ---- which alphas train and which are measured


# The paper's ablation: which variants train, and which measure, without decoding.
TRAINED_RAW = {"nd", "ndt"}
MEASURED_RAW = {"nd", "ndf"}


class Recorded(NamedTuple):
    variant: str
    run: Path
    trained: list[torch.Tensor]  # alphas of each training step
    measured: list[torch.Tensor]  # alphas of each forward pass in fitness
    kinds: str  # of each call, "t" or "f"


@pytest.fixture(scope="module", params=evolution.VARIANTS)
def recorded(request, tmp_path_factory, quick_reports):
    """A search of three individuals, with two batches for each, one validation batch, and two random architectures."""
    sizes = dict(pop_size=3, tsize=2, train_samples=48, batch_size=8, valid_batch_size=30, epochs=3)
    rates = dict(mutate_rate=0.5, learning_rate=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_search, "Network", TinySupernet)
        run = search(tmp_path_factory.mktemp("recorded"), "--plain", variant=request.param, **rates, **sizes)
    calls = list(TinySupernet.calls)
    trained, measured = ([alphas for kind, alphas in calls if kind == of] for of in ("train", "fitness"))
    return Recorded(request.param, run, trained, measured, "".join(kind[0] for kind, _ in calls))


def generations(recorded):
    """Yield (alphas as they were born, sorted alphas, fitness) of each generation."""
    breeding = seeds.generator(SEEDED, seed_roles.POPULATION)
    born = torch.rand(3, 2, 14, 8, generator=breeding)
    for alphas, fitness in populations(recorded.run):
        yield born, alphas, fitness
        bred = dict(num_elites=1, tsize=2, mutate_rate=0.5, generator=breeding, variant=recorded.variant)
        born = evolution.next_generation(alphas, fitness, **bred)


def distinct(alphas):
    keys = raw_bytes(alphas)
    return [individual for i, individual in enumerate(alphas) if keys[i] not in keys[:i]]


def test_variants_breed_as_the_paper_says(recorded):
    for born, alphas, _ in generations(recorded):
        assert raw_individuals(alphas) == raw_individuals(born)


def test_variants_train_with_the_alphas_of_the_paper(recorded):
    expected = []
    for born, _, _ in generations(recorded):
        alphas = born if recorded.variant in TRAINED_RAW else encoding.decode(born)
        expected += [*alphas, *alphas]
    assert torch.equal(torch.stack(recorded.trained), torch.stack(expected))


def in_fitness(recorded, alphas):
    return alphas if recorded.variant in MEASURED_RAW else encoding.decode(alphas)


def measured_by_generation(recorded):
    """What each generation should measure: equal individuals once, and with "rand" the last generation alone."""
    expected = [distinct(in_fitness(recorded, born)) for born, _, _ in generations(recorded)]
    return [[], [], expected[2]] if recorded.variant == "rand" else expected


def test_variants_measure_the_alphas_of_the_paper(recorded):
    generations = measured_by_generation(recorded)
    expected = sum(generations, [])
    assert torch.equal(torch.stack(recorded.measured[: len(expected)]), torch.stack(expected))
    assert recorded.kinds.startswith("".join("t" * 6 + "f" * len(alphas) for alphas in generations))


def test_populations_are_saved_best_first(recorded):
    for generation, (_, _, fitness) in enumerate(generations(recorded), start=1):
        if recorded.variant == "rand" and generation < 3:
            assert fitness.isnan().all()
            assert "fitness_best" not in history(recorded.run)[generation - 1]
        else:
            assert torch.equal(fitness, fitness.sort(descending=True).values)


def test_final_weights_measure_the_last_population_and_random_architectures(recorded):
    """Each cell once, and between them the fronts of earlier generations."""
    again = recorded.measured[len(sum(measured_by_generation(recorded), [])) :]
    alphas, _ = populations(recorded.run)[-1]
    decoded = raw_bytes(encoding.decode(alphas))
    population = [individual for i, individual in enumerate(alphas) if decoded[i] not in decoded[:i]]
    random = encoding.random_alphas(2, generator=baselines.generator(SEEDED, seed_roles.RANDOM_ARCHITECTURES))
    expected = in_fitness(recorded, torch.stack([*population, *random]))
    assert torch.equal(torch.stack([*again[: len(population)], *again[-2:]]), expected)
    assert len(again) <= 3 * 3 + 2


def test_genotype_is_that_of_the_raw_alphas(recorded):
    """Whatever was measured."""
    best = populations(recorded.run)[-1][0][0]
    assert genotype_files.load(recorded.run / "genotype.json") == encoding.genotype(best)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["evnas", "nd"])
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_fast_path_searches_as_the_plain_one(tmp_path, variant, bn):
    settings = dict(variant=variant, bn=bn, epochs=2, learning_rate=0.01)
    fast = search(tmp_path / "fast", **settings)
    plain = search(tmp_path / "plain", "--plain", **settings)
    for (alphas, fitness), (expected_alphas, expected) in zip(populations(fast), populations(plain), strict=True):
        assert torch.equal(alphas, expected_alphas)
        assert torch.equal(fitness, expected)
    losses = [[line["train_loss"] for line in history(run)] for run in (fast, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- fitness


@pytest.fixture
def supernet():
    """Its running statistics are not the initial ones."""
    return fill(Network(4, 10, 1))


class Batches(list):
    size = 18


def validation_batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batches(
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)) for n in (12, 6)
    )


@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("training", [True, False])
def test_fitness_changes_nothing_in_the_network(supernet, bn, training):
    supernet.train(training)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    measure_fitness(supernet, encoding.random_alphas(2), validation_batches(), bn)
    after = supernet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(m.training == training for m in supernet.modules())
    assert all(m.track_running_stats for m in supernet.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(p.grad is None for p in supernet.parameters())


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_fitness_of_twins_is_measured_once_and_equals_that_of_one_by_one(supernet, bn):
    """The labels are what the network answers to the first individual."""
    alphas = encoding.decode(encoding.random_alphas(3, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad(), batch_norm_mode(supernet, bn):
        batches = Batches((x, supernet(x, alphas[0]).argmax(1)) for x, _ in validation_batches())
    calls = []
    supernet.register_forward_pre_hook(lambda *_: calls.append(1))
    fitness = measure_fitness(supernet, alphas[[0, 1, 0, 2, 2, 0]], batches, bn)
    assert len(calls) == 3 * len(batches)  # equal individuals once
    first, second, third = (accuracy(supernet, individual, batches, bn) for individual in alphas)
    assert fitness.tolist() == pytest.approx([first, second, first, third, third, first], abs=1e-12)
    assert fitness.dtype == torch.float64
    assert min(second, third) < first == 100


def test_failed_measurement_leaves_batch_norm_as_it_was(supernet):
    with pytest.raises(ValueError):
        measure_fitness(supernet, torch.rand(2, 2, 14, 9), validation_batches(), "batch")
    assert all(m.track_running_stats for m in supernet.modules() if isinstance(m, nn.BatchNorm2d))


# ---- a loss that is not finite


@pytest.mark.parametrize("report_freq", [1, 2, 50])
def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch, fails, report_freq):
    monkeypatch.setattr(train_search, "cosine", lambda high, low, progress: 0.01 if progress == 0 else 1e38)
    monkeypatch.setattr(train_search, "Network", TinySupernet)
    argv = search_line(run_name="run", report_freq=report_freq, batch_size=10)
    line = fails(train_search.main, [*argv, "--plain"], new_files=True)
    assert "generation 2/3, step 2" in line
    assert "--learning_rate" in line
    checkpoint = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert checkpoint["completed"] == 1
    assert all(value.isfinite().all() for value in checkpoint["network"].values())
    assert len(history(tmp_path / "run")) == 1
    weights = torch.load(tmp_path / "run/weights/weights.pt", weights_only=True)
    assert all(torch.equal(value, checkpoint["network"][name]) for name, value in weights.items())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, fails):
    """The loss of the only step is still finite."""
    monkeypatch.setattr(train_search, "Network", TinySupernet)
    argv = search_line(run_name="run", batch_size=70, epochs=1, learning_rate=3e38)
    line = fails(train_search.main, [*argv, "--plain"], new_files=True)
    assert "generation 1/1, step 1" in line
    assert "--learning_rate" in line
    checkpoint = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert checkpoint["completed"] == 0
    assert "partial" not in checkpoint
    for value in checkpoint["network"].values():
        assert value.abs().max() < 100
    assert not {"weights", "population", "history.jsonl", "genotype.json"} & {p.name for p in tmp_path.glob("run/*")}


def train_one_step(learning_rate=0.1, pixels=1.0):
    """An epoch of one step of a small network with BatchNorm, whose loss is finite."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 10))
    batches = Batches([(pixels * torch.randn(8, 3, 2, 2), torch.arange(8))])
    batches.generator = torch.Generator()
    optimizer = torch.optim.SGD(network.parameters(), learning_rate)

    def loss_of(x, y):
        logits = network(x)
        return 1000 * cross_entropy(logits, y), logits

    state = TrainingState(network, optimizer, batches, TrainingSettings(grad_clip=None, report_freq=9))
    train_one_epoch(state, loss_of, lambda step: (), where="epoch 1/1", log=lambda text: None)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("ruin", [{"learning_rate": 3e38}, {"pixels": 1e25}], ids=["weights", "running variance"])
def test_weights_are_checked_after_the_last_step(monkeypatch, ruin, stopped):
    """Also where a signal ends the epoch, after which they would be saved."""
    monkeypatch.setattr(signals, "stop_requested", lambda *_, **__: stopped)
    with pytest.raises(UserError, match="epoch 1/1, step 1"):
        train_one_step(**ruin)
    with pytest.raises(signals.Interrupted) if stopped else contextlib.nullcontext():
        train_one_step()


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_fitness_refuses_logits_that_are_not_finite(supernet, bn):
    population = torch.rand(3, 2, 14, 8)
    with torch.no_grad():
        supernet.classifier.bias.fill_(torch.inf)
    with pytest.raises(UserError, match="fitness: individual 1 of 3"):
        measure_fitness(supernet, population, validation_batches(), bn)


# ---- distinct individuals


def test_unique_finds_each_individual_where_it_appears_first():
    alphas = torch.rand(3, 2, 14, 8, generator=torch.Generator().manual_seed(0))[[0, 1, 0, 2, 2, 1]]
    assert unique(alphas) == ([0, 1, 3], [0, 1, 0, 2, 2, 1])


# ---- the optimiser


def small_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "sgd without momentum": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_state_of_a_fresh_and_of_a_used_optimizer_is_accepted(make):
    network = small_network()
    optimizer = make(network.parameters())
    assert check_optimizer_state(optimizer, optimizer.state_dict()["state"]) is None
    network(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    assert check_optimizer_state(make(network.parameters()), optimizer.state_dict()["state"]) is None


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_optimizer_state_of_another_shape_is_refused(name):
    network = small_network()
    optimizer = OPTIMIZERS[name](network.parameters())
    network(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]
    state[0] = state[1]
    with pytest.raises(ValueError, match="of parameter 0"):
        check_optimizer_state(OPTIMIZERS[name](network.parameters()), state)


def test_optimizer_state_of_another_optimizer_is_refused():
    network = small_network()
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="momentum_buffer"):
        check_optimizer_state(OPTIMIZERS["sgd"](network.parameters()), optimizer.state_dict()["state"])
