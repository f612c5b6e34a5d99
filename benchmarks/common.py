"""Helpers of the benchmarks: timing, the machine's description, supernets and tables.

A "way" is one of the ways to compute a supernet, see `Way`.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fitness import PlainEvaluator, batch_norm_mode
from support import devices
from training import make_optimizer, plain_forward, train_step

WAYS = ("plain", "channels-last", "fast", "compiled")
POPULATION = 50  # individuals, as in the paper
BATCH = 64  # images of a training step, as in the paper
RECIPE = argparse.Namespace(learning_rate=0.025, momentum=0.9, weight_decay=3e-4)

Seconds = dict[str, float]  # {name of a way: seconds}


# ---- measuring


def alternate(functions: dict[str, Callable[[], object]], rounds: int, warmup: int, device: str) -> Seconds:
    """Call the functions in turn and return the median seconds of each, {name: seconds}.

    Each function is called `rounds` times, after `warmup` calls that are not timed. If the machine
    is slow for a while, taking turns spreads the delay over all functions.
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


def synchronize(device: str | torch.device) -> None:
    """Wait until a CUDA device has finished all its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def recorded(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a step that is recorded as a CUDA graph."""
    step = devices.Recorded(step)
    for _ in range(3):  # the third call records the graph
        step()
    return step


