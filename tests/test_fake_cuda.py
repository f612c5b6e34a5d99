"""Kernels that a forward pass launches on a GPU, counted without one: see benchmarks/kernels.py."""

import pytest
import torch

import genotypes
from benchmarks import kernels
from model import NetworkCIFAR

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="PyTorch 2.6 looks for the device behind a fake tensor"
)
UNREAD = {"square", "reciprocal", "rsqrt", "sub", "_foreach_pow"}  # kernels that compute variances


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bfloat16"])
def amp(request):
    with kernels.fake_gpu():
        yield request.param


def launches(function, amp):
    """Return the counts without the conversions to bfloat16, which autocast makes once per batch."""
    counts = kernels.launches(function, amp).counts
    assert ("_to_copy" in counts) == amp
    del counts["_to_copy"]
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("space, most", [("s1", 3440), ("s2", 850)])
def test_training_launches_few_kernels(space, most, amp):
    fast = kernels.SPACES[space].fast
    network = kernels.SPACES[space].make_network()
    alphas = torch.rand(kernels.SPACES[space].alphas)
    x = torch.randn(64, 3, 32, 32)
    counts = launches(lambda: fast.forward(network, x, alphas), amp)
    assert counts.total() <= most
    assert counts["_foreach_pow"] == 1  # all standard deviations become variances at once
    assert not counts.keys() & (UNREAD - {"_foreach_pow"})


@pytest.mark.parametrize(
    "space, bn, most_shared, most",
    [
        pytest.param("s1", "batch", 420, 3090, marks=pytest.mark.slow),
        pytest.param("s1", "running", 2240, 3450, marks=pytest.mark.slow),
        pytest.param("s2", "batch", 100, 750, marks=pytest.mark.slow),
        pytest.param("s2", "running", 1200, 430, marks=pytest.mark.slow),
    ],
)
def test_fitness_launches_few_kernels(space, bn, most_shared, most, amp):
    """Count what all individuals share on a batch, and what each individual needs besides."""
    fast = kernels.SPACES[space].fast
    network = kernels.SPACES[space].make_network()
    alphas = torch.rand(kernels.SPACES[space].alphas)
    x = torch.randn(1024, 3, 32, 32)
    evaluators = []

    def prepare():
        evaluators.append(fast.Evaluator(network, bn))
        evaluators[0].set_batch(x)

    shared, counts = launches(prepare, amp), launches(lambda: evaluators[0].logits(alphas), amp)
    assert shared.total() <= most_shared
    assert counts.total() <= most
    if bn == "batch":
        assert not (shared | counts).keys() & UNREAD


@pytest.mark.slow
@pytest.mark.parametrize("space, most", [("s1", 53), ("s2", 10)])
def test_triton_kernels_save_memory_traffic(space, most):
    """In GB for an individual in bfloat16 on 1,024 images. PyTorch's kernels need 119 and 21."""
    with kernels.fake_gpu(triton=True):
        passes = dict(kernels.forward_passes(kernels.SPACES[space], "triton"))
        kernels.launches(passes["fitness, 1024 images, shared"], amp=True)
        counted = kernels.launches(passes["fitness, 1024 images, each"], amp=True)
    assert counted.bytes <= most * 1e9
    assert counted.counts["separable" if space == "s1" else "with_border"] > 40


def test_retraining_draws_drop_path_once(amp):
    network = NetworkCIFAR(4, 10, 3, True, genotypes.EvNASA)
    network.drop_path_prob = 0.2
    counts = launches(lambda: network(torch.randn(96, 3, 32, 32)), amp)
    assert counts["bernoulli_"] == 1  # all of drop path at once
