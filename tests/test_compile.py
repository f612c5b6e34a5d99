"""--compile: the compiled cells compute the same, and equal cells share a graph.

Some tests have a backend that returns each graph as it is; in the others it is inductor.
"""

import copy
import re
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

import fast_ops
import fast_search
import genotypes
import model_search
import nas201.fast_search
import nas201.model
import nas201.model_search
import train
from model import NetworkCIFAR
from support import devices

from golden import assert_close, fill, images, seeded_alphas
from helpers import history, retrain, train_line


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were made so far."""
    made, compile = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile(function, backend=backend, **settings))
    start_anew()
    yield made
    start_anew()


def start_anew():
    torch._dynamo.reset()
    devices.compiled.cache_clear()


def s1(nodes):
    """Every kind of cell, one of them twice."""
    network = fill(model_search.Network(2, 10, 6, steps=nodes, multiplier=nodes))
    return fast_search, network, images(3, (4, 3, 8, 8)), seeded_alphas(1, (2, nodes * (nodes + 3) // 2, 8))


def s2(nodes):
    network = fill(nas201.model_search.Network(2, 2, 10, track_running_stats=True))
    return nas201.fast_search, network, images(3, (4, 3, 8, 8)), seeded_alphas(1, (1, 6, 5))


WAYS = ({}, {"compile": True}, {"compile": True, "checkpoint": True})


def all_ways(fast, network, x, alphas):
    """Logits, gradients, buffers of a training step and logits of the fitness, not compiled and compiled."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for settings in WAYS:
        network.load_state_dict(before)
        network.zero_grad()
        logits = fast.forward(network, x, alphas, **settings)
        cross_entropy(logits, torch.arange(len(x))).backward()
        results = [logits.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])]
        results += [buffer.double() for buffer in network.buffers()]
        for bn in ("batch", "running"):
            evaluator = fast.Evaluator(network, bn, compile="compile" in settings)
            evaluator.set_batch(x)
            results.append(evaluator.logits(alphas))
        yield results


def assert_equal_ways(tolerance, *supernet):
    eager, *others = all_ways(*supernet)
    for results in others:
        for actual, expected in zip(results, eager, strict=True):
            assert_close(actual, expected, tolerance)


@pytest.mark.parametrize(
    "supernet, nodes, kernels, count",
    [
        pytest.param(s2, 1, "gpu", 3 + 3 + 3, marks=pytest.mark.slow),
        pytest.param(s1, 1, "gpu", 5 + 5 + 5 + 1, marks=pytest.mark.slow),
        pytest.param(s1, 2, "cpu", 5 + 6 + 6, marks=pytest.mark.slow),
        pytest.param(s2, 2, "cpu", 3 + 3 + 3, marks=pytest.mark.slow),
    ],
    indirect=["kernels"],
)
def test_compiled_supernets_equal_the_eager_ones_as_graphs(supernet, nodes, kernels, count, graphs):
    """As many graphs as kinds of cells, for each of training and fitness with either statistics.

    In fitness the rest of S1's first cell, behind what all individuals share, is a kind of its own. With one node it
    is the same with either statistics.
    """
    fast, *inputs = supernet(nodes)
    assert_equal_ways(1e-8, fast, *(thing.double() for thing in inputs))  # statistics are summed up in another order
    assert len(graphs) == count


@pytest.mark.slow
@pytest.mark.parametrize("supernet", [s1, s2])
@pytest.mark.parametrize("kernels", ["gpu", "cpu"], indirect=True)
def test_compiled_supernets_equal_the_eager_ones_with_inductor(supernet, kernels):
    """In float64, where no rounding flips a ReLU."""
    start_anew()
    fast, *inputs = supernet(nodes=1)
    assert_equal_ways(1e-8, fast, *(thing.double() for thing in inputs))


