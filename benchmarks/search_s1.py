"""The search in the DARTS space: its fast path (fast_search.py) against the plain supernet, C 16, 8 cells.

    python benchmarks/search_s1.py                                  # ratios, some 10 minutes on 2 cores
    python benchmarks/search_s1.py --device cuda --amp --full

--full measures fitness at batch 1,024, multiplies out to a generation and to the search, and compares the fitness in
bfloat16 with that in float32 on the same lightly trained weights. Else images are random: only times, memory and
equality are measured.
"""

import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import fast_search
from benchmarks.common import WAYS, Way, compare, fastest, finish, search_arguments, show
from encoding import decode, random_alphas
from model_search import Network

PUBLISHED_HOURS = 3.83 * 24


def new_network():
    torch.manual_seed(18)
    return Network(16, 10, 8)


def resident(field):
    """VmRSS, or VmHWM, its peak, of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def added_memory(args, batch):
    """MB that a training step, or fitness, adds at its peak, in this process, which has computed nothing before."""
    of, name = args.memory_of
    way = Way(name, new_network(), fast_search, args)
    x = torch.randn(16 if of == "training" else batch, 3, 32, 32, device=args.device)
    alphas = torch.zeros(1, 2, 14, 8, device=args.device)

    def measure(x):
        if of == "training":
            way.training_step(x, torch.zeros(len(x), dtype=torch.int64, device=args.device), alphas[0])()
        else:
            way.measure(way.evaluator(x), alphas)

    measure(x[:2])  # libraries load and kernels compile
    if torch.device(args.device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        measure(x)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    measure(x)
    return resident("VmHWM") - before


def memory(of, name):
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", of, name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


def compare_precisions(args, steps=200, individuals=100):
    """Fitness of random individuals on enlarged handwritten digits, in float32 and bfloat16 on the same weights."""
    from scipy.stats import kendalltau

    digits = datasets.load_images("digits", None, "train")
    x = torch.nn.functional.interpolate(digits.images.float().div(128).sub(1), scale_factor=4).to(args.device)
    y = digits.labels.to(args.device)
    way = Way("fast", new_network(), fast_search, args)
    generator = torch.Generator().manual_seed(1)
    population = decode(random_alphas(individuals, generator=generator)).to(args.device)
    for step in range(steps):
        chosen = torch.randint(0, 1024, (64,), generator=generator).to(args.device)
        way.training_step(x[chosen], y[chosen], population[step % individuals])()
    fitness = []
    for args.amp in (False, True):
        logits = way.measure(way.evaluator(x[1024:]), population)  # (P, B, 10)
        fitness.append(100 * (logits.argmax(-1) == y[1024:]).double().mean(1).cpu())
    a, b = fitness
    print(
        f"bfloat16 against float32, {individuals} random individuals after {steps} steps on digits: Kendall's tau-b "
        f"{kendalltau(a, b).statistic:.3f}; fitness {a.min():.1f} to {a.max():.1f} %, "
        f"mean difference {(a - b).abs().mean():.2f} %"
    )


def main():
    parser = search_arguments(__doc__, bn="batch")
    parser.add_argument("--memory_of", nargs=2, help="print the memory of training or fitness, WAY: for its own use")
    args = parser.parse_args()
    batch = 1024 if args.full else 256
    if args.memory_of:
        print(added_memory(args, batch))
        return
    generator = torch.Generator().manual_seed(0)
    alphas = decode(random_alphas(1, generator=generator))[0].to(args.device)
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(args.device)
    y = torch.randint(10, (64,), generator=generator).to(args.device)
    seconds = compare(new_network(), fast_search, args, x, y, alphas)
    peaks = {of: {name: memory(of, name) for name in WAYS if name != "compiled"} for of in ("training", "fitness")}
    ratios = show(
        {
            "train_step": ("training step, batch 64, s", seconds["train_step"]),
            "fitness": (f"fitness, one individual, batch {batch}, s", seconds["fitness"]),
            "training_memory": ("peak memory of a training step, batch 16, MB", peaks["training"]),
            "memory": ("peak memory of the fitness pass, MB", peaks["fitness"]),
        }
    )
    print(f"peak memory of a training step, batch 16, with --checkpoint: {memory('training', 'checkpoint'):.0f} MB")
    if args.full:
        step, fitness = (fastest(of) for of in seconds.values())
        generation = 391 * step + 25 * 50 * fitness
        print(
            f"one generation, 391 steps and 50 distinct individuals on 25 batches: {generation:.1f} s; 50 generations "
            f"{50 * generation / 3600:.2f} h, published {PUBLISHED_HOURS:.1f} h"
        )
        compare_precisions(args)
    finish(ratios)


if __name__ == "__main__":
    main()
