"""The estimate of a run's memory, compared with what networks keep and processes take, and what follows from it."""

import resource
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import fast_search
import genotypes
import memory
import nas201.fast_search
import nas201.model
import nas201.model_search
import nas201.train_search
import train
import train_search
from model import NetworkCIFAR
from model_search import Network
from nas201.genotypes import EDGES, PRIMITIVES, to_arch_string
from retrained import NetworkSettings
from support import devices
from support.files import UserError

from helpers import ARCH_WITH_DEAD_END, search_line, train_line

ROOT = Path(__file__).resolve().parents[1]
S1_EVERYTHING, S2_EVERYTHING = tuple(genotypes.PRIMITIVES) * 14, PRIMITIVES * len(EDGES)


def kept(network, forward, side):
    """The bytes an image that a forward pass keeps for the backward pass, without weights and buffers."""
    batch, own, storages = 8, set(), {}
    for tensor in (*network.parameters(), *network.buffers()):
        own.add(tensor.untyped_storage().data_ptr())

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(network, torch.randn(batch, 3, side, side))
    assert output is not None  # it holds the graph, and that the storages
    return sum(storage.nbytes() for storage in storages.values()) / batch


def assert_near(network, forward, side, estimate, factor):
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 0.75 < estimate.weights / (12 * parameters) < 1.3
    assert 1 / factor < estimate.activations / kept(network, forward, side) < factor


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("C, layers, side", [(8, 3, 16), (16, 1, 16)])
def test_estimate_of_an_s1_supernet_is_near_what_it_keeps(C, layers, side, plain):
    args = Namespace(momentum=0.9, plain=plain)
    cells = memory.s1_cells(C, layers, side**2, S1_EVERYTHING, S1_EVERYTHING)
    forward = torch.nn.Module.__call__ if plain else fast_search.forward
    network, alphas = Network(C, 10, layers), torch.zeros(2, 14, 8)
    assert_near(network, lambda net, x: forward(net, x, alphas), side, memory.supernet("s1", cells, args), 1.5)


@pytest.mark.parametrize("plain", [False, True])
def test_estimate_of_an_s2_supernet_is_near_what_it_keeps(plain):
    args = Namespace(momentum=0.9, plain=plain)
    cells = memory.s2_cells(8, 2, 16**2, S2_EVERYTHING)
    forward = torch.nn.Module.__call__ if plain else nas201.fast_search.forward
    network, alphas = nas201.model_search.Network(8, 2, 10), torch.zeros(6, 5)
    assert_near(network, lambda net, x: forward(net, x, alphas), 16, memory.supernet("s2", cells, args), 1.5)


@pytest.mark.parametrize("name", genotypes.NAMED)
def test_estimate_of_a_retrained_network_is_near_what_it_keeps(name):
    settings = NetworkSettings(genotypes.get(name), "cifar", 10, (32, 32), init_channels=8, layers=6)
    estimate = train.estimate_memory(settings, Namespace(momentum=0.9))
    network = NetworkCIFAR(8, 10, 6, False, genotypes.get(name))
    assert_near(network, lambda net, x: net(x), 32, estimate, 1.5)


def test_estimate_of_an_arch_string_is_near_what_it_keeps():
    arch = to_arch_string([3, 2, 3, 1, 4, 3])
    settings = NetworkSettings(arch, "nas201", 10, (32, 32), init_channels=16, layers=2)
    estimate = train.estimate_memory(settings, Namespace(momentum=0.9))
    network = nas201.model.Network(16, 2, 10, arch)
    assert_near(network, lambda net, x: net(x), 32, estimate, 2)


