"""What a GPU would be asked to do, without one: FakeTensorMode knows devices and shapes, and computes nothing.

The backward pass does not work so. Operations that launch kernels are dispatched aten calls that neither make views nor
allocate; a `_foreach_` counts as one.
"""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fast_search
import genotypes
import model_search
import nas201.fast_search
import nas201.model_search
from model import NetworkCIFAR
from support import devices

ALLOCATIONS = ("empty", "new_empty")


class Launches(TorchDispatchMode):
    """Counts launches by name. Whatever is not on the GPU fails, and so does, by itself, waiting for a value of it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "cuda" for tensor in tensors), function
        name = function.__name__.split(".")[0]
        if function.namespace == "aten" and not function.is_view and not name.startswith(ALLOCATIONS):
            self.counts[name] += 1
        return result


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def autocast(request, monkeypatch):
    """As engine.py enters it. PyTorch switches autocast off where it finds no GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **settings: True)
    with FakeTensorMode(), torch.device("cuda"):
        yield lambda: devices.autocast(torch.device("cuda"), request.param)


def launches(function, autocast):
    """Count without the conversions to bfloat16, which autocast makes once a batch of each kernel."""
    with autocast(), Launches() as counted:
        function()
        assert ("_to_copy" in counted.counts) == torch.is_autocast_enabled("cuda")
    del counted.counts["_to_copy"]
    return counted.counts


UNREAD = {"square", "reciprocal", "rsqrt", "sub", "_foreach_pow"}  # what variances are made with
SPACES = {
    "s1": (fast_search, lambda: model_search.Network(16, 10, 8), (2, 14, 8)),
    "s2": (nas201.fast_search, lambda: nas201.model_search.Network(16, 5, 10, track_running_stats=True), (1, 6, 5)),
}


@pytest.mark.parametrize("space, most", [("s1", 3310), ("s2", 850)])
def test_training(space, most, autocast):
    fast, network, alphas = SPACES[space]
    network, x, alphas = network(), torch.randn(64, 3, 32, 32), torch.rand(alphas)
    counts = launches(lambda: fast.forward(network, x, alphas), autocast)
    assert counts.total() <= most
    assert counts["_foreach_pow"] == 1  # all standard deviations become variances at once
    assert not counts.keys() & (UNREAD - {"_foreach_pow"})


@pytest.mark.parametrize(
    "space, bn, most_shared, most",
    [
        ("s1", "batch", 250, 3070),
        ("s1", "running", 2060, 3430),
        ("s2", "batch", 100, 750),
        ("s2", "running", 1200, 430),
    ],
)
def test_fitness(space, bn, most_shared, most, autocast):
    """What the weights and a batch cost all individuals together, and what each individual costs."""
    fast, network, alphas = SPACES[space]
    network, x, alphas = network(), torch.randn(1024, 3, 32, 32), torch.rand(alphas)
    evaluators = []

    def prepare():
        evaluators.append(fast.Evaluator(network, bn))
        evaluators[0].set_batch(x)

    shared, counts = launches(prepare, autocast), launches(lambda: evaluators[0].logits(alphas), autocast)
    assert shared.total() <= most_shared and counts.total() <= most
    if bn == "batch":
        assert not (shared | counts).keys() & UNREAD


def test_retraining(autocast):
    network = NetworkCIFAR(36, 10, 20, True, genotypes.EvNASA)
    network.drop_path_prob = 0.2
    counts = launches(lambda: network(torch.randn(96, 3, 32, 32)), autocast)
    assert counts["bernoulli_"] == 1  # all of drop path at once