def retrained(network):
    """Logits, gradients and buffers of a retrained network's training step in all ways, with drop path."""
    network, x = fill(network), images(3, (4, 3, 8, 8))
    network.drop_path_prob = 0.5
    before = copy.deepcopy(network.state_dict())
    for settings in WAYS:
        torch.manual_seed(1)
        network.load_state_dict(before)
        network.zero_grad()
        logits, _ = network(x, **settings)
        cross_entropy(logits, torch.arange(4)).backward()
        buffers = torch.cat([buffer.flatten() for buffer in network.buffers()])
        yield logits.detach(), torch.cat([p.grad.flatten() for p in network.parameters()]), buffers


def of_genotype():
    return NetworkCIFAR(4, 10, 3, False, genotypes.EvNASA)


def of_arch_string():
    """Two equal cells in each of three stages."""
    arch = "|nor_conv_3x3~0|+|avg_pool_3x3~0|nor_conv_1x1~1|+|none~0|skip_connect~1|nor_conv_3x3~2|"
    return nas201.model.Network(4, 2, 10, arch)


@pytest.mark.slow
@pytest.mark.parametrize("make", [of_genotype, of_arch_string])
def test_compiled_retrained_network_equals_the_eager_one_as_graphs(graphs, make):
    eager, *others = retrained(make())
    for results in others:
        for actual, expected in zip(results, eager, strict=True):
            assert_close(actual, expected, 1e-6)
    assert len(graphs) == 3 + 3  # computing again is a graph of its own


@pytest.mark.slow
def test_compiled_retrained_network_equals_the_eager_one_with_inductor():
    start_anew()
    eager, *others = retrained(of_genotype())
    for results in others:
        for actual, expected, tolerance in zip(results, eager, (1e-4, 1e-3, 1e-4), strict=True):
            assert_close(actual, expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_statistics_of_many_pixels_are_precise(gradients):
    """262,144 values a channel, summed up in float32."""
    start_anew()
    x = images(0, (256, 16, 32, 32)).add_(3).contiguous(memory_format=torch.channels_last).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        _, mean, inverse_std = devices.compiled(fast_ops.batch_norm_stats)(x, torch.ones(16), torch.zeros(16), 1e-5)
    var, exact_mean = torch.var_mean(x.detach().double(), (0, 2, 3), correction=0)
    assert_close(mean.double(), exact_mean, 1e-6)
    assert_close(inverse_std.double(), (var + 1e-5).rsqrt(), 1e-6)


@pytest.mark.slow
def test_retraining_makes_one_graph_per_kind_of_cell(tmp_path, monkeypatch, graphs):
    """EvNAS-A at the paper's depth; each epoch has another drop path, a last, smaller batch, and a test."""
    monkeypatch.setattr(devices, "has_compiler", lambda: True)  # these graphs need none
    sizes = dict(layers=20, init_channels=2, epochs=4, drop_path_prob=0.2, train_samples=80, batch_size=60)
    assert len(history(retrain(tmp_path, "--compile", arch="EvNASA", **sizes))) == 4
    assert len(graphs) == 9


def test_compiled_concatenate_equals_cat(graphs):
    for gradients in (True, False):
        x = images(0, (2, 3, 4, 4)).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            y = devices.compiled(lambda *tensors: fast_ops.concatenate(tensors))(x, x + 1)
        assert torch.equal(y, torch.cat([x, x + 1], dim=1))


def test_cpu_without_a_compiler_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as error:
        retrain(tmp_path, "--compile", epochs=1)
    assert error.value.code == 2
    assert "C++ compiler" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_broken_compiler_is_found_before_there_is_a_run(tmp_path, monkeypatch):
    """The self-check finds it before there is a run. A run that began without the check goes on with --no-compile."""
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, train.__file__, *train_line("--compile", dir=tmp_path, epochs=1)]
    for flags, runs_made in (([], 0), (["--no-self_check"], 1)):
        begun = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert begun.returncode == 2
        assert re.fullmatch(r"error: .*--no-compile.*\n", begun.stderr)
        assert len(list(tmp_path.glob("eval-*"))) == runs_made
    (run,) = tmp_path.glob("eval-*")
    train.main(["--resume", str(run), "--no-compile"])
    assert len(history(run)) == 1