STEP = """
import re, sys, torch, memory, fast_search, genotypes, train
from argparse import Namespace
from model import NetworkCIFAR
from model_search import Network
from retrained import NetworkSettings
what, C, layers, batch, checkpoint = sys.argv[1], *map(int, sys.argv[2:])
args = Namespace(momentum=0.9, plain=False)
if what == "search":
    everything = tuple(genotypes.PRIMITIVES) * 14
    estimate = memory.supernet("s1", memory.s1_cells(C, layers, 1024, everything, everything), args)
    network, alphas = Network(C, 10, layers), torch.zeros(2, 14, 8)
    forward = lambda x: fast_search.forward(network, x, alphas, checkpoint=bool(checkpoint))
else:
    settings = NetworkSettings(genotypes.EvNASA, "cifar", 10, (32, 32), C, layers)
    estimate = train.estimate_memory(settings, args)
    network = NetworkCIFAR(C, 10, layers, False, genotypes.EvNASA)
    forward = lambda x: network(x, checkpoint=bool(checkpoint))[0]
network = network.to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
def step(batch):
    optimizer.zero_grad()
    forward(torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)).sum().backward()
    optimizer.step()
def peak():
    # In KiB. Other than getrusage, it does not count the process that this one was forked from.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
step(2)  # libraries are loaded
before = peak()
step(batch)
activations = estimate.checkpointed if checkpoint else estimate.activations
print((peak() - before) * 1024 / ((batch - 2) * activations))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, C, layers, batch, checkpoint",
    [
        ("search", 16, 8, 16, 0),
        ("search", 16, 8, 16, 1),
        ("search", 8, 3, 32, 0),
        ("retraining", 36, 20, 16, 0),
        ("retraining", 36, 20, 16, 1),
        ("retraining", 16, 6, 32, 0),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_estimate_is_near_what_a_process_takes(what, C, layers, batch, checkpoint):
    words = [what, *map(str, (C, layers, batch, checkpoint))]
    done = subprocess.run([sys.executable, "-c", STEP, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 2, done.stdout


# ---- what follows from the estimate


@pytest.fixture
def machine(monkeypatch):
    """`machine(megabytes)` says how much memory this machine has."""
    return lambda size: monkeypatch.setattr(devices, "total_memory", lambda device: size * 10**6)


SCRIPTS = [
    (train_search.main, search_line(init_channels=64, layers=8)),
    (nas201.train_search.main, ["--dataset", "digits", "--init_channels", 64, "--pop_size", 2, "--tsize", 2]),
    (train.main, train_line(init_channels=64, layers=20)),
    (train.main, train_line(arch=ARCH_WITH_DEAD_END, init_channels=64, layers=5)),
]


@pytest.mark.parametrize("main, argv", SCRIPTS, ids=["S1", "S2", "train", "arch string"])
def test_run_that_cannot_fit_is_refused(fails, machine, main, argv):
    machine(50)
    line = fails(main, argv)
    assert "0.1 GB of memory" in line
    assert all(flag in line for flag in ("--checkpoint", "--init_channels", "--batch_size"))


@pytest.mark.parametrize("pop_size", [2000, 10_000])
def test_population_that_cannot_fit_is_refused(fails, machine, pop_size):
    machine(1)
    line = fails(train_search.main, search_line(pop_size=pop_size))
    assert "--pop_size" in line
    assert "--baselines" in line


def test_images_that_cannot_fit_are_refused(fails, machine, make_images):
    machine(1)
    root = make_images("train", 4, [(30, 30)])
    line = fails(train_search.main, [*search_line(dataset="folder"), "--data", root, "--image_size", 512])
    assert "12 images of 512x512" in line
    assert "--image_size" in line


def test_network_that_cannot_be_timed_is_refused(fails, machine):
    machine(30)
    line = fails(train_search.main, search_line(max_latency=5, target_channels=256, target_layers=20))
    assert "--max_latency" in line


# With batches of 100 images: 51 MB are certain, 101 MB are the whole estimate; 11 MB with --checkpoint.
NETWORK = memory.Estimate(weights=10**6, activations=10**6, checkpointed=10**5)


@pytest.mark.parametrize("size, noted", [(60, True), (125, True), (130, False)])
def test_run_that_may_not_fit_gets_a_note(machine, capsys, size, noted):
    machine(size)
    args = Namespace(batch_size=100, amp=False, checkpoint=False)
    memory.check_training(NETWORK, args, (), torch.device("cpu"))
    assert ("0.1 GB" in capsys.readouterr().err) == noted


def test_checkpoint_makes_a_run_fit(machine, capsys):
    machine(25)
    args = Namespace(batch_size=100, amp=False, checkpoint=False)
    with pytest.raises(UserError, match="--checkpoint"):
        memory.check_training(NETWORK, args, (), torch.device("cpu"))
    args.checkpoint = True
    memory.check_training(NETWORK, args, (), torch.device("cpu"))
    assert capsys.readouterr().err == ""


def test_memory_of_this_machine_is_more_than_this_process_takes():
    total = devices.total_memory(torch.device("cpu"))
    assert type(total) is int
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < total
