"""What a retrained network would cost (parameters, mult-adds, latency), and the budgets for it.

The cost of an operation on one edge does not depend on the other edges. So one product of the
decoded alphas and a cost table gives the parameters and mult-adds of a whole population, exactly,
in integers. Every edge can have an operation that costs nothing. So the smallest possible cost is
that of the other parts of the network, such as stem and classifier.
"""

import argparse
import functools
import statistics
import time
from typing import NamedTuple

import torch
from torch import nn

import memory
from genotypes import PRIMITIVES, Genotype
from model import NetworkCIFAR
from operations import OPS
from support import devices, distributed, signals
from support.files import UserError

# How latency is measured: forward passes of one image.
WARM_UP = 3  # forward passes before the first one that counts
REPETITIONS = 10  # forward passes that count


class Cost(NamedTuple):
    """One kind of cost. `--FLAG` sets a budget for it."""

    name: str  # its field in the history, in pareto.json and in baselines.json
    flag: str
    unit: str  # written after the number in messages
    axis: str  # label of a chart's axis
    help: str  # help text of the flag


PARAMETERS = Cost(
    name="parameters_M",
    flag="max_params",
    unit="M parameters",
    axis="parameters, M",
    help="parameter budget for the retrained network, in millions",
)
MULT_ADDS = Cost(
    name="mult_adds_M",
    flag="max_mult_adds",
    unit="M mult-adds",
    axis="mult-adds, M",
    help="mult-adds budget for the retrained network, in millions per image",
)
LATENCY = Cost(
    name="latency_ms",
    flag="max_latency",
    unit="ms",
    axis="latency, ms",
    help="latency budget for the retrained network, in ms; latency is the median time of "
    f"{REPETITIONS} forward passes of one image, on the device and with the number of threads of this run",
)
COSTS = (PARAMETERS, MULT_ADDS, LATENCY)
COUNTED = (PARAMETERS, MULT_ADDS)  # the columns of a cost table; latency has to be measured


def count(module: nn.Module, pixels: int) -> torch.Tensor:
    """Count the parameters and mult-adds of a module; returns int64 [parameters, mult-adds].

    The output of every convolution in the module has `pixels` pixels.
    """
    weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    parameters = sum(p.numel() for p in module.parameters())
    return torch.tensor([parameters, weights * pixels], device="cpu")  # even within torch.device("meta")


@functools.cache  # the table needs the same few operations for most cells
def operation_cost(name: str, C: int, stride: int, pixels: int) -> torch.Tensor:
    """Count an operation of the DARTS space with C channels and `pixels` output pixels; see `count`."""
    with torch.device("meta"):
        return count(OPS[name](C, stride, True), pixels)


