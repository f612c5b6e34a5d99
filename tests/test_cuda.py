"""On a GPU (`make test-gpu`): the fast path is the plain one, also compiled and under autocast; resume, NCCL.

tests/test_fake_cuda.py needs no GPU.
"""

import argparse
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import fast_search
import model_search
import nas201.encoding
import nas201.fast_search
import nas201.model_search
import train_search
from encoding import decode, random_alphas
from fitness import measure_fitness
from support import devices
from training import TrainingSettings, TrainingState, make_optimizer, plain_forward, train_one_epoch

from golden import fill
from helpers import history, load_checkpoint, retrain, search

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SPACES = {
    "s1": (fast_search, lambda: model_search.Network(16, 10, 8), lambda: decode(random_alphas(1))),
    "s2": (
        nas201.fast_search,
        lambda: nas201.model_search.Network(16, 5, 10),
        lambda: nas201.encoding.decode(nas201.encoding.random_alphas(1)),
    ),
}


def on_a_card(space, dtype=torch.float32):
    """(module with the fast path, plain network, individual (G, E, O), images, labels), as the programs set them up."""
    devices.set_up(torch.device("cuda"))
    fast, network, alphas = SPACES[space]
    network, x = fill(network()).to("cuda", dtype), torch.randn(32, 3, 32, 32, device="cuda", dtype=dtype)
    return fast, network, alphas()[0].to("cuda", dtype), x, torch.arange(32, device="cuda") % 10


def gradients_and_logits(forward, network, x, y, alphas, amp=False, **settings):
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        logits = forward(network, x, alphas, **settings)
    cross_entropy(logits, y).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()]), logits.detach()


def distances(results, references):
    """Of the gradients and of the logits, relative to the references' norms."""
    return [((a - b).norm() / b.norm()).item() for a, b in zip(results, references, strict=True)]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("settings", [{}, {"checkpoint": True}, {"compile": True}], ids=["eager", "again", "compile"])
def test_fast_path_equals_the_plain_one_on_a_gpu(space, settings):
    dtype = torch.float32 if settings.get("compile") else torch.float64
    fast, plain, alphas, x, y = on_a_card(space, dtype)
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    expected = gradients_and_logits(plain_forward, plain, x, y, alphas)
    apart = distances(gradients_and_logits(fast.forward, other, x, y, alphas, **settings), expected)
    tolerances = (2e-2, 1e-3) if dtype == torch.float32 else (1e-8, 1e-8)
    assert all(value <= tolerance for value, tolerance in zip(apart, tolerances, strict=True)), apart


@pytest.mark.parametrize("space", SPACES)
def test_bfloat16_error_is_that_of_the_plain_network(space):
    fast, plain, alphas, x, y = on_a_card(space)
    others = [copy.deepcopy(plain) for _ in range(2)]
    expected = gradients_and_logits(plain_forward, plain, x, y, alphas)
    of_plain = distances(gradients_and_logits(plain_forward, others[0], x, y, alphas, amp=True), expected)
    network = others[1].to(memory_format=torch.channels_last)
    of_fast = distances(gradients_and_logits(fast.forward, network, x, y, alphas, amp=True), expected)
    assert all(fast <= 1.3 * plain for fast, plain in zip(of_fast, of_plain, strict=True)), (of_fast, of_plain)


def test_triton_kernels_are_right():
    pytest.importorskip("triton")
    import triton_kernels

    for case, error in triton_kernels.errors(torch.device("cuda"), torch.bfloat16).items():
        assert error < triton_kernels.LIMIT, case


@pytest.mark.parametrize("space, bn", [("s1", "batch"), ("s2", "running")])
def test_fitness_with_triton_kernels_is_as_near_float32_as_without(space, bn, monkeypatch):
    fast, network, alphas, x, _ = on_a_card(space)

    def logits(amp):
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            evaluator = fast.Evaluator(network, bn)
            evaluator.set_batch(x)
            return evaluator.logits(alphas)

    exact = logits(False)
    assert fast.uses_triton(x.bfloat16())
    with_triton = (logits(True) - exact).norm()
    monkeypatch.setattr(fast, "uses_triton", lambda x: False)
    without = (logits(True) - exact).norm()
    assert with_triton <= 2 * without


