"""What all benchmarks share: taking turns, the machine in words, ways to compute a supernet, the closing JSON line."""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from fitness import PlainEvaluator, batch_norm_mode
from support import devices
from training import make_optimizer, plain_forward, train_step

WAYS = ("plain", "channels-last", "fast", "compiled")
POPULATION = 50  # the paper's


def alternate(functions, rounds, warmup, device):
    """Call the functions of {name: function} in turn, `rounds` times after `warmup` unmeasured turns.

    Taking turns spreads a slow spell of the machine over all of them. Returns {name: median seconds}.
    """
    seconds = {name: [] for name in functions}
    for turn in range(warmup + rounds):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def recorded(step):
    """Return the step of a CUDA device as a CUDA graph."""
    step = devices.Recorded(step)
    for _ in range(3):
        step()
    return step


def describe(device):
    """Processor, cores, threads and versions in one line."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    text = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        text = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; host {text}"
    return f"{text}; torch {torch.__version__}, python {sys.version.split()[0]}"


def finish(ratios):
    """Print the ratios {name: number} as the benchmark's last line, one JSON object."""
    print(json.dumps({name: round(float(ratio), 3) for name, ratio in ratios.items()}), flush=True)


# ---- supernets of both spaces


def search_arguments(description, bn):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast, for all ways")
    parser.add_argument("--nchw", action="store_true", help="the fast path in this layout instead of channels-last")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave the compiled way out")
    parser.add_argument("--bn", choices=["batch", "running"], default=bn, help="statistics for fitness")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="the paper's sizes, multiplied out to the whole search")
    return parser


class Way:
    """One way to compute: plain (NCHW, the reference), the same channels-last, fast, or that compiled or checkpointed.

    Each has a network of its own.
    """

    def __init__(self, name, network, fast, args):
        if args.nchw:
            devices.CHANNELS_LAST = ()
        layouts = {"plain": torch.contiguous_format, "channels-last": torch.channels_last}
        self.layout = layouts.get(name, devices.memory_format(torch.device(args.device)))
        self.network = copy.deepcopy(network).to(args.device, memory_format=self.layout)
        self.args = args
        devices.set_up(torch.device(args.device))  # as the programs do
        self.forward, self.make_evaluator = plain_forward, PlainEvaluator
        if name in ("fast", "compiled", "checkpoint"):
            compile = name == "compiled"
            self.forward = partial(fast.forward, compile=compile, checkpoint=name == "checkpoint")
            self.make_evaluator = partial(fast.Evaluator, compile=compile)

    def autocast(self):
        return devices.autocast(torch.device(self.args.device), self.args.amp)

    def training_step(self, x, y, alphas, nesterov=False):
        """A function that makes one step as the search does and returns the logits."""
        x = x.contiguous(memory_format=self.layout)
        recipe = argparse.Namespace(learning_rate=0.025, momentum=0.9, weight_decay=3e-4)
        optimizer = make_optimizer(self.network.parameters(), recipe, nesterov=nesterov)

        def loss_of(x, y):
            logits = self.forward(self.network, x, alphas)
            self.logits = logits.detach()
            return F.cross_entropy(logits, y), logits

        def step():
            train_step(self.network, optimizer, loss_of, x, y, amp=self.args.amp, grad_clip=5.0)
            return self.logits.float()

        return step

    @torch.no_grad()
    def evaluator(self, x):
        """What all individuals share: an evaluator with x as its batch."""
        with batch_norm_mode(self.network, self.args.bn), self.autocast():
            evaluator = self.make_evaluator(self.network, self.args.bn)
            evaluator.set_batch(x.contiguous(memory_format=self.layout))
            return evaluator

    @torch.no_grad()
    def measure(self, evaluator, population):
        """The logits (P, B, num_classes) of each individual of a population on the evaluator's batch."""
        with batch_norm_mode(self.network, self.args.bn), self.autocast():
            return torch.stack([evaluator.logits(alphas) for alphas in population]).float()


def difference(actual, expected):
    """The largest, relative to the largest expected value if that is more than 1."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


def compare(network, fast, args, x, y, alphas, nesterov=False):
    """Seconds of a training step (64 images) and of the fitness of one of POPULATION individuals on all of x.

    Returns {key: {way: seconds}}. What the individuals share on a batch counts for fitness by its POPULATION-th part.
    Prints that, and how far the ways differ.
    """
    print(f"{describe(args.device)}\namp {args.amp}, {args.bn} statistics for fitness")
    ways = {name: Way(name, network, fast, args) for name in WAYS if args.compile or name != "compiled"}
    evaluators = {name: way.evaluator(x) for name, way in ways.items()}
    logits = {name: way.measure(evaluators[name], alphas[None]) for name, way in ways.items()}
    steps = {name: way.training_step(x[:64], y, alphas, nesterov) for name, way in ways.items()}
    trained = {name: step() for name, step in steps.items()}
    gradients = {
        name: torch.cat([p.grad.flatten() for p in way.network.parameters()]).float() for name, way in ways.items()
    }
    for name in list(ways)[1:]:
        apart = (gradients[name] - gradients["plain"]).norm() / gradients["plain"].norm()
        differences = [difference(of[name], of["plain"]) for of in (trained, logits)]
        text = "differences from plain, {}: training logits {:.1e}, fitness logits {:.1e}, gradient {:.1e} relatively"
        print(text.format(name, *differences, apart.item()))
    steps["--checkpoint"] = Way("checkpoint", network, fast, args).training_step(x[:64], y, alphas, nesterov)
    if torch.device(args.device).type == "cuda":
        steps["--cuda_graph"] = recorded(Way("fast", network, fast, args).training_step(x[:64], y, alphas, nesterov))
    seconds = {"train_step": alternate(steps, args.rounds, 1, args.device)}
    kept = seconds["train_step"]["fast"]
    for name, other in list(seconds["train_step"].items())[len(ways) :]:
        print(f"training step, batch 64, with {name}: {other:.4f} s, {other / kept:.2f} times that of fast")
    passes = {name: partial(way.measure, evaluators[name], alphas[None]) for name, way in ways.items()}
    one = alternate(passes, args.rounds, 1, args.device)
    shared = alternate({name: partial(way.evaluator, x) for name, way in ways.items()}, 2, 1, args.device)
    text = ", ".join(f"{name} {shared[name]:.4f}" for name in ("fast", "compiled") if name in shared)
    print(f"fitness, seconds of what all individuals share on a batch: {text}")
    return seconds | {"fitness": {name: one[name] + shared[name] / POPULATION for name in ways}}


def fastest(seconds):
    """Return the seconds of the fastest way that a search has, of {way: seconds}."""
    return min(seconds[name] for name in ("fast", "compiled", "--cuda_graph") if name in seconds)


def show(rows):
    """Print {name: (title, {way: number})} and what is plain / fast; returns the ratios {name: number} to both ways."""
    columns = "".join(f"{name:>14}" for name in WAYS)
    print(f"\n{'medians':58}{columns} {'plain / fast':>14} {'/ compiled':>11}")
    ratios = {}
    for name, (title, row) in rows.items():
        figures = "".join(f"{row[way]:14.4f}" if way in row else f"{'-':>14}" for way in WAYS)
        of_row = {way: row["plain"] / row[way] for way in ("fast", "compiled") if way in row}
        print(f"{title:58}{figures} " + "".join(f"{ratio:12.2f}x" for ratio in of_row.values()))
        ratios |= {name if way == "fast" else f"{name}_{way}": ratio for way, ratio in of_row.items()}
    return ratios