def s1_table(C: int, layers: int, classes: int, image_shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cost table of `NetworkCIFAR(C, classes, layers, False, genotype)` for images (3, H, W).

    The table is two int64 tensors, and the last axis of both is [parameters, mult-adds]:
    - (2,): the cost of the network without the operations in its cells;
    - (2, 14, 8, 2): the cost of each operation on each edge of a normal and of a reduction cell,
      added up over all cells of that kind.
    """
    pools = [("max_pool_3x3", 0), ("max_pool_3x3", 1)] * 4  # operations without weights
    concat = [2, 3, 4, 5]
    edge_inputs = torch.tensor([j for node in range(4) for j in range(2 + node)])  # (14,)
    pixels = image_shape[1] * image_shape[2]
    choices = torch.zeros(2, len(edge_inputs), len(PRIMITIVES), 2, dtype=torch.int64)
    with torch.device("meta"):
        network = NetworkCIFAR(C, classes, layers, False, Genotype(pools, concat, pools, concat))
    fixed = count(network.stem, pixels) + count(network.classifier, 1)
    for cell in network.cells:
        fixed += count(cell.preprocess0, pixels) + count(cell.preprocess1, pixels)
        stride = cell._ops[0].stride  # stride of the edges from the cell's two inputs: 2 in a reduction cell, else 1
        C = cell.channels // len(concat)
        pixels //= stride**2
        for o, name in enumerate(PRIMITIVES):
            choices[stride - 1, edge_inputs < 2, o] += operation_cost(name, C, stride, pixels)
            choices[stride - 1, edge_inputs >= 2, o] += operation_cost(name, C, 1, pixels)
    return fixed, choices


class Costs:
    """What the networks of individuals will cost when they are retrained, and the budgets for these costs.

    The networks take images of `image_shape` (3, H, W). `space` is a search_space.SearchSpace.

    `measured` lists the kinds of cost that this search measures. It includes latency only if
    latency has a budget. `limits` maps the name of each cost to its budget, or to None if it has no
    budget.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        space: object,
        classes: int,
        image_shape: tuple[int, int, int],
        device: torch.device,
    ):
        self.args = args
        self.space = space
        self.classes = classes
        self.image_shape = image_shape
        self.device = device
        self.fixed, self.choices = space.cost_table(args, classes, image_shape)
        self.limits = {cost.name: getattr(args, cost.flag) for cost in COSTS}
        self.measured = COSTS if args.max_latency else COUNTED

    @property
    def names(self) -> list[str]:
        """The names of the costs in `measured`, in the order of the columns that `amounts` returns."""
        return [cost.name for cost in self.measured]

    def check(self) -> None:
        """Raise UserError for a budget that no architecture meets, or a network that is too large to time."""
        if self.args.max_latency:
            advice = "make the network smaller, or leave --max_latency out"
            memory.check({"the network that is timed": 4 * self.fixed[0].item()}, self.device, advice)
        for cost, smallest in zip(COUNTED, (self.fixed.double() / 1e6).tolist(), strict=True):
            limit = self.limits[cost.name]
            if limit is not None and limit < smallest:
                raise UserError(
                    f"--{cost.flag} {limit:g}: no architecture meets this budget, because the smallest network has "
                    f"{smallest} {cost.unit}; give a larger budget"
                )

    def counts(self, alphas: torch.Tensor) -> torch.Tensor:
        """Return parameters and mult-adds in millions, float64 (P, 2), of raw alphas (P, G, E, O)."""
        chosen = self.space.encoding.decode(alphas).long()  # (P, G, E, O), 1 for the operations in the network, else 0
        return (self.fixed + torch.einsum("pgeo,geoc->pc", chosen, self.choices)).double() / 1e6

    def amounts(self, alphas: torch.Tensor, latency: dict[str, float]) -> torch.Tensor:
        """Return the costs of raw alphas (P, G, E, O), float64 (P, len(names)).

        `latency` maps cells to milliseconds. Cells that are missing from `latency` are measured and
        added to it. Raises Interrupted after a signal.
        """
        counts = self.counts(alphas)
        if LATENCY not in self.measured:
            return counts
        cells = [self.space.cell(individual) for individual in alphas]
        for cell in cells:
            if str(cell) not in latency:
                latency[str(cell)] = self.measure_latency(cell)
        milliseconds = torch.tensor([[latency[str(cell)]] for cell in cells], dtype=torch.float64)  # (P, 1)
        return torch.cat([counts, milliseconds], dim=1)

    def violation(self, amounts: torch.Tensor) -> torch.Tensor:
        """Return the violation of the budgets, float64 (P,); 0 means that all budgets are met.

        `amounts` is what the method `amounts` returns. The violation adds up, over all budgets, the
        share by which the cost exceeds the budget: cost / budget - 1.
        """
        limits = torch.tensor([self.limits[name] or float("inf") for name in self.names], dtype=torch.float64)
        return (amounts / limits - 1).clamp(min=0).sum(1)

    @torch.no_grad()
    def measure_latency(self, cell: object) -> float:
        """Return the median time, in ms, of forward passes of one image.

        Rank 0 measures, and all processes get its result. Raises Interrupted after a signal.
        """
        if signals.stop_requested(self.device):
            raise signals.Interrupted("the measurement of latency")
        median = torch.zeros(1, dtype=torch.float64)
        if distributed.rank() == 0:
            with torch.random.fork_rng(devices=[]):  # a new network draws its weights from the global generator
                network = self.space.network(self.args, cell, self.classes).eval()
            form = devices.memory_format(self.device)
            network = network.to(self.device, memory_format=form)
            x = torch.zeros(1, *self.image_shape, device=self.device).contiguous(memory_format=form)
            seconds = []
            for _ in range(WARM_UP + REPETITIONS):
                start = time.perf_counter()
                with devices.autocast(self.device, self.args.amp):
                    network(x)[0].sum().item()  # reading the number waits for the device
                seconds.append(time.perf_counter() - start)
            median += 1000 * statistics.median(seconds[WARM_UP:])
        return distributed.sum_over_ranks(median).item()
