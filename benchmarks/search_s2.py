"""The search in the NAS-Bench-201 space: its fast path (nas201/fast_search.py) against the plain supernet.

    python benchmarks/search_s2.py                                  # ratios, under 5 minutes on 2 cores
    python benchmarks/search_s2.py --device cuda --amp --compile --full

`population` is the fitness of a population as a search breeds it: 10 generations under the genetic algorithm's defaults
on a stand-in fitness (every operation has a random merit on every edge; noise, fresh in each generation, stands for the
moving weights), or on true accuracies with --table. The plain path measures every individual, as the published code
does; the fast path measures equal decoded architectures once. Images are random: only times and equality are measured.
"""

import argparse
import copy
import functools
import statistics
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402

from engine import batch_norm_mode, unique  # noqa: E402
from evolution import next_generation  # noqa: E402
from nas201 import fast_search  # noqa: E402
from nas201.encoding import arch_string, decode, random_alphas  # noqa: E402
from nas201.model_search import Network  # noqa: E402


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast, plain and fast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the fast path's cells")
    parser.add_argument("--bn", choices=["batch", "running"], default="running", help="statistics for fitness")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--population_images", type=int, default=64, help="validation images for the population")
    parser.add_argument("--generation", type=int, default=10, help="the population's")
    parser.add_argument("--table", help="breed on the CIFAR-10 test accuracies of this NAS-Bench-201 table")
    parser.add_argument("--full", action="store_true", help="also time one generation of the paper's sizes, and 50")
    return parser.parse_args()


def breed(generation, seed=18, table=None):
    """Decoded population (50, 1, 6, 5) of that generation, and the number of distinct ones in each up to it."""
    generator = torch.Generator().manual_seed(seed)
    if table:
        from nas201.benchmark import load

        bench = load(table)
    merit = torch.randn(6, 5, generator=generator)
    alphas, fitness, distinct = random_alphas(50, generator=generator), None, []
    for _ in range(generation):
        if fitness is not None:
            alphas = next_generation(alphas, fitness, num_elites=1, tsize=10, mutate_rate=0.1, generator=generator)
        decoded = decode(alphas)
        distinct.append(len(unique(decoded)[0]))
        if table:
            values = [bench.accuracy(bench.index(arch_string(a)), "cifar10", "test") for a in decoded]
            fitness = torch.tensor(values, dtype=torch.float64)
        else:
            fitness = (decoded * merit).sum((1, 2, 3)) + 0.5 * torch.randn(50, generator=generator)
    return decoded, distinct


