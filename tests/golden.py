"""Reference figures, and the weights, images and architecture parameters they were computed on.

Everything is made from names and seeds, so that any network with the same parameter names gets the same weights.
"""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

TESTS = Path(__file__).parent
REFERENCE = json.loads((TESTS / "reference.json").read_text())
NAMES = json.loads((TESTS / "names.json").read_text())


def fill(network):
    """Set every weight and buffer of `network` from its name. Returns the network."""
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        random = np.random.RandomState(zlib.crc32(name.encode()))
        shape = tuple(tensor.shape)
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith(".weight")):
            values = random.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            values = random.normal(0, 0.1, shape)
        else:
            values = random.normal(0, 1, shape) * np.sqrt(2 / np.prod(shape[1:]))
        tensor.copy_(torch.from_numpy(values.astype(np.float32)))
    return network


def keyhash(network):
    """SHA-256 of all names, shapes and types of the state dict."""
    lines = sorted(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in network.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shapes(network):
    """The state dict as names.json lists it."""
    return {name: list(t.shape) for name, t in network.state_dict().items()}


def images(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).normal(0, 1, shape).astype(np.float32))


def seeded_alphas(seed, shape=(2, 14, 8)):
    """Raw alphas; a leading dimension is drawn from the same stream."""
    return torch.from_numpy(np.random.RandomState(seed).rand(*shape).astype(np.float32))


def assert_close(actual, expected, tolerance=1e-4):
    """Equal within `tolerance` * max(1, largest absolute expected value)."""
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    difference = (actual.detach() - expected).abs().max().item()
    assert difference <= tolerance * max(1, expected.abs().max().item())


def assert_relative(actual, expected, tolerance=1e-4):
    assert abs(actual.item() - expected) <= tolerance * abs(expected)


def assert_trajectory(network, steps, alphas, image_seed, clip, nesterov=False):
    """Train `network(x, alphas)` by SGD and compare every step; alphas: one decoded individual a step."""
    network.train()
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.025, momentum=0.9, weight_decay=3e-4, nesterov=nesterov)
    for s, (step, a) in enumerate(zip(steps, alphas, strict=True)):
        logits = network(images(image_seed + s, (8, 3, 32, 32)), a)
        loss = cross_entropy(logits, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        assert_close(logits, step["logits"], 1e-3)
        assert_relative(loss, step["loss"], 1e-3)
        assert_relative(norm, step["grad_norm"], 1e-3)
