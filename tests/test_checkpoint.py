"""--checkpoint: what the backward pass computes again is the same to the last bit, and little is kept for it."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import fast_search
import genotypes
import model_search
import nas201.fast_search
import nas201.model
import nas201.model_search
from model import NetworkCIFAR

from golden import fill, images, seeded_alphas

ARCH = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"


def s1():
    network, alphas = fill(model_search.Network(2, 10, 3, steps=2, multiplier=2)), seeded_alphas(1, (2, 5, 8))
    return network, lambda x, **settings: fast_search.forward(network, x, alphas.to(x.dtype), **settings)


def s2():
    network, alphas = fill(nas201.model_search.Network(2, 1, 10)), seeded_alphas(1, (1, 6, 5))
    return network, lambda x, **settings: nas201.fast_search.forward(network, x, alphas.to(x.dtype), **settings)


def retrained():
    network = fill(NetworkCIFAR(4, 10, 3, True, genotypes.EvNASA))
    network.drop_path_prob = 0.5
    return network, lambda x, **settings: sum(network(x, **settings))


def retrained_s2():
    network = fill(nas201.model.Network(2, 1, 10, ARCH))
    return network, lambda x, **settings: network(x, **settings)[0]


@pytest.mark.parametrize("make, side", [(s1, 8), (s2, 8), (retrained, 32), (retrained_s2, 8)])
def test_checkpointed_step_is_the_same_to_the_bit(make, side):
    """Logits, gradients and, moved once, running statistics, over two steps."""
    network, forward = make()
    before, results = copy.deepcopy(network.state_dict()), []
    for settings in ({}, {"checkpoint": True}):
        network.load_state_dict(before)
        torch.manual_seed(1)
        for step in range(2):
            network.zero_grad()
            logits = forward(images(step, (2, 3, side, side)), **settings)
            cross_entropy(logits, torch.arange(2)).backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        results.append({"logits": logits.detach()} | gradients | copy.deepcopy(network.state_dict()))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name
    counted = [name for name in before if name.endswith("num_batches_tracked")]
    assert all(results[1][name] == before[name] + 2 for name in counted if not name.startswith("auxiliary"))
    assert all(norm.momentum == 0.1 for norm in network.modules() if isinstance(norm, torch.nn.BatchNorm2d))


def kept_bytes(network, forward):
    """What autograd saves of a forward pass, without the parameters; each block of memory counts once."""
    parameters, blocks = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def count(tensor):
        block = tensor.untyped_storage()
        if block.data_ptr() not in parameters:
            blocks[block.data_ptr()] = block  # alive, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        forward(images(0, (1, 3, 32, 32)))
    return sum(block.nbytes() for block in blocks.values())


@pytest.mark.slow
def test_checkpointed_step_keeps_less_memory():
    """At the paper's size."""
    network, alphas = model_search.Network(16, 10, 8), seeded_alphas(1)
    plain = kept_bytes(network, lambda x: network(x, alphas))
    fast = kept_bytes(network, lambda x: fast_search.forward(network, x, alphas))
    checkpointed = kept_bytes(network, lambda x: fast_search.forward(network, x, alphas, checkpoint=True))
    assert fast <= 0.7 * plain
    assert checkpointed <= 0.25 * plain