@pytest.mark.parametrize("space, bn", [("s1", "batch"), ("s2", "running")])
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_recorded_fitness_equals_the_eager_one(space, bn, amp):
    fast, network, _, x, y = on_a_card(space)
    population = torch.rand(6, *SPACES[space][2]().shape[1:])
    loader = Batches([(x, y), (x.flip(0), y.flip(0)), (x[:20], y[:20])])
    loader.size = 84
    eager, recorded = (
        measure_fitness(network, population, loader, bn, fast.Evaluator, amp=amp, cuda_graph=cuda_graph)
        for cuda_graph in (False, True)
    )
    assert torch.equal(recorded, eager)


class Batches(list):
    skip = 0


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("settings", [{}, {"checkpoint": True}], ids=["eager", "checkpoint"])
def test_recorded_step_equals_the_eager_one(space, settings):
    """Six steps, each with another individual, and one with fewer images."""
    fast, network, _, x, y = on_a_card(space, torch.float64)
    population = torch.rand(7, *SPACES[space][2]().shape[1:], device="cuda", dtype=torch.float64)
    batches = Batches((x.roll(i, 0)[i // 6 :], y.roll(i, 0)[i // 6 :]) for i in range(7))
    weights = []
    for cuda_graph in (False, True):
        trained = copy.deepcopy(network).to(memory_format=torch.channels_last)
        recipe = argparse.Namespace(learning_rate=0.025, momentum=0.9, weight_decay=3e-4)
        optimizer = make_optimizer(trained.parameters(), recipe)

        def loss_of(x, y, individual, trained=trained):
            logits = fast.forward(trained, x, individual, **settings)
            return cross_entropy(logits, y), logits

        state = TrainingState(trained, optimizer, batches, TrainingSettings(cuda_graph=cuda_graph, report_freq=3))
        inputs_of = lambda step: (population[step],)  # noqa: E731
        measured = train_one_epoch(state, loss_of, inputs_of, where="", log=lambda text: None)
        sums = [value.double().sum().item() for value in trained.state_dict().values()]
        weights.append([measured["train_loss"], *sums])
    assert weights[1] == pytest.approx(weights[0], rel=1e-8, abs=1e-8)


def test_recorded_retraining_draws_the_same_drop_path(tmp_path):
    flags = dict(device="cuda", drop_path_prob=0.9, epochs=2)
    runs_of_two = [retrain(tmp_path / word, word, **flags) for word in ("--cuda_graph", "--no-cuda_graph")]
    recorded, usual = ([line["train_loss"] for line in history(run)] for run in runs_of_two)
    assert recorded == pytest.approx(usual, rel=1e-2)


def test_search_on_a_gpu_resumes(tmp_path):
    whole = search(tmp_path, device="cuda", epochs=2)
    assert len(history(whole)) == 2
    checkpoint = load_checkpoint(whole / "checkpoint.prev.pt")
    assert checkpoint["completed"] == 1
    (whole / "checkpoint.prev.pt").replace(whole / "checkpoint.pt")
    train_search.main(["--resume", str(whole)])
    assert len(history(whole)) == 2


def test_process_group_of_one_works_over_nccl(tmp_path):
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        value = torch.full((3,), 2.0, device="cuda")
        torch.distributed.all_reduce(value)
        assert value.tolist() == [2.0] * 3
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name, flags", [("search_s1", ["--full"]), ("search_s2", ["--full"]), ("retrain", [])])
def test_benchmarks_run_on_a_gpu(name, flags):
    command = [sys.executable, f"benchmarks/{name}.py", "--device", "cuda", "--rounds", "1", *flags]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=3000)
    assert done.returncode == 0
