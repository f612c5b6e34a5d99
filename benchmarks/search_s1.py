"""The search in the DARTS space: its fast path (fast_search.py) against the plain supernet, C 16, 8 cells.

    python benchmarks/search_s1.py                                  # ratios, under 5 minutes on 2 cores
    python benchmarks/search_s1.py --device cuda --amp --compile --full

--full takes the paper's sizes (batch 64 to train, 1,024 to measure), multiplies them out to a generation and to the
search, and compares the fitness in bfloat16 with that in float32 on the same lightly trained weights. Elsewhere images
are random: only times, memory and equality are measured.
"""

import argparse
import copy
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402

import fast_search  # noqa: E402
from encoding import decode, random_alphas  # noqa: E402
from engine import batch_norm_mode, plain_search  # noqa: E402
from model_search import Network  # noqa: E402

PATHS = ("plain", "channels-last", "fast")
PUBLISHED_SECONDS = 3.83 * 24 * 3600


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast, for all paths")
    parser.add_argument("--compile", action="store_true", help="torch.compile the fast path's cells")
    parser.add_argument("--bn", choices=["batch", "running"], default="batch", help="statistics for fitness")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="the paper's sizes")
    parser.add_argument("--memory_of", choices=PATHS, help=argparse.SUPPRESS)  # what memory() runs in a new process
    args = parser.parse_args()
    args.batch = 1024 if args.full else 256
    return args