def training_step(network, forward, x, y, alphas, autocast):
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.025, momentum=0.9, weight_decay=3e-4, nesterov=True)

    def step():
        with autocast():
            loss = F.cross_entropy(forward(x, alphas), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    return step


def difference(actual, expected):
    return ((actual - expected).abs().max() / max(1, expected.abs().max())).item()


def main():
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(common.describe(device))
    print(f"amp {args.amp}, compile {args.compile}; fitness with {args.bn} statistics\n")

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    @functools.cache
    def weights():
        """A network whose running statistics are those of a batch, so that its predictions differ between images."""
        torch.manual_seed(18)
        made = Network(16, 5, 10)
        norms = [module for module in made.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            made(torch.randn(64, 3, 32, 32), torch.zeros(6, 5))
        for norm in norms:
            norm.momentum = 0.1
        return made

    def network(channels_last=False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return copy.deepcopy(weights()).to(device, memory_format=layout)

    def fast_forward(of):
        return lambda x, alphas: fast_search.forward(of, x, alphas, compile=args.compile)

    # ---- a training step
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 3, 32, 32, generator=generator).to(device)
    x_last = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (256,), generator=generator).to(device)
    alphas = decode(random_alphas(1, generator=generator))[0].to(device)
    plain, last, fast = network(), network(True), network(True)
    with torch.no_grad(), autocast():
        logits = plain(x[:64], alphas), fast_forward(fast)(x_last[:64], alphas)
    print(f"training logits differ by {difference(logits[1].float(), logits[0].float()):.1e}")
    exact, exact_fast = network().double(), network(True).double()  # in float32 a flipped ReLU would hide the algebra
    for run in (exact, fast_forward(exact_fast)):
        F.cross_entropy(run(x[:8].double(), alphas.double()), y[:8]).backward()
    pairs = zip(exact.parameters(), exact_fast.parameters(), strict=True)
    worst = max(((b.grad - a.grad).norm() / a.grad.norm()).item() for a, b in pairs)
    print(f"gradients of any parameter in float64 differ by at most {worst:.1e}, relatively")
    steps = {
        "plain": training_step(plain, plain, x[:64], y[:64], alphas, autocast),
        "channels-last": training_step(last, last, x_last[:64], y[:64], alphas, autocast),
        "fast": training_step(fast, fast_forward(fast), x_last[:64], y[:64], alphas, autocast),
    }
    rows = {"training step, batch 64": common.alternate(steps, args.rounds, 1, device)}

    # ---- fitness
    plain, last, fast = network(), network(True), network(True)

    @torch.no_grad()
    def plain_logits(of, x, alphas):
        with batch_norm_mode(of, args.bn), autocast():
            return of(x, alphas)

    def fast_fitness(x, population):
        with autocast():
            logits_of = fast_search.fitness(fast, args.bn, compile=args.compile)(x)
            return [logits_of(a) for a in population]

    reference = plain_logits(plain, x, alphas)
    print(f"fitness logits differ by {difference(fast_fitness(x_last, [alphas])[0].float(), reference.float()):.1e}")
    measured = {
        "plain": lambda: plain_logits(plain, x, alphas),
        "channels-last": lambda: plain_logits(last, x_last, alphas),
        "fast": lambda: fast_fitness(x_last, [alphas]),
    }
    rows["fitness, one individual, batch 256"] = common.alternate(measured, args.rounds, 1, device)

    # ---- fitness of a population
    population, distinct_by_generation = breed(args.generation, table=args.table)
    images = args.population_images
    distinct, index = unique(population)
    print(f"distinct architectures of 50 in generations 1..{args.generation}: {distinct_by_generation}")
    few = x[:images], x_last[:images]
    results = {}

    def plain_population():
        results["plain"] = [plain_logits(plain, few[0], a) for a in population.to(device)]

    def fast_population():
        of_distinct = fast_fitness(few[1], unique(population)[0].to(device))
        results["fast"] = [of_distinct[i] for i in index]

    measured = {"plain": plain_population, "fast": fast_population}
    title = f"fitness, population of 50 ({len(distinct)} distinct), {images} images"
    rows[title] = common.alternate(measured, min(3, args.rounds), 0, device)
    reference, actual = (torch.stack(results[name]).float() for name in ("plain", "fast"))
    two_best = reference.topk(2, dim=-1).values
    tied = (two_best[..., 0] - two_best[..., 1]) < 1e-4
    wrong = ((actual.argmax(-1) != reference.argmax(-1)) & ~tied).sum().item()
    print(f"population logits differ by {difference(actual, reference):.1e}; {wrong} predictions beyond ties")

    print(f"\n{'median seconds':58} {'plain NCHW':>11} {'channels-last':>14} {'fast':>9} {'ratio':>7}")
    ratios = {}
    for key, (title, seconds) in zip(("train_step", "fitness", "population"), rows.items(), strict=True):
        median = {name: statistics.median(values) for name, values in seconds.items()}
        ratios[key] = median["plain"] / median["fast"]
        middle = f"{median['channels-last']:14.4f}" if "channels-last" in median else f"{'-':>14}"
        print(f"{title:58} {median['plain']:11.4f} {middle} {median['fast']:9.4f} {ratios[key]:6.2f}x")
    if args.full:
        generation_of_the_paper(steps["fast"], fast_fitness, distinct.to(device), device)
    common.finish(ratios)


def generation_of_the_paper(step, fast_fitness, distinct, device):
    """One generation on CIFAR-10: 391 steps of batch 64, then all distinct individuals on 25,000 images by 1024."""

    def train():
        for _ in range(391):
            step()

    def measure():
        for size in [1024] * 24 + [424]:
            x = torch.randn(size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
            for logits in fast_fitness(x, distinct):
                logits.argmax(1)

    seconds = common.alternate({"training": train, "fitness": measure}, 1, 0, device)
    total = sum(values[0] for values in seconds.values())
    print(
        f"\none generation, fast path, {len(distinct)} distinct: training {seconds['training'][0]:.1f} s, fitness "
        f"{seconds['fitness'][0]:.1f} s; 50 generations {50 * total:.0f} s (published: 20,250 s)"
    )


if __name__ == "__main__":
    main()
