"""Simulate searches on a table of true accuracies: what would EvNAS find if fitness ranked this well?

The genetic algorithm is that of `evolution.py`. Fitness is not measured on shared weights. It is the
true accuracy, disturbed so that it ranks all architectures with a given Kendall's tau. A search of
GPU hours then takes a fraction of a second.
"""

from support.cli import Parser, number

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

import shared_flags
from evolution import next_generation
from nas201 import encoding
from nas201.genotypes import EDGES, PRIMITIVES, from_arch_string
from nas201.published import PUBLISHED
from nas201.sources import COLUMNS, DATASETS, METRICS
from reporting import cells, charts
from support.files import UserError, atomic_write, write_json
from support.seeds import Role, derive

POPULATION = Role("simulated population")
DISTURBANCE = Role("disturbance of the true accuracy")
RANDOM_SEARCH = Role("simulated random search")

TAUS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


class Space:
    """All architectures as a simulated search sees them.

    scores: (15625,) float64, the normal scores of the true accuracies: architecture i has the score
        that a standard normal variable has at the same quantile.
    places: (15625,) int64, the index in the benchmark of an architecture, by its operations read as
        a number of base 5.
    """

    def __init__(self, archs: Sequence[str], truth: np.ndarray):
        quantiles = (stats.rankdata(truth) - 0.5) / len(truth)
        self.scores = torch.from_numpy(stats.norm.ppf(quantiles))
        operations = torch.tensor([from_arch_string(arch) for arch in archs])  # (15625, 6)
        self.places = torch.empty(len(truth), dtype=torch.long)
        self.places[as_number(operations)] = torch.arange(len(truth))

    def indices(self, alphas: torch.Tensor) -> torch.Tensor:
        """Return the benchmark's indices (P,) of individuals (P, 1, 6, 5), raw or decoded."""
        return self.places[as_number(encoding.decode(alphas).argmax(dim=-1).squeeze(1))]


def as_number(operations: torch.Tensor) -> torch.Tensor:
    """Return (N,) numbers of base 5, one for each row of operations (N, 6)."""
    weights = len(PRIMITIVES) ** torch.arange(len(EDGES))
    return operations @ weights


class Disturbance:
    """Fitness with a given Kendall's tau to the true accuracy: a Gaussian copula on the ranks.

    For two standard normal variables of correlation rho, tau is 2/pi * arcsin(rho) (Greiner, 1909).
    So the fitness of an architecture is rho times its normal score, plus independent noise that
    makes up the rest of the variance. Fitness is in standard deviations, because only its order
    counts.
    """

    def __init__(self, space: Space, tau: float, seed: int):
        rho = np.sin(np.pi / 2 * tau)
        self.signal = rho * space.scores  # (15625,)
        self.deviation = np.sqrt(1 - rho**2)
        self.generator = torch.Generator().manual_seed(derive(seed, DISTURBANCE, scheme=2))

    def draw(self) -> torch.Tensor:
        """Return the disturbed fitness (15625,) of all architectures, with fresh noise."""
        noise = torch.randn(len(self.signal), generator=self.generator, dtype=torch.float64)
        return self.signal + self.deviation * noise


def search(space: Space, tau: float, seed: int, args: argparse.Namespace, *, fresh: bool) -> int:
    """Return the benchmark's index of the winner of one simulated search.

    `fresh` draws the disturbance anew in each generation. Without it the disturbance belongs to the
    architecture, as if the shared weights always flattered the same ones. `args` has the flags of
    the genetic algorithm.
    """
    disturbance = Disturbance(space, tau, seed)
    breeding = torch.Generator().manual_seed(derive(seed, POPULATION, scheme=2))
    all_fitness = disturbance.draw()  # (15625,)
    alphas = encoding.random_alphas(args.pop_size, generator=breeding)
    indices = space.indices(alphas)  # (P,)
    for _ in range(args.epochs - 1):
        alphas = next_generation(
            alphas,
            all_fitness[indices],
            num_elites=args.num_elites,
            tsize=args.tsize,
            mutate_rate=args.mutate_rate,
            generator=breeding,
        )
        indices = space.indices(alphas)
        if fresh:
            all_fitness = disturbance.draw()
    return int(indices[all_fitness[indices].argmax()])


