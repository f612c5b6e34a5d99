"""The search in the NAS-Bench-201 space: its fast path (nas201/fast_search.py) against the plain supernet, C 16, N 5.

    python benchmarks/search_s2.py [--table nb201_accuracy.csv.xz]  # ratios, under 5 minutes on 2 cores
    python benchmarks/search_s2.py --device cuda --amp --full

`population` is the fitness of a population as a search breeds it: 10 generations under the genetic algorithm's defaults
on a stand-in fitness (every operation has a random merit on every edge; noise, fresh in each generation, stands for the
moving weights), and with --table on true accuracies too. The plain path measures every individual, as the published
code does; the fast path measures equal decoded architectures once. Images are random: only times and equality are
measured.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Way, alternate, compare, difference, fastest, finish, search_arguments, show
from evolution import next_generation
from fitness import unique
from nas201 import benchmark, fast_search
from nas201.encoding import arch_string, decode, random_alphas
from nas201.model_search import Network
from nas201.published import PUBLISHED_SECONDS


def breed(generation, table):
    """Decoded population (50, 1, 6, 5) of that generation, and the number of distinct ones in each up to it."""
    generator = torch.Generator().manual_seed(18)
    table = benchmark.load(table) if table else None
    merit = torch.randn(6, 5, generator=generator)
    alphas, fitness, distinct = random_alphas(50, generator=generator), None, []
    for _ in range(generation):
        if fitness is not None:
            alphas = next_generation(alphas, fitness, num_elites=1, tsize=10, mutate_rate=0.1, generator=generator)
        decoded = decode(alphas)
        distinct.append(len(unique(decoded).first))
        if table:
            values = [table.accuracy(table.index(arch_string(a)), "cifar10", "test") for a in decoded]
            fitness = torch.tensor(values, dtype=torch.float64)
        else:
            fitness = (decoded * merit).sum((1, 2, 3)) + 0.5 * torch.randn(50, generator=generator)
    return decoded, distinct


def new_network():
    """Its running statistics are those of a batch, so that predictions differ between images."""
    torch.manual_seed(18)
    network = Network(16, 5, 10)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network(torch.randn(64, 3, 32, 32), torch.zeros(6, 5))
    for norm in norms:
        norm.momentum = 0.1
    return network


def measure_population(args, plain, fast, x, population):
    """Seconds of the fitness of a population on x, {way: seconds}; prints how far the two ways differ."""
    found = unique(population.cpu())
    distinct, results = population[found.first].to(args.device), {}

    def measure_plain():
        results["plain"] = plain.measure(plain.evaluator(x), population)

    def measure_fast():
        results["fast"] = fast.measure(fast.evaluator(x), distinct)[found.number]

    seconds = alternate({"plain": measure_plain, "fast": measure_fast}, min(3, args.rounds), 0, args.device)
    two_best = results["plain"].topk(2, dim=-1).values
    tied = two_best[..., 0] - two_best[..., 1] < 1e-4
    other = (results["fast"].argmax(-1) != results["plain"].argmax(-1)) & ~tied
    apart = difference(results["fast"], results["plain"])
    print(f"the population's logits differ by {apart:.1e}, {other.sum()} predictions beyond ties")
    return seconds


def main():
    parser = search_arguments(__doc__, bn="running")
    parser.add_argument("--population_images", type=int, default=64, help="validation images for the population")
    parser.add_argument("--generation", type=int, default=10, help="the population's")
    parser.add_argument("--table", help="breed on the CIFAR-10 test accuracies of this NAS-Bench-201 table")
    args = parser.parse_args()
    batch, images = (1024, 1024) if args.full else (256, args.population_images)
    generator = torch.Generator().manual_seed(0)
    alphas = decode(random_alphas(1, generator=generator))[0].to(args.device)
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(args.device)
    y = torch.randint(10, (64,), generator=generator).to(args.device)
    network = new_network()
    seconds = compare(network, fast_search, args, x, y, alphas, nesterov=True)

    plain, fast = (Way(name, network, fast_search, args) for name in ("plain", "fast"))
    rows = {"train_step": ("training step, batch 64, s", seconds["train_step"])}
    rows["fitness"] = (f"fitness, one individual, batch {batch}, s", seconds["fitness"])
    for table in dict.fromkeys((None, args.table)):
        population, counts = breed(args.generation, table)
        print(f"distinct architectures of 50 in generations 1..{args.generation}: {counts}")
        title = f"fitness, population of 50 ({counts[-1]} distinct{', table' if table else ''}), {images} images, s"
        of_population = measure_population(args, plain, fast, x[:images], population.to(args.device))
        rows["population_on_table" if table else "population"] = (title, of_population)
    ratios = show(rows)
    if args.full:
        generation = 391 * fastest(seconds["train_step"]) + 25 * of_population["fast"]
        print(
            f"one generation, 391 steps and {counts[-1]} distinct individuals on 25 batches: {generation:.1f} s; "
            f"50 generations {50 * generation:.0f} s, published {PUBLISHED_SECONDS:,.0f} s"
        )
    finish(ratios)


if __name__ == "__main__":
    main()
