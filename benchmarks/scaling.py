"""Count the work and the traffic of each process when 1, 2 or 4 processes share a search.

    python benchmarks/scaling.py [--full]

The processes run on the CPU and communicate with gloo. Each process's share of the work and the
bytes sent are the same on any hardware. The times mean little if the processes share cores.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import fast_search
import loaders
from benchmarks.common import RECIPE, describe_machine, print_ratios
from encoding import decode, random_alphas
from fitness import measure_fitness
from model_search import Network
from support import distributed
from training import TrainingSettings, TrainingState, make_optimizer, train_one_epoch


class Counting(fast_search.Evaluator):
    """An evaluator that counts measured images. An image counts once for each individual."""

    measured = 0

    def set_batch(self, x: Tensor) -> None:
        self.images = len(x)
        super().set_batch(x)

    def logits(self, alphas: Tensor) -> Tensor:
        Counting.measured += self.images
        return super().logits(alphas)


def generation(rank: int, world: int, address: str, args: argparse.Namespace, results: str) -> None:
    """Compute one generation of a search in the DARTS space as process `rank` of `world`.

    Counts and times are written to RANK.pt in the folder `results`. `address` is the init_method of
    the process group.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    done = {"trained": 0, "bytes": 0}
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: Tensor, *arguments, **settings) -> object:
        done["bytes"] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *arguments, **settings)

    torch.distributed.all_reduce = counted
    device = torch.device("cpu")
    digits = datasets.load_images("digits", None, "train")
    augmentation = datasets.augmentation("digits", digits)
    train = digits.subset(torch.arange(0, args.images))
    valid = digits.subset(torch.arange(args.images, 2 * args.images))
    settings = dict(generator=torch.Generator().manual_seed(1), augment=True)
    train_loader = loaders.Loader(train, 64, augmentation, device, **settings)
    valid_loader = loaders.Loader(valid, 256, augmentation, device, **settings, shared=False)
    torch.manual_seed(0)
    network = Network(args.channels, 10, args.layers)
    optimizer = make_optimizer(network.parameters(), RECIPE)
    alphas = decode(random_alphas(args.pop_size, generator=torch.Generator().manual_seed(0)))

    def loss_of(x: Tensor, y: Tensor, individual: Tensor) -> tuple[Tensor, Tensor]:
        done["trained"] += len(y)
        logits = fast_search.forward(network, x, individual)
        return torch.nn.functional.cross_entropy(logits, y), logits

    def inputs_of(step: int) -> tuple[Tensor]:
        return (alphas[step % len(alphas)],)

    start = time.perf_counter()
    state = TrainingState(network, optimizer, train_loader, TrainingSettings(report_freq=10**9))
    train_one_epoch(state, loss_of, inputs_of, where="training", log=lambda text: None)
    done["training seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    done["fitness"] = measure_fitness(network, alphas, valid_loader, "batch", Counting)
    done["fitness seconds"] = time.perf_counter() - start
    done["measured"] = Counting.measured
    done["steps"] = len(train_loader)
    done["parameters"] = sum(p.numel() for p in network.parameters())
    torch.save(done, Path(results) / f"{rank}.pt")
    distributed.leave_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full", action="store_true", help="use population 50, C 16 and 8 cells, not population 10, C 4 and 3 cells"
    )
    args = parser.parse_args()
    args.pop_size = 50 if args.full else 10
    args.channels = 16 if args.full else 4
    args.layers = 8 if args.full else 3
    args.images = 640
    print(
        f"{describe_machine('cpu')}; one thread per process, population {args.pop_size}, "
        f"{args.images} digits to train and {args.images} to validate"
    )
    columns = "{:>9} {:>23} {:>25} {:>16} {:>12} {:>12}"
    titles = ("trained images per rank", "measured images per rank", "MB per rank", "train s", "fitness s")
    print(columns.format("processes", *titles))
    ratios = {}
    for world in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            address = f"file://{folder}/meet"
            torch.multiprocessing.spawn(generation, (world, address, args, folder), nprocs=world)
            ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
        shares = []
        for name in ("trained", "measured"):
            images = [rank[name] for rank in ranks]
            shares.append(f"{min(images)} to {max(images)}")
            ratios[f"{name}_{world}"] = max(images) / sum(images)
        seconds = []
        for name in ("training seconds", "fitness seconds"):
            seconds.append(f"{max(rank[name] for rank in ranks):.2f}")
        megabytes = ranks[0]["bytes"] / 1e6
        ratios[f"megabytes_{world}"] = megabytes
        print(columns.format(world, *shares, f"{megabytes:.2f}", *seconds))
    steps = ranks[0]["steps"]
    parameters = ranks[0]["parameters"]
    print(f"all-reduced per training step: {4 * parameters / 1e6:.3f} MB ({parameters:,} gradients), {steps} steps")
    print_ratios(ratios)


if __name__ == "__main__":
    main()
