"""What the networks that would be retrained cost (parameters, multiply-adds, latency), and budgets of that.

What an individual's choice on one edge costs depends on no other edge: the counts of a population are one product of
its decoded alphas with a table, exact in whole numbers. Every edge can have an operation without weights, so the rest
of the network is the smallest cost there is.
"""

import statistics
import time

import torch
from torch import nn

import memory
from genotypes import PRIMITIVES, Genotype
from model import NetworkCIFAR
from operations import OPS
from support import devices, distributed, signals
from support.files import UserError

NAMES = {"parameters_M": "M parameters", "mult_adds_M": "M mult-adds", "latency_ms": "ms"}
FLAGS = ("max_params", "max_mult_adds", "max_latency")  # in the order of NAMES
WARM_UP, REPETITIONS = 3, 10  # forward passes of one image


def cost(module, pixels):
    """Count (2,) int64: parameters, and multiply-adds of a module whose convolutions all put out so many pixels."""
    weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    parameters = sum(p.numel() for p in module.parameters())
    return torch.tensor([parameters, weights * pixels], device="cpu")  # also while modules are made without storage


def s1_table(C, layers, classes, image_shape):
    """Return what `NetworkCIFAR(C, classes, layers, False, genotype)` costs on an image (3, H, W).

    (2,) is the cost without the cells' operations, (2, 14, 8, 2) that of an operation on an edge, all cells together.
    """
    pools, concat = [("max_pool_3x3", 0), ("max_pool_3x3", 1)] * 4, [2, 3, 4, 5]
    edge_inputs = torch.tensor([j for node in range(4) for j in range(2 + node)])
    pixels, choices = image_shape[1] * image_shape[2], torch.zeros(2, len(edge_inputs), len(PRIMITIVES), 2).long()
    with torch.device("meta"):
        network = NetworkCIFAR(C, classes, layers, False, Genotype(pools, concat, pools, concat))
        modules = [OPS[name] for name in PRIMITIVES]
    fixed = cost(network.stem, pixels) + cost(network.classifier, 1)
    for cell in network.cells:
        fixed += cost(cell.preprocess0, pixels) + cost(cell.preprocess1, pixels)
        stride, C = cell._ops[0].stride, cell.channels // len(concat)
        pixels //= stride**2
        for o, make in enumerate(modules):
            with torch.device("meta"):
                first, later = cost(make(C, stride, True), pixels), cost(make(C, 1, True), pixels)
            choices[stride - 1, edge_inputs < 2, o] += first
            choices[stride - 1, edge_inputs >= 2, o] += later
    return fixed, choices


class Costs:
    """The costs of individuals, as networks that would be retrained on images (3, H, W), and the budgets of `args`."""

    def __init__(self, args, space, classes, image_shape, device):
        self.args, self.space, self.classes, self.image_shape, self.device = args, space, classes, image_shape, device
        self.fixed, self.choices = space.cost_table(args, classes, image_shape)
        self.limits = dict(zip(NAMES, (getattr(args, flag) for flag in FLAGS), strict=True))
        self.names = list(NAMES) if args.max_latency else list(NAMES)[:2]

    def check(self):
        """Raise UserError for a budget that no architecture meets, or for networks too large to be measured."""
        if self.args.max_latency:
            advice = "make the network smaller, or leave --max_latency out"
            memory.check({"the network that is timed": 4 * self.fixed[0].item()}, self.device, advice)
        for name, flag, smallest in zip(self.names, FLAGS, (self.fixed.double() / 1e6).tolist(), strict=False):
            if self.limits[name] is not None and self.limits[name] < smallest:
                least = f"the smallest network has {smallest} {NAMES[name]}"
                raise UserError(f"--{flag} {self.limits[name]:g}: no architecture meets it, {least}")

    def counts(self, alphas):
        """Return parameters and multiply-adds, (P, 2) float64 in millions, of raw alphas (P, G, E, O)."""
        chosen = self.space.encoding.decode(alphas).long()
        return (self.fixed + torch.einsum("pgeo,geoc->pc", chosen, self.choices)).double() / 1e6

    def of(self, alphas, latency):
        """Return (P, `names`) float64 of raw alphas (P, G, E, O); `latency` {cell: ms} takes up what is measured."""
        counts = self.counts(alphas)
        if "latency_ms" not in self.names:
            return counts
        cells = [self.space.cell(individual) for individual in alphas]
        for text, cell in {str(cell): cell for cell in cells}.items():
            if text not in latency:
                latency[text] = self.measure_latency(cell)
        measured = torch.tensor([[latency[str(cell)]] for cell in cells], dtype=torch.float64)
        return torch.cat([counts, measured], dim=1)

    def violation(self, amounts):
        """Return (P,) float64 of what `of` returns: by what share of each budget the costs exceed it, added up."""
        limits = torch.tensor([self.limits[name] or float("inf") for name in self.names], dtype=torch.float64)
        return (amounts / limits - 1).clamp(min=0).sum(1)

    @torch.no_grad()
    def measure_latency(self, cell):
        """Return the median time, in ms, of forward passes of one image; rank 0 measures. Raises Interrupted."""
        if signals.stop_requested(self.device):
            raise signals.Interrupted("the measurement of latency")
        median = torch.zeros(1, dtype=torch.float64)
        if distributed.rank() == 0:
            with torch.random.fork_rng(devices=[]):  # weights are drawn from the global generator
                network = self.space.network(self.args, cell, self.classes).eval()
            form = devices.memory_format(self.device)
            network = network.to(self.device, memory_format=form)
            x = torch.zeros(1, *self.image_shape, device=self.device).contiguous(memory_format=form)
            seconds = []
            for _ in range(WARM_UP + REPETITIONS):
                start = time.perf_counter()
                with devices.autocast(self.device, self.args.amp):
                    network(x)[0].sum().item()  # read, so that the device is done
                seconds.append(time.perf_counter() - start)
            median += 1000 * statistics.median(seconds[WARM_UP:])
        return distributed.sum_over_ranks(median).item()