def random_search(space: Space, tau: float, seed: int, args: argparse.Namespace) -> int:
    """Return the index of the fittest of as many random architectures as a search measures."""
    generator = torch.Generator().manual_seed(derive(seed, RANDOM_SEARCH, scheme=2))
    indices = torch.randint(len(space.scores), (args.pop_size * args.epochs,), generator=generator)
    fitness = Disturbance(space, tau, seed).draw()[indices]
    return int(indices[fitness.argmax()])


class Row(NamedTuple):
    """The winners' true accuracies, in percent, of all seeds at one tau."""

    tau: float
    architecture: np.ndarray  # (seeds,), if the disturbance belongs to the architecture
    generation: np.ndarray  # (seeds,), if it is drawn anew in each generation
    random: np.ndarray  # (seeds,), of random search, with the disturbance of the architecture


HEADS = {
    "architecture": "noise fixed per architecture",
    "generation": "noise drawn each generation",
    "random": "random search",
}


def simulate(source: Any, column: str, args: argparse.Namespace) -> list[Row]:
    """Return a Row for each of `args.taus`, with the seeds 0 to `args.seeds` - 1.

    `source` is a benchmark.Benchmark.
    `column` of the table is both the truth that fitness follows and the accuracy that is reported.
    Raises UserError if the table lacks figures of it.
    """
    from tqdm import tqdm

    truth = source.full_table()[:, COLUMNS.index(column)]
    if np.isnan(truth).any():
        raise UserError(f"{source.path}: figures of {column} are missing; give another --dataset or --split")
    space = Space(source.archs, truth)
    rows = []
    with tqdm(total=len(args.taus) * args.seeds, unit="seed", disable=None, leave=False) as bar:
        for tau in args.taus:
            winners = {name: [] for name in HEADS}
            for seed in range(args.seeds):
                winners["architecture"].append(search(space, tau, seed, args, fresh=False))
                winners["generation"].append(search(space, tau, seed, args, fresh=True))
                winners["random"].append(random_search(space, tau, seed, args))
                bar.update()
            rows.append(Row(tau, **{name: truth[indices] for name, indices in winners.items()}))
    return rows


# ---- command


def add_flags(parser: Parser) -> None:
    """Add the flags of the command."""
    group = parser.add_argument_group("simulation")
    text = "data set whose true accuracy is searched for"
    group.add_argument("--dataset", choices=DATASETS, default="cifar10", help=text)
    text = "split whose accuracy is searched for and reported (default: valid if the table has it, else test)"
    group.add_argument("--split", choices=("valid", "test"), help=text)
    text = "Kendall's tau between fitness and true accuracy, over all architectures"
    tau = number(float, -1, 1)
    group.add_argument("--taus", type=tau, nargs="+", default=list(TAUS), metavar="TAU", help=text)
    text = "number of simulated searches at each tau"
    group.add_argument("--seeds", type=number(int, 2, 100_000), default=100, metavar="N", help=text)
    group.add_argument("--chart", metavar="FILE", help="write a chart of the winners, .svg")
    group.add_argument("--json", metavar="FILE", help="write every winner's accuracy, .json")
    shared_flags.add_genetic_algorithm(parser.add_argument_group("genetic algorithm"))


def truth_of(source: Any, args: argparse.Namespace) -> str:
    """Return the column of the table that is searched for. Raises UserError if there is none."""
    for (dataset, split), column in zip(METRICS, COLUMNS, strict=True):  # validation first
        if dataset == args.dataset and args.split in (None, split) and column not in source.absent:
            return column
    raise UserError(f"{source.path}: no accuracies of {args.dataset} {args.split or ''}".rstrip())


