"""Fitness: the accuracy of each individual on the validation images.

All individuals are measured with the same shared weights.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from support import devices, distributed, signals
from support.clock import Clock, EveryMinute, Work
from support.files import UserError
from training import TRAIN_AGAIN

FEWEST_RECORDED = 4  # individuals for which a pass is recorded as a CUDA graph


class Distinct(NamedTuple):
    """The distinct individuals of a population (P, ...).

    `population[first]` holds each distinct individual once. `population[first][number]` equals the
    population.
    """

    first: list[int]  # (D,) position at which each distinct individual appears first, ascending
    number: list[int]  # (P,) which of the D distinct individuals each individual equals


def unique(alphas: torch.Tensor) -> Distinct:
    """Find the distinct individuals of a population (P, ...) on the CPU.

    Two individuals are equal if all their bits are equal.
    """
    numbers: dict[bytes, int] = {}
    first = []
    number = []
    for position, individual in enumerate(alphas.contiguous()):
        content = individual.numpy().tobytes()
        if content not in numbers:
            numbers[content] = len(first)
            first.append(position)
        number.append(numbers[content])
    return Distinct(first, number)


@contextlib.contextmanager
def batch_norm_mode(network: nn.Module, statistics: str) -> Iterator[None]:
    """Within this context, every BatchNorm uses "batch" or "running" statistics. No buffer changes.

    In train mode without `track_running_stats`, a BatchNorm uses batch statistics and updates
    nothing.
    """
    training = network.training
    tracking = [module for module in network.modules() if getattr(module, "track_running_stats", False)]
    network.train(statistics == "batch")
    try:
        for norm in tracking:
            norm.track_running_stats = statistics == "running"
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
        network.train(training)


class PlainEvaluator:
    """Computes the logits of individuals with the reference network.

    `fast_search.Evaluator` has the same interface and is faster. An evaluator first takes a batch
    of images, and then returns the logits of one individual after the other. The argument
    `statistics` is not used here, because `batch_norm_mode` has already selected the BatchNorm
    statistics.
    """

    def __init__(self, network: nn.Module, statistics: str):
        self.network = network

    def set_batch(self, x: torch.Tensor) -> None:
        """Take the images x (B, 3, H, W)."""
        self.x = x

    def logits(self, alphas: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, classes) of one individual (G, E, O)."""
        return self.network(self.x, alphas)


@torch.no_grad()
def measure_fitness(
    network: nn.Module,
    alphas: torch.Tensor,
    loader: Iterable,
    statistics: str,
    make_evaluator: Callable = PlainEvaluator,
    *,
    amp: bool = False,
    cuda_graph: bool = False,
    where: str = "fitness",
    clock: Clock | None = None,
) -> torch.Tensor:
    """Return the top-1 accuracy in percent, float64 (P,), of `alphas` (P, G, E, O).

    `statistics` says which BatchNorm statistics are used, "batch" or "running". Each batch is
    loaded and augmented once and shown to all individuals, so they are compared on the same images.
    Equal alphas are measured once. Several processes divide the individuals among themselves, and
    each process returns the fitness of all individuals. With `cuda_graph`, a GPU records the pass
    of an individual once per batch and replays it for the others. `clock` counts individuals times
    batches as "fitness".

    Raises Interrupted between two batches after a signal. Raises UserError, in every process, if an
    individual has logits that are not finite.
    """
    device = next(network.parameters()).device
    distinct = unique(alphas)
    individuals = alphas[distinct.first].to(device)  # (D, G, E, O)
    correct = torch.zeros(len(individuals), dtype=torch.int64, device=device)
    broken = torch.zeros(len(individuals), dtype=torch.int64, device=device)  # batches with logits that are not finite
    share = range(distributed.rank(), len(individuals), distributed.world_size())
    minute = EveryMinute()
    clock = clock or Clock(fitness=Work(left=len(share) * len(loader)))
    clock.start()
    bar = distributed.progress(loader, where, units=len(share))
    recording = cuda_graph and devices.can_record(device) and len(share) >= FEWEST_RECORDED
    warm = set()  # shapes of batches that have been computed without a graph
    with batch_norm_mode(network, statistics):
        evaluator = make_evaluator(network, statistics)
        for batch, (x, y) in enumerate(bar):
            if signals.stop_requested(device):
                raise signals.Interrupted(where)
            with devices.autocast(device, amp):
                evaluator.set_batch(x)
                logits_of = evaluator.logits
                if recording:
                    logits_of = devices.Recorded(evaluator.logits, warm_up=0 if x.shape in warm else 2)
                    warm.add(x.shape)
                for count, i in enumerate(share, start=batch * len(share) + 1):
                    logits = logits_of(individuals[i])
                    correct[i] += (logits.argmax(1) == y).sum()
                    broken[i] += ~logits.isfinite().all()
                    clock.add("fitness", 1)
                    if not bar.disable:
                        bar.set_postfix_str(clock.text(), refresh=False)
                        bar.update()
                    elif minute.due():
                        total = len(share) * len(loader)
                        distributed.say(f"{where}: {count} of {total} measurements; {clock.text()}")
    correct, broken = distributed.sum_over_ranks(torch.stack([correct, broken])).cpu()
    clock.add("fitness", 0)  # the time that a GPU has taken since the last individual was given to it
    if broken.any():
        position = distinct.first[broken.nonzero()[0].item()]
        individual = f"individual {position + 1} of {len(alphas)}"
        raise UserError(f"{where}: {individual} has logits that are not finite; {TRAIN_AGAIN}")
    accuracy = 100 * correct.double() / loader.size  # (D,)
    return accuracy[distinct.number]
