"""Time the search in the NAS-Bench-201 space (S2): the fast path against the plain supernet, C 16, N 5.

    python benchmarks/search_s2.py [--table nb201_accuracy.csv.xz]  # under 5 minutes on 2 cores
    python benchmarks/search_s2.py --device cuda --amp --full

Images are random, because only times and agreement of the results are measured.

The script also times the fitness of a whole population. The population is bred for 10 generations
with the default settings of the genetic algorithm. The breeding uses a stand-in for fitness: each
operation has a random value on each edge. Noise, drawn anew in each generation, imitates the
changing weights. With --table, a second population is bred on true accuracies.

The plain path measures every individual, as the published code does. The fast path measures equal
architectures only once.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    Seconds,
    Way,
    alternate,
    compare,
    fastest,
    largest_difference,
    print_ratios,
    print_table,
    search_arguments,
)
from evolution import next_generation
from fitness import unique
from nas201 import benchmark, fast_search
from nas201.encoding import arch_string, decode, random_alphas
from nas201.model_search import Network
from nas201.published import PUBLISHED_SECONDS


def breed(generation: int, table_path: str | None) -> tuple[Tensor, list[int]]:
    """Return a generation's decoded population (50, 1, 6, 5) and counts of distinct individuals.

    The counts are a list with one number for each generation from 1 to `generation`. Fitness is the
    accuracy in the table, or a stand-in without a table.
    """
    generator = torch.Generator().manual_seed(18)
    table = benchmark.load(table_path) if table_path else None
    values_of_ops = torch.randn(6, 5, generator=generator)
    alphas = random_alphas(50, generator=generator)
    fitness = None
    distinct = []
    for _ in range(generation):
        if fitness is not None:
            alphas = next_generation(alphas, fitness, num_elites=1, tsize=10, mutate_rate=0.1, generator=generator)
        decoded = decode(alphas)
        distinct.append(len(unique(decoded).first))
        if table:
            values = [table.accuracy(table.index(arch_string(a)), "cifar10", "test") for a in decoded]
            fitness = torch.tensor(values, dtype=torch.float64)
        else:
            fitness = (decoded * values_of_ops).sum((1, 2, 3)) + 0.5 * torch.randn(50, generator=generator)
    return decoded, distinct


def new_network() -> Network:
    """Return the paper's supernet, with the running statistics of one batch.

    The running statistics of a new network are mean 0 and variance 1. A network with these
    statistics would predict the same class for all images.
    """
    torch.manual_seed(18)
    network = Network(16, 5, 10)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # so that one batch replaces the running statistics
    with torch.no_grad():
        network(torch.randn(64, 3, 32, 32), torch.zeros(6, 5))
    for norm in norms:
        norm.momentum = 0.1
    return network


def measure_population(args: argparse.Namespace, plain: Way, fast: Way, x: Tensor, population: Tensor) -> Seconds:
    """Time a population's fitness on x in both ways, and print how far the results differ."""
    found = unique(population.cpu())
    distinct = population[found.first].to(args.device)
    results = {}

    def measure_plain() -> None:
        results["plain"] = plain.measure(plain.evaluator(x), population)

    def measure_fast() -> None:
        results["fast"] = fast.measure(fast.evaluator(x), distinct)[found.number]

    seconds = alternate({"plain": measure_plain, "fast": measure_fast}, min(3, args.rounds), 0, args.device)
    two_best = results["plain"].topk(2, dim=-1).values
    tied = two_best[..., 0] - two_best[..., 1] < 1e-4
    other = (results["fast"].argmax(-1) != results["plain"].argmax(-1)) & ~tied
    apart = largest_difference(results["fast"], results["plain"])
    print(f"the population's logits differ by {apart:.1e}; {other.sum()} predictions differ beyond ties")
    return seconds


def main() -> None:
    parser = search_arguments(__doc__, bn="running")
    parser.add_argument(
        "--population_images",
        type=int,
        default=64,
        help="images on which the population is measured (default: 64; 1,024 with --full)",
    )
    parser.add_argument("--generation", type=int, default=10, help="generation that is measured (default: 10)")
    parser.add_argument(
        "--table", help="NAS-Bench-201 table; also measure a population bred on its CIFAR-10 test accuracies"
    )
    args = parser.parse_args()
    batch = 1024 if args.full else 256
    images = 1024 if args.full else args.population_images
    generator = torch.Generator().manual_seed(0)
    alphas = decode(random_alphas(1, generator=generator))[0].to(args.device)
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(args.device)
    y = torch.randint(10, (64,), generator=generator).to(args.device)
    network = new_network()
    seconds = compare(network, fast_search, args, x, y, alphas, nesterov=True)

    plain = Way("plain", network, fast_search, args)
    fast = Way("fast", network, fast_search, args)
    lines = {"train_step": ("training step, batch 64, s", seconds["train_step"])}
    lines["fitness"] = (f"fitness, one individual, batch {batch}, s", seconds["fitness"])
    for table in dict.fromkeys((None, args.table)):
        population, counts = breed(args.generation, table)
        print(f"distinct architectures of 50 in generations 1..{args.generation}: {counts}")
        title = f"fitness, population of 50 ({counts[-1]} distinct{', table' if table else ''}), {images} images, s"
        of_population = measure_population(args, plain, fast, x[:images], population.to(args.device))
        lines["population_on_table" if table else "population"] = (title, of_population)
    ratios = print_table(lines)
    if args.full:
        generation = 391 * fastest(seconds["train_step"]) + 25 * of_population["fast"]
        print(
            f"one generation, 391 steps and {counts[-1]} distinct individuals on 25 batches: {generation:.1f} s; "
            f"50 generations {50 * generation:.0f} s, published {PUBLISHED_SECONDS:,.0f} s"
        )
    print_ratios(ratios)


if __name__ == "__main__":
    main()