def run(source: Any, baselines: dict[str, dict], args: argparse.Namespace) -> None:
    """Simulate, print a table, and write the files that were asked for.

    `source` is a benchmark.Benchmark, and `baselines` what `benchmark.baselines` returns for it.
    Raises UserError.
    """
    shared_flags.check_genetic_algorithm(args)
    for path in filter(None, (args.chart, args.json)):  # before minutes of simulation
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: the folder does not exist; make it, or give another file")
    column = truth_of(source, args)
    rows = simulate(source, column, args)
    figures = baselines[column.removesuffix("_200")]
    dataset, split = dict(zip(COLUMNS, METRICS, strict=True))[column]
    published = PUBLISHED[dataset][split]
    title = f"{dataset} {split} accuracy of the winner, %"
    print(f"{title}: mean ± std over {args.seeds} seeds, {args.epochs} generations of {args.pop_size} individuals")
    print(f"{'tau':>5}" + "".join(f"  {head:>28}" for head in HEADS.values()))
    for row in rows:
        texts = [f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" for values in row[1:]]
        print(f"{row.tau:5.2f}" + "".join(f"  {text:>28}" for text in texts))
    print(f"a random architecture: {figures['mean']:.2f} on average; the best of all: {figures['best']:.2f}")
    print(f"the architecture with the most parameters: {figures['most_parameters']:.2f}")
    print(f"EvNAS, published: {published.evnas:.2f} ± {published.evnas_std:.2f}")
    if args.json:
        content = {"column": column, "flags": flags_of(args), "winners": [as_json(row) for row in rows]}
        write_json(args.json, content)
    if args.chart:
        with atomic_write(args.chart) as file:
            file.write(chart(rows, title, figures["most_parameters"], published.evnas).encode())


def flags_of(args: argparse.Namespace) -> dict:
    """Return the flags that the winners depend on."""
    names = ("seeds", "epochs", "pop_size", "tsize", "num_elites", "mutate_rate")
    return {name: getattr(args, name) for name in names}


def as_json(row: Row) -> dict:
    """Return a row as JSON."""
    return {name: value if name == "tau" else value.tolist() for name, value in row._asdict().items()}


def chart(rows: Sequence[Row], title: str, most_parameters: float, published: float) -> str:
    """Return the chart of winners by tau as SVG: mean, and one standard deviation around it."""
    from matplotlib.figure import Figure

    colours = {"architecture": "blue", "generation": "orange", "random": "grey"}
    taus = [row.tau for row in rows]
    # Bands end here: a standard deviation above the mean can exceed the best accuracy, even 100 %.
    highest = max(values.max() for row in rows for values in row[1:])
    lowest = min(values.mean() for row in rows for values in row[1:]) - 3
    with cells.default_settings(charts.STYLE):
        figure = Figure(figsize=(1.4 * charts.WIDTH, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel("Kendall's tau between fitness and true accuracy")
        for name, head in HEADS.items():
            values = np.array([getattr(row, name) for row in rows])  # (taus, seeds)
            mean = values.mean(axis=1)
            deviation = values.std(axis=1, ddof=1)
            colour = cells.PALETTE[colours[name]]
            axes.plot(taus, mean, "o-", color=colour, label=head)
            low, high = np.clip([mean - deviation, mean + deviation], lowest, highest)
            axes.fill_between(taus, low, high, color=colour, alpha=0.15, lw=0)
        levels = {"most parameters": (most_parameters, "green"), "EvNAS, published": (published, "red")}
        for label, (value, colour) in levels.items():
            axes.axhline(value, ls="--", color=cells.PALETTE[colour], label=f"{label} {value:.2f}")
        figure.legend(loc="outside lower left", ncols=2)
        return cells.svg_of(figure, title, f"{title}, by tau from {min(taus)} to {max(taus)}.")