def describe_machine(device: str | torch.device) -> str:
    """Return one line with the processor, cores, threads and versions."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    text = f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        text = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; host {text}"
    return f"{text}; torch {torch.__version__}, python {sys.version.split()[0]}"


def print_ratios(ratios: dict[str, float]) -> None:
    """Print the ratios as one JSON object, which is the last line of every benchmark."""
    print(json.dumps({name: round(float(ratio), 3) for name, ratio in ratios.items()}), flush=True)


# ---- supernets of both spaces


def search_arguments(description: str, bn: str) -> argparse.ArgumentParser:
    """Return the parser for the benchmarks of both searches; `bn` is the default of --bn."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="any PyTorch device, such as cuda (default: cpu)")
    parser.add_argument("--amp", action="store_true", help="compute everything with bfloat16 autocast")
    parser.add_argument("--nchw", action="store_true", help="compute the fast path in NCHW, not in channels-last")
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="do not measure the compiled fast path, because compiling takes minutes",
    )
    parser.add_argument(
        "--bn", choices=["batch", "running"], default=bn, help=f"BatchNorm statistics for fitness (default: {bn})"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each computation is timed (default: 5)")
    parser.add_argument(
        "--full", action="store_true", help="measure fitness at batch 1,024 and estimate the time of a whole search"
    )
    return parser


class Way:
    """A way to compute a supernet, with its own copy of the network.

    "plain" is the reference in NCHW, and "channels-last" is the reference in channels-last layout.
    "fast" is the fast path. "compiled" and "checkpoint" are the fast path with --compile and with
    --checkpoint.
    """

    def __init__(self, name: str, network: nn.Module, fast: ModuleType, args: argparse.Namespace):
        if args.nchw:
            devices.CHANNELS_LAST = ()
        layouts = {"plain": torch.contiguous_format, "channels-last": torch.channels_last}
        self.layout = layouts.get(name, devices.memory_format(torch.device(args.device)))
        self.network = copy.deepcopy(network).to(args.device, memory_format=self.layout)
        self.args = args
        devices.set_up(torch.device(args.device))  # as the programs do
        self.forward = plain_forward
        self.make_evaluator = PlainEvaluator
        if name in ("fast", "compiled", "checkpoint"):
            compile = name == "compiled"
            self.forward = partial(fast.forward, compile=compile, checkpoint=name == "checkpoint")
            self.make_evaluator = partial(fast.Evaluator, compile=compile)

    def training_step(self, x: Tensor, y: Tensor, alphas: Tensor, nesterov: bool = False) -> Callable[[], Tensor]:
        """Return a function that computes a training step and returns the logits (B, classes)."""
        x = x.contiguous(memory_format=self.layout)
        optimizer = make_optimizer(self.network.parameters(), RECIPE, nesterov=nesterov)

        def loss_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.forward(self.network, x, alphas)
            self.logits = logits.detach()
            return F.cross_entropy(logits, y), logits

        def step() -> Tensor:
            train_step(self.network, optimizer, loss_of, x, y, amp=self.args.amp, grad_clip=5.0)
            return self.logits.float()

        return step

    @torch.no_grad()
    def evaluator(self, x: Tensor) -> object:
        """Return an evaluator for the batch x, after computing the part that individuals share."""
        device = torch.device(self.args.device)
        with batch_norm_mode(self.network, self.args.bn), devices.autocast(device, self.args.amp):
            evaluator = self.make_evaluator(self.network, self.args.bn)
            evaluator.set_batch(x.contiguous(memory_format=self.layout))
            return evaluator

    @torch.no_grad()
    def measure(self, evaluator: object, population: Tensor) -> Tensor:
        """Return the logits (P, B, num_classes) of a population on the evaluator's batch."""
        device = torch.device(self.args.device)
        with batch_norm_mode(self.network, self.args.bn), devices.autocast(device, self.args.amp):
            return torch.stack([evaluator.logits(alphas) for alphas in population]).float()


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, divided by the largest expected value if that is above 1."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


def compare(
    network: nn.Module,
    fast: ModuleType,
    args: argparse.Namespace,
    x: Tensor,
    y: Tensor,
    alphas: Tensor,
    nesterov: bool = False,
) -> dict[str, Seconds]:
    """Time all ways to compute a supernet, and print how far their results differ.

    Returns the seconds of "train_step" and of "fitness". "train_step" is a training step on the
    first BATCH images of x. "fitness" is the measurement of one individual on all of x. The time of
    the computation that all individuals share is divided by POPULATION and added to "fitness".
    """
    print(f"{describe_machine(args.device)}\namp {args.amp}, {args.bn} statistics for fitness")
    ways = {name: Way(name, network, fast, args) for name in WAYS if args.compile or name != "compiled"}
    evaluators = {name: way.evaluator(x) for name, way in ways.items()}
    individual = alphas[None]
    few = x[:BATCH]
    measured = {name: way.measure(evaluators[name], individual) for name, way in ways.items()}
    steps = {name: way.training_step(few, y, alphas, nesterov) for name, way in ways.items()}
    trained = {name: step() for name, step in steps.items()}
    gradients = {}
    for name, way in ways.items():
        gradients[name] = torch.cat([p.grad.flatten() for p in way.network.parameters()]).float()
    for name in list(ways)[1:]:
        of_gradient = (gradients[name] - gradients["plain"]).norm() / gradients["plain"].norm()
        print(
            f"{name} differs from plain: "
            f"training logits by {largest_difference(trained[name], trained['plain']):.1e}, "
            f"fitness logits by {largest_difference(measured[name], measured['plain']):.1e}, "
            f"gradient by {of_gradient:.1e} of its norm"
        )

    steps["--checkpoint"] = Way("checkpoint", network, fast, args).training_step(few, y, alphas, nesterov)
    if torch.device(args.device).type == "cuda":
        steps["--cuda_graph"] = recorded(Way("fast", network, fast, args).training_step(few, y, alphas, nesterov))
    train_seconds = alternate(steps, args.rounds, 1, args.device)
    for name in steps:
        if name not in ways:
            ratio = train_seconds[name] / train_seconds["fast"]
            print(f"training step with {name}: {train_seconds[name]:.4f} s, {ratio:.2f} times the time of fast")

    passes = {name: partial(way.measure, evaluators[name], individual) for name, way in ways.items()}
    one_individual = alternate(passes, args.rounds, 1, args.device)
    shared = alternate({name: partial(way.evaluator, x) for name, way in ways.items()}, 2, 1, args.device)
    text = ", ".join(f"{name} {shared[name]:.4f}" for name in ("fast", "compiled") if name in shared)
    print(f"fitness, seconds for the computation that all individuals share on a batch: {text}")
    fitness_seconds = {name: one_individual[name] + shared[name] / POPULATION for name in ways}
    return {"train_step": train_seconds, "fitness": fitness_seconds}


def fastest(seconds: Seconds) -> float:
    """Return the seconds of the fastest way that a search can use."""
    return min(seconds[name] for name in ("fast", "compiled", "--cuda_graph") if name in seconds)


def print_table(lines: dict[str, tuple[str, dict[str, float]]]) -> dict[str, float]:
    """Print a table of `lines`, {name: (title, {way: number})}, with two ratios in each line.

    The ratios are plain / fast and plain / compiled. The function returns {name: plain / fast,
    name_compiled: plain / compiled}.
    """
    columns = "".join(f"{way:>14}" for way in WAYS)
    print(f"\n{'medians':58}{columns} {'plain / fast':>14} {'/ compiled':>11}")
    ratios = {}
    for name, (title, numbers) in lines.items():
        text = f"{title:58}"
        for way in WAYS:
            text += f"{numbers[way]:14.4f}" if way in numbers else f"{'-':>14}"
        text += " "
        for way, key in (("fast", name), ("compiled", f"{name}_compiled")):
            if way in numbers:
                ratios[key] = numbers["plain"] / numbers[way]
                text += f"{ratios[key]:12.2f}x"
        print(text)
    return ratios
