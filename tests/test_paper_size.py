"""The fast, compiled and plain forms are equal at the paper's sizes too, in float32 and bfloat16. All slow.

In a network of this depth rounding flips a ReLU now and then, so gradients are compared by kind of operation, as norms.
In bfloat16 a form may be as far from the plain one in float32 as the plain one in bfloat16 is, and half as far again.
"""

import functools

import pytest
import torch
from torch.nn import functional as F

import fast_search
import genotypes
import nas201.encoding
import nas201.fast_search
import nas201.model_search
from encoding import decode, random_alphas
from model import NetworkCIFAR
from model_search import Network
from support import devices
from support.self_check import training_step
from training import plain_forward

IMAGES, SHAPE, CLASSES = 64, (3, 32, 32), 10
FLOAT32 = 0.02  # of a norm


def has_fast_bfloat16() -> bool:
    return torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


needs_bfloat16 = pytest.mark.skipif(not has_fast_bfloat16(), reason="bfloat16 or compiling would take an hour here")
pytestmark = pytest.mark.slow


@functools.cache
def subject(name):
    """Return (network, loss): loss(network, x, y, compile, fast) as the scripts compute it."""
    torch.manual_seed(18)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "retraining":
        network = NetworkCIFAR(36, CLASSES, 20, False, genotypes.EvNASA)

        def loss(network, x, y, compile, fast):
            return F.cross_entropy(network(x, compile=compile)[0], y)
    else:
        if name == "s1":
            network, alphas, space = Network(16, CLASSES, 8), decode(random_alphas(1))[0], fast_search
        else:
            network, space = nas201.model_search.Network(16, 5, CLASSES), nas201.fast_search
            alphas = nas201.encoding.decode(nas201.encoding.random_alphas(1))[0]
        alphas = alphas.to(device)

        def loss(network, x, y, compile, fast):
            forward = functools.partial(space.forward, compile=compile) if fast else plain_forward
            return F.cross_entropy(forward(network, x, alphas), y)

    return network.to(device, memory_format=devices.memory_format(device)), loss


@functools.cache
def step(name, amp, compile, fast):
    network, loss = subject(name)
    generator = torch.Generator().manual_seed(0)
    return training_step(network, functools.partial(loss, fast=fast), IMAGES, SHAPE, CLASSES, amp, compile, generator)


@pytest.mark.parametrize(
    "name, amp, compile",
    [
        pytest.param("s1", False, False, id="s1-float32"),
        pytest.param("s2", False, False, id="s2-float32"),
        pytest.param("s2", False, True, id="s2-float32-compiled"),
        pytest.param("retraining", False, True, id="retraining-float32-compiled", marks=needs_bfloat16),
        pytest.param("s1", True, False, id="s1-bfloat16", marks=needs_bfloat16),
        pytest.param("s2", True, False, id="s2-bfloat16", marks=needs_bfloat16),
        pytest.param("s1", False, True, id="s1-float32-compiled", marks=needs_bfloat16),
        pytest.param("s1", True, True, id="s1-bfloat16-compiled", marks=needs_bfloat16),
        pytest.param("s2", True, True, id="s2-bfloat16-compiled", marks=needs_bfloat16),
        pytest.param("retraining", True, True, id="retraining-bfloat16-compiled", marks=needs_bfloat16),
    ],
)
def test_step_equals_that_of_the_plain_network(name, amp, compile):
    value, expected = step(name, False, False, False)
    found_value, found = step(name, amp, compile, True)
    _, plain = step(name, amp, False, False)
    assert found_value == pytest.approx(value, rel=0.05 if amp else 1e-5)
    for kind in expected:
        norm = expected[kind].norm()
        allowed = 1.5 * (plain[kind] - expected[kind]).norm() / norm if amp else 0
        assert (found[kind] - expected[kind]).norm() / norm <= allowed + FLOAT32, kind
