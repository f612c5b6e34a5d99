"""Count kernel launches of forward passes on a GPU, and the bytes that the kernels read and write.

    python benchmarks/kernels.py

The script needs no GPU. PyTorch's FakeTensorMode tracks devices and shapes, but computes nothing.
Backward passes do not work in that mode.

A launch is a dispatched aten call that neither makes a view nor only allocates memory. A
`_foreach_` call counts as one launch. We count the bytes as if each launch read its arguments and
wrote its results once. A copy or a fill does not read the tensor that it writes.
"""

import argparse
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fast_search
import model_search
import nas201.fast_search
import nas201.model_search
from benchmarks.common import print_ratios
from fitness import PlainEvaluator, batch_norm_mode
from support import devices
from training import plain_forward

ALLOCATIONS = ("empty", "new_empty")
OVERWRITING = ("copy_", "fill_", "zero_")  # their first argument is only written, as is an argument `out`
TRAINING = 64  # images per batch, as in the paper
FITNESS = 1024


class Space(NamedTuple):
    """A search space at the paper's sizes."""

    fast: ModuleType
    make_network: Callable[[], nn.Module]
    alphas: tuple[int, ...]  # shape of an individual
    bn: str  # BatchNorm statistics for fitness


SPACES = {
    "s1": Space(fast_search, lambda: model_search.Network(16, 10, 8), (2, 14, 8), "batch"),
    "s2": Space(nas201.fast_search, lambda: nas201.model_search.Network(16, 5, 10), (1, 6, 5), "running"),
}


class Launches(TorchDispatchMode):
    """Counts kernel launches by name, and the bytes that they read and write.

    Counting fails if a tensor is not on the GPU, or if a tensor's value is read.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        read = args[1:] if name in OVERWRITING else args
        read_by_name = {argument: value for argument, value in (kwargs or {}).items() if argument != "out"}
        tensors = [leaf for leaf in tree_leaves((read, read_by_name, result)) if isinstance(leaf, Tensor)]
        assert all(tensor.device.type == "cuda" for tensor in tensors), function
        if function.namespace in ("aten", "evnas") and not function.is_view and not name.startswith(ALLOCATIONS):
            self.counts[name] += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


@contextlib.contextmanager
def fake_gpu(triton: bool = False) -> Iterator[None]:
    """Within this block, create tensors on a CUDA device that does not exist.

    `triton` says whether fitness in bfloat16 uses the kernels of `triton_kernels`.
    """

    def uses_triton(x: Tensor) -> bool:
        return triton and x.dtype == torch.bfloat16

    with (
        mock.patch.object(fast_search, "uses_triton", uses_triton),
        mock.patch.object(nas201.fast_search, "uses_triton", uses_triton),
        # Without a GPU, PyTorch would switch autocast off and refuse bfloat16.
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *args, **settings: True),
        FakeTensorMode(),
        torch.device("cuda"),
    ):
        yield


def launches(function: Callable[[], object], amp: bool) -> Launches:
    """Call a function on the fake GPU, with bfloat16 autocast if `amp`, and return its launches."""
    with devices.autocast(torch.device("cuda"), amp), Launches() as counted:
        function()
    return counted


def forward_passes(space: Space, way: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (title, function) of each forward pass, for the way "plain", "fast" or "triton".

    The forward passes are training, the part of fitness that all individuals share, and the fitness
    of one individual.
    """
    forward = space.fast.forward
    make_evaluator = space.fast.Evaluator
    if way == "plain":
        forward = plain_forward
        make_evaluator = PlainEvaluator
    network = space.make_network()
    alphas = torch.rand(space.alphas)
    few = torch.randn(TRAINING, 3, 32, 32)
    many = torch.randn(FITNESS, 3, 32, 32)
    evaluators = []

    def prepare() -> None:
        evaluators.append(make_evaluator(network, space.bn))
        evaluators[0].set_batch(many)

    yield f"training, {TRAINING} images", lambda: forward(network, few, alphas)
    with torch.no_grad(), batch_norm_mode(network, space.bn):
        yield f"fitness, {FITNESS} images, shared", prepare
        yield f"fitness, {FITNESS} images, each", lambda: evaluators[0].logits(alphas)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    columns = "{:5} {:6} {:9} {:30} {:>9} {:>9}"
    print(columns.format("space", "way", "", "forward pass", "launches", "GB"), flush=True)
    bytes_of = {}
    for name, way, amp in itertools.product(SPACES, ("plain", "fast", "triton"), (False, True)):
        if way == "triton" and not amp:
            continue  # these kernels are for bfloat16
        dtype = "bfloat16" if amp else "float32"
        with fake_gpu(triton=way == "triton"):
            for title, function in forward_passes(SPACES[name], way):
                counted = launches(function, amp)
                bytes_of[name, dtype, title, way] = counted.bytes
                count = counted.counts.total()
                print(columns.format(name, way, dtype, title, count, f"{counted.bytes / 1e9:.2f}"), flush=True)
    ratios = {}
    for (name, dtype, title, way), fast_bytes in bytes_of.items():
        plain_bytes = bytes_of[name, dtype, title, "plain"]
        if way != "plain" and plain_bytes:  # the shared part of the plain path is empty and has 0 bytes
            ratios[f"{name} {way} {dtype} {title}"] = plain_bytes / fast_bytes
    print_ratios(ratios)


if __name__ == "__main__":
    main()
