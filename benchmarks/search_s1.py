"""Time the search in the DARTS space (S1): the fast path against the plain supernet, with C 16 and 8 cells.

    python benchmarks/search_s1.py                                  # about 10 minutes on 2 cores
    python benchmarks/search_s1.py --device cuda --amp --full

Images are random, because only times, memory and agreement of the results are measured.

--full times fitness at batch 1,024, and estimates the time of a generation and of a whole search.
--full also compares fitness in bfloat16 with fitness in float32. The weights are the same for both
and are trained for 200 steps on handwritten digits.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import fast_search
from benchmarks.common import WAYS, Way, compare, fastest, print_ratios, print_table, search_arguments
from encoding import decode, random_alphas
from model_search import Network

PUBLISHED_HOURS = 3.83 * 24  # on one GPU


def new_network() -> Network:
    """Return the paper's supernet, with the same random weights in every call."""
    torch.manual_seed(18)
    return Network(16, 10, 8)


def resident(field: str) -> float:
    """Return this process's memory in MB. `field` is VmRSS for current or VmHWM for peak memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def added_memory(args: argparse.Namespace, batch: int) -> float:
    """Return how much memory, in MB, a training step or fitness adds at its peak.

    Call this function once in a new process: VmHWM is the peak over the whole life of a process.
    """
    task, name = args.memory_of
    way = Way(name, new_network(), fast_search, args)
    x = torch.randn(16 if task == "training" else batch, 3, 32, 32, device=args.device)
    alphas = torch.zeros(1, 2, 14, 8, device=args.device)

    def measure(x: Tensor) -> None:
        if task == "training":
            way.training_step(x, torch.zeros(len(x), dtype=torch.int64, device=args.device), alphas[0])()
        else:
            way.measure(way.evaluator(x), alphas)

    measure(x[:2])  # loads libraries and compiles kernels, whose memory should not count
    if torch.device(args.device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        measure(x)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    measure(x)
    return resident("VmHWM") - before


def memory(task: str, name: str) -> float:
    """Run `added_memory` in a new process, for the task "training" or "fitness" and one way."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", task, name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


def compare_precisions(args: argparse.Namespace, steps: int = 200, individuals: int = 100) -> None:
    """Print how far fitness in bfloat16 is from fitness in float32, for random individuals.

    Both use the same weights. These weights are trained on handwritten digits, enlarged to 32x32.
    """
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
    in_float32, in_bfloat16 = fitness
    print(
        f"bfloat16 against float32, {individuals} random individuals after {steps} steps on digits: Kendall's tau-b "
        f"{kendalltau(in_float32, in_bfloat16).statistic:.3f}; "
        f"fitness {in_float32.min():.1f} to {in_float32.max():.1f} %, "
        f"mean difference {(in_float32 - in_bfloat16).abs().mean():.2f} %"
    )


def main() -> None:
    parser = search_arguments(__doc__, bn="batch")
    parser.add_argument("--memory_of", nargs=2, metavar=("TASK", "WAY"), help=argparse.SUPPRESS)  # see `memory`
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
    peaks = {}
    for task in ("training", "fitness"):
        peaks[task] = {name: memory(task, name) for name in WAYS if name != "compiled"}
    ratios = print_table(
        {
            "train_step": ("training step, batch 64, s", seconds["train_step"]),
            "fitness": (f"fitness, one individual, batch {batch}, s", seconds["fitness"]),
            "training_memory": ("peak memory of a training step, batch 16, MB", peaks["training"]),
            "memory": ("peak memory of the fitness pass, MB", peaks["fitness"]),
        }
    )
    print(f"peak memory of a training step, batch 16, with --checkpoint: {memory('training', 'checkpoint'):.0f} MB")
    if args.full:
        step = fastest(seconds["train_step"])
        fitness = fastest(seconds["fitness"])
        generation = 391 * step + 25 * 50 * fitness
        print(
            f"one generation, 391 steps and 50 distinct individuals on 25 batches: {generation:.1f} s; 50 generations "
            f"{50 * generation / 3600:.2f} h, published {PUBLISHED_HOURS:.1f} h"
        )
        compare_precisions(args)
    print_ratios(ratios)


if __name__ == "__main__":
    main()