class Path_:
    """One of the three ways to compute: a network of its own, its images' layout, its training and fitness passes."""

    def __init__(self, name, network, args):
        self.layout = torch.contiguous_format if name == "plain" else torch.channels_last
        self.network = copy.deepcopy(network).to(memory_format=self.layout)
        self.module = fast_search if name == "fast" else plain_search
        self.options = {"compile": True} if args.compile and name == "fast" else {}
        self.args = args

    def autocast(self):
        return torch.autocast(torch.device(self.args.device).type, torch.bfloat16, enabled=self.args.amp)

    def logits(self, x, alphas):
        with self.autocast():
            return self.module.forward(self.network, x.contiguous(memory_format=self.layout), alphas, **self.options)

    def training_step(self, x, y, alphas):
        x, parameters = x.contiguous(memory_format=self.layout), list(self.network.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.025, momentum=0.9, weight_decay=3e-4)

        def step():
            loss = F.cross_entropy(self.logits(x, alphas), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()

        return step

    @torch.no_grad()
    def prepare(self, x):
        """The function that gives an individual's logits on x."""
        with self.autocast():
            logits_of = self.module.fitness(self.network, self.args.bn, **self.options)(
                x.contiguous(memory_format=self.layout)
            )

        @torch.no_grad()
        def measure(alphas):
            with batch_norm_mode(self.network, self.args.bn), self.autocast():
                return logits_of(alphas)

        return measure


def new_network(args):
    torch.manual_seed(18)
    network = Network(16, 10, 8).to(args.device)
    for norm in network.modules():  # as if trained: running statistics differ from those a network begins with
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return network


def difference(actual, expected):
    return ((actual - expected).abs().max() / max(1, expected.abs().max())).item()


# ---- peak memory


def resident(field):
    """VmRSS or VmHWM, its peak, of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def fitness_memory(args):
    """MB that one individual's fitness pass adds at its peak, in this process, which has computed nothing before."""
    path = Path_(args.memory_of, new_network(args), args)
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    alphas = torch.zeros(2, 14, 8, device=args.device)
    path.prepare(x[:2])(alphas)  # libraries load and kernels compile
    if torch.device(args.device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        path.prepare(x)(alphas)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    path.prepare(x)(alphas)
    return resident("VmHWM") - before


def memory(name):
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


# ---- bfloat16


def tau_b(a, b):
    """Kendall's rank correlation, corrected for ties."""
    a, b = ((v[:, None] - v[None, :]).sign() for v in (a.double(), b.double()))
    return ((a * b).sum() / (a.abs().sum() * b.abs().sum()).sqrt()).item()


def compare_precisions(args, steps=200, individuals=100):
    """Fitness of random individuals on handwritten digits, 32x32, in float32 and bfloat16 on the same weights."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(digits.images).float().div(8).sub(1)[order, None].repeat(1, 3, 1, 1)
    x = F.interpolate(x, scale_factor=4).to(args.device)
    y = torch.from_numpy(digits.target)[order].to(args.device)
    path = Path_("fast", new_network(args), args)
    generator = torch.Generator().manual_seed(1)
    population = decode(random_alphas(individuals, generator=generator)).to(args.device)
    for step in range(steps):
        chosen = torch.randint(0, 1024, (64,), generator=generator).to(args.device)
        path.training_step(x[chosen], y[chosen], population[step % individuals])()
    fitness = []
    for amp in (False, True):
        args.amp = amp
        measure = path.prepare(x[1024:])
        fitness.append(torch.stack([(measure(a).argmax(1) == y[1024:]).float().mean() for a in population]).cpu())
    a, b = fitness
    print(
        f"bfloat16 against float32, {individuals} random individuals after {steps} steps on digits: Kendall's tau-b "
        f"{tau_b(a, b):.3f}; fitness {100 * a.min():.1f} to {100 * a.max():.1f} %, "
        f"mean difference {100 * (a - b).abs().mean():.2f} %"
    )


# ----


def main():
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(fitness_memory(args))
        return
    print(common.describe(args.device))
    print(f"amp {args.amp}, compile {args.compile}; fitness with {args.bn} statistics\n")

    generator = torch.Generator().manual_seed(0)
    alphas = decode(random_alphas(1, generator=generator))[0].to(args.device)
    x = torch.randn(args.batch, 3, 32, 32, generator=generator).to(args.device)
    y = torch.randint(10, (64,), generator=generator).to(args.device)
    network = new_network(args)
    paths = {name: Path_(name, network, args) for name in PATHS}
    plain, fast = paths["plain"], paths["fast"]

    gradients, logits = {}, {}
    for name, path in paths.items():
        logits[name] = path.logits(x[:64], alphas).float()
        F.cross_entropy(logits[name], y).backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in path.network.parameters()])
    print(f"training logits differ by {difference(logits['fast'], logits['plain']):.1e}")
    for name in PATHS[1:]:
        apart = (gradients[name] - gradients["plain"]).norm() / gradients["plain"].norm()
        print(f"gradients differ by {apart.item():.1e} ({name})")
    del gradients, logits
    measures = {name: path.prepare(x) for name, path in paths.items()}
    print(f"fitness logits differ by {difference(measures['fast'](alphas).float(), measures['plain'](alphas).float()):.1e}")

    steps = {name: path.training_step(x[:64], y, alphas) for name, path in paths.items()}
    seconds = {"train_step": common.alternate(steps, args.rounds, 1, args.device)}
    measures = {name: path.prepare(x) for name, path in paths.items()}
    passes = {name: lambda measure=measure: measure(alphas) for name, measure in measures.items()}
    seconds["fitness"] = common.alternate(passes, args.rounds, 1, args.device)
    table = {key: {name: statistics.median(v) for name, v in of.items()} for key, of in seconds.items()}
    table["memory"] = {name: memory(name) for name in PATHS}

    titles = {
        "train_step": "training step, batch 64, s",
        "fitness": f"fitness, one individual, batch {args.batch}, s",
        "memory": "peak memory of the fitness pass, MB",
    }
    print(f"\n{'medians':44} {'plain NCHW':>12} {'channels-last':>14} {'fast':>10} {'plain / fast':>13}")
    for key, row in table.items():
        figures = (f"{row[name]:{width}.{1 if key == 'memory' else 4}f}" for name, width in zip(PATHS, (12, 14, 10)))
        print(f"{titles[key]:44} {' '.join(figures)} {row['plain'] / row['fast']:12.2f}x")
    if args.full:
        prepared = statistics.median(common.alternate({"": lambda: fast.prepare(x)}, 3, 1, args.device)[""])
        generation = 391 * table["train_step"]["fast"] + 25 * (prepared + 50 * table["fitness"]["fast"])
        print(
            f"one generation, 391 steps and 50 distinct individuals on 25 batches: {generation:.1f} s; 50 generations "
            f"{50 * generation / 3600:.2f} h, published {PUBLISHED_SECONDS / 3600:.1f} h"
        )
        compare_precisions(args)
    common.finish({key: row["plain"] / row["fast"] for key, row in table.items()})


if __name__ == "__main__":
    main()
