"""How a search's work and traffic divide among 1, 2 and 4 processes (gloo, this machine's CPU).

    python benchmarks/scaling.py [--full]

Times say little where processes share cores; shares of the work and bytes sent are the same on any hardware.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import fast_search
import loaders
from benchmarks.common import describe, finish
from encoding import decode, random_alphas
from fitness import measure_fitness
from model_search import Network
from support import distributed
from training import TrainingSettings, TrainingState, make_optimizer, train_one_epoch


def generation(rank, world, address, args, results):
    """One generation of an S1 search as process `rank`; writes what it did to results/RANK.pt."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    done = {"trained": 0, "measured": 0, "bytes": 0}
    all_reduce = torch.distributed.all_reduce

    def counted(tensor, *arguments, **settings):
        done["bytes"] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *arguments, **settings)

    torch.distributed.all_reduce = counted
    device = torch.device("cpu")
    digits = datasets.load_images("digits", None, "train")
    recipe = datasets.augmentation("digits", digits)
    train, valid = (digits.subset(torch.arange(i, i + args.images)) for i in (0, args.images))
    settings = dict(generator=torch.Generator().manual_seed(1), augment=True)
    train_loader = loaders.Loader(train, 64, recipe, device, **settings)
    valid_loader = loaders.Loader(valid, 256, recipe, device, **settings, shared=False)
    torch.manual_seed(0)
    network = Network(args.channels, 10, args.layers)
    recipe = argparse.Namespace(learning_rate=0.025, momentum=0.9, weight_decay=3e-4)
    optimizer = make_optimizer(network.parameters(), recipe)
    alphas = decode(random_alphas(args.pop_size, generator=torch.Generator().manual_seed(0)))

    def loss_of(x, y, individual):
        done["trained"] += len(y)
        logits = fast_search.forward(network, x, individual)
        return torch.nn.functional.cross_entropy(logits, y), logits

    class Counting(fast_search.Evaluator):
        def set_batch(self, x):
            self.images = len(x)
            super().set_batch(x)

        def logits(self, individual):
            done["measured"] += self.images
            return super().logits(individual)

    start = time.perf_counter()
    state = TrainingState(network, optimizer, train_loader, TrainingSettings(report_freq=10**9))
    inputs_of = lambda step: (alphas[step % len(alphas)],)  # noqa: E731
    train_one_epoch(state, loss_of, inputs_of, where="training", log=lambda text: None)
    done["training seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    done["fitness"] = measure_fitness(network, alphas, valid_loader, "batch", Counting)
    done["fitness seconds"] = time.perf_counter() - start
    done["steps"], done["parameters"] = len(train_loader), sum(p.numel() for p in network.parameters())
    torch.save(done, Path(results) / f"{rank}.pt")
    distributed.leave_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="population 50, C 16, 8 cells instead of 10, 4, 3")
    args = parser.parse_args()
    args.pop_size, args.channels, args.layers = (50, 16, 8) if args.full else (10, 4, 3)
    args.images = 640
    print(f"{describe('cpu')}; one thread a process, population {args.pop_size}, {args.images} + {args.images} digits")
    columns = "{:>9} {:>22} {:>24} {:>16} {:>12} {:>12}"
    print(
        columns.format(
            "processes", "trained images a rank", "measured images a rank", "MB a rank", "train s", "fitness s"
        )
    )
    ratios = {}
    for world in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            address = f"file://{folder}/meet"
            torch.multiprocessing.spawn(generation, (world, address, args, folder), nprocs=world)
            ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
        of = {name: [rank[name] for rank in ranks] for name in ranks[0] if name != "fitness"}
        shares = [f"{min(of[name])} to {max(of[name])}" for name in ("trained", "measured")]
        seconds = [f"{max(of[name]):.2f}" for name in ("training seconds", "fitness seconds")]
        print(columns.format(world, *shares, f"{of['bytes'][0] / 1e6:.2f}", *seconds))
        ratios |= {f"{name}_{world}": max(of[name]) / sum(of[name]) for name in ("trained", "measured")}
        ratios[f"megabytes_{world}"] = of["bytes"][0] / 1e6
    steps, parameters = ranks[0]["steps"], ranks[0]["parameters"]
    print(f"all-reduced a training step: {4 * parameters / 1e6:.3f} MB ({parameters:,} gradients), {steps} steps")
    finish(ratios)


if __name__ == "__main__":
    main()
