"""What a GPU would be asked to do by a forward pass, counted without one: kernels, and the bytes they read and write.

    python benchmarks/kernels.py

FakeTensorMode knows devices and shapes, and computes nothing; the backward pass does not work so. Operations that
launch kernels are dispatched aten calls that neither make views nor allocate; a `_foreach_` counts as one. Each reads
its arguments and writes its results once. The time is a model's, not measured: the bytes at an H100's 3.35 TB/s, or the
launches at 4 microseconds each, whichever takes longer.
"""

import contextlib
import itertools
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fast_search
import model_search
import nas201.fast_search
import nas201.model_search
from benchmarks.common import finish
from fitness import PlainEvaluator, batch_norm_mode
from support import devices
from training import plain_forward

ALLOCATIONS = ("empty", "new_empty")
BYTES_A_SECOND, SECONDS_A_LAUNCH = 3.35e12, 4e-6  # an H100's memory (NVIDIA's data sheet); a usual figure for CUDA
TRAINING, FITNESS = 64, 1024  # images a batch, as in the paper
# How the two spaces compute, and their networks at the paper's sizes with the shape of alphas.
SPACES = {
    "s1": (fast_search, lambda: model_search.Network(16, 10, 8), (2, 14, 8), "batch"),
    "s2": (nas201.fast_search, lambda: nas201.model_search.Network(16, 5, 10), (1, 6, 5), "running"),
}


class Launches(TorchDispatchMode):
    """Counts launches by name, and bytes. Whatever is not on the GPU fails, as does waiting for a value of it."""

    def __init__(self):
        super().__init__()
        self.counts, self.bytes = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        read, written = (
            [leaf for leaf in tree_leaves(of) if isinstance(leaf, torch.Tensor)] for of in ((args, kwargs), result)
        )
        assert all(tensor.device.type == "cuda" for tensor in read + written), function
        name = function.__name__.split(".")[0]
        if function.namespace == "aten" and not function.is_view and not name.startswith(ALLOCATIONS):
            self.counts[name] += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in read + written)
        return result


@contextlib.contextmanager
def fake_gpu():
    """Have tensors be made on a CUDA device that is not there. PyTorch would switch autocast off without one."""
    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *args, **settings: True),
        FakeTensorMode(),
        torch.device("cuda"),
    ):
        yield


def launches(function, amp):
    """Call the function on the fake GPU, in bfloat16 with `amp`, and return the Launches."""
    with devices.autocast(torch.device("cuda"), amp), Launches() as counted:
        function()
    return counted


def passes(space, way):
    """Yield (title, function): a forward pass in training, what all individuals share in fitness, and an individual.

    `way` is "plain" or "fast"; fitness is measured with the space's own statistics, on one batch.
    """
    fast, network, shape, bn = SPACES[space]
    forward, make_evaluator = (plain_forward, PlainEvaluator) if way == "plain" else (fast.forward, fast.Evaluator)
    network, alphas, evaluators = network(), torch.rand(shape), []
    few, many = (torch.randn(images, 3, 32, 32) for images in (TRAINING, FITNESS))

    def prepare():
        evaluators.append(make_evaluator(network, bn))
        evaluators[0].set_batch(many)

    yield f"training, {TRAINING} images", lambda: forward(network, few, alphas)
    with torch.no_grad(), batch_norm_mode(network, bn):
        yield f"fitness, {FITNESS} images, shared", prepare
        yield f"fitness, {FITNESS} images, each", lambda: evaluators[0].logits(alphas)


def main():
    columns = "{:5} {:6} {:9} {:30} {:>9} {:>9} {:>12} {:>11} {:>12}"
    words = ("space", "way", "", "forward pass", "launches", "GB", "launches ms", "traffic ms", "at least ms")
    print(columns.format(*words), flush=True)
    least, ratios = {}, {}
    for space, way, amp in itertools.product(SPACES, ("plain", "fast"), (False, True)):
        dtype = "bfloat16" if amp else "float32"
        with fake_gpu():
            for title, function in passes(space, way):
                counted = launches(function, amp)
                count = counted.counts.total()
                seconds = count * SECONDS_A_LAUNCH, counted.bytes / BYTES_A_SECOND
                least[space, dtype, title, way] = max(seconds)
                figures = [f"{counted.bytes / 1e9:.2f}"] + [f"{1e3 * value:.1f}" for value in (*seconds, max(seconds))]
                print(columns.format(space, way, dtype, title, count, *figures), flush=True)
    for (*key, way), seconds in least.items():
        if way == "plain" and seconds:
            ratios[" ".join(key)] = seconds / least[(*key, "fast")]
    finish(ratios)


if __name__ == "__main__":
    main()
