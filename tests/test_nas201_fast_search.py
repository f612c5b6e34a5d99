"""The fast path of the NAS-Bench-201 supernet equals the plain one."""

import copy
import functools

import pytest
import torch
from torch.nn.functional import cross_entropy

import fast_ops
import nas201.fast_search as fast_search
from fitness import batch_norm_mode
from nas201.encoding import decode
from nas201.model_search import Cell, Network

from golden import REFERENCE, TRAJECTORIES, assert_close, assert_matches, fill, images, seeded_alphas, trajectory

SMALL = REFERENCE["s2_supernet"]["small"]
both_trackings = pytest.mark.parametrize("track", [True, False], ids=["tracked", "untracked"])
both_modes = pytest.mark.parametrize("bn", ["batch", "running"])


class Fast(torch.nn.Module):
    """A network whose forward is the fast path's, for helpers that call one."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, alphas):
        return fast_search.forward(self.network, x, alphas)


@functools.cache
def weights(C, track):
    """The filled weights and buffers: filling a network takes longer than loading it."""
    return fill(Network(C, SMALL["N"], SMALL["classes"], track_running_stats=track)).state_dict()


def network(track=True, C=4, dtype=torch.float32):
    of = Network(C, SMALL["N"], SMALL["classes"], track_running_stats=track)
    of.load_state_dict(weights(C, track))
    return of.to(dtype)


def fast_evaluator(of, bn, x):
    evaluator = fast_search.Evaluator(of, bn)
    evaluator.set_batch(x)
    return evaluator


def plain_logits(of, x, alphas, bn):
    with torch.no_grad(), batch_norm_mode(of, bn):
        return of(x, alphas)


def population(size):
    raw = seeded_alphas(5, (size, 1, 6, 5))
    return torch.cat([raw, decode(raw)])


def train(forward, of, steps, dtype=torch.float32, side=16):
    """Logits and gradients of the last of a few SGD steps."""
    optimizer = torch.optim.SGD(of.parameters(), lr=0.025, momentum=0.9, nesterov=True)
    for step in range(steps):
        alphas = seeded_alphas(step, (1, 6, 5)).to(dtype)
        logits = forward(images(step, (8, 3, side, side)).to(dtype), alphas if step % 2 else decode(alphas))
        optimizer.zero_grad()
        cross_entropy(logits, torch.arange(8)).backward()
        optimizer.step()
    return logits.detach(), [p.grad for p in of.parameters()]


@both_trackings
def test_training_step_in_float32_equals_the_plain_one(track):
    plain, fast = network(track, C=8), network(track, C=8)
    logits, gradients = train(plain, plain, 1)
    fast_logits, fast_gradients = train(Fast(fast), fast, 1)
    assert_close(fast_logits, logits)
    for actual, expected in zip(fast_gradients, gradients, strict=True):
        assert (actual - expected).norm() <= 1e-3 * expected.norm()


@both_trackings
def test_two_steps_in_float64_leave_equal_weights_and_buffers(track, kernels):
    """In float64 no rounding flips a ReLU, so nothing but the algebra can make a difference."""
    plain, fast = network(track, dtype=torch.float64), network(track, dtype=torch.float64)
    before = copy.deepcopy(plain.state_dict())
    logits, _ = train(plain, plain, 2, torch.float64, side=8)
    fast_logits, _ = train(Fast(fast), fast, 2, torch.float64, side=8)
    torch.testing.assert_close(fast_logits, logits, rtol=1e-9, atol=1e-9)
    state = fast.state_dict()
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-8, atol=1e-9, msg=name)
        assert not torch.equal(expected, before[name]), name


def test_batch_statistics_are_precise():
    """Over many values: torch's channels-last BatchNorm would miss this tolerance tenfold."""
    x = images(0, (64, 8, 32, 32)) + 0.3
    scale, shift = torch.ones(8), torch.zeros(8)
    _, *actual = fast_ops.batch_norm_stats(x.contiguous(memory_format=torch.channels_last), scale, shift, 1e-5)
    exact = x.double().transpose(0, 1).flatten(1)
    for moment, expected in zip(actual, (exact.mean(1), (exact.var(1, correction=0) + 1e-5).rsqrt()), strict=True):
        torch.testing.assert_close(moment.double(), expected, rtol=0, atol=5e-7)


def test_alphas_get_the_gradients_of_the_plain_network():
    of, x = network(dtype=torch.float64), images(2, (4, 3, 8, 8)).double()
    gradients = []
    for forward in (of, Fast(of)):
        alphas = seeded_alphas(1, (1, 6, 5)).double().requires_grad_()
        forward(x, alphas).square().sum().backward()
        gradients.append(alphas.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_training_trajectory_is_that_of_the_original():
    steps = trajectory(Fast(network(C=SMALL["C"])), *TRAJECTORIES["s2_supernet"]["train_traj"], nesterov=True)
    assert_matches(steps, SMALL["train_traj"], "train_traj")


# ---- fitness


@pytest.mark.parametrize("case", SMALL["cases"], ids=lambda case: str(case["seed"]))
def test_eval_logits_are_those_of_the_original(case):
    evaluator = fast_evaluator(network(C=SMALL["C"]), "running", images(17, (4, 3, 32, 32)))
    raw = seeded_alphas(case["seed"], (1, 6, 5))
    assert_close(evaluator.logits(raw), case["eval_logits_raw"])
    assert_close(evaluator.logits(decode(raw)), case["eval_logits_decoded"])


@both_trackings
@both_modes
def test_fitness_logits_equal_the_plain_ones(bn, track, kernels, monkeypatch):
    """Of raw and decoded individuals, of shape (1, 6, 5) and (6, 5)."""
    monkeypatch.setattr(fast_search, "IMAGES_PER_THREAD", 3)  # so that several parts and a smaller last one occur
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    of, x = network(track), images(3, (7, 3, 8, 8))
    evaluator = fast_evaluator(of, bn, x)
    for alphas in population(2):
        expected = plain_logits(of, x, alphas, bn)
        assert_close(evaluator.logits(alphas), expected)
        assert_close(evaluator.logits(alphas[0]), expected)


@both_trackings
@both_modes
def test_measuring_leaves_nothing_behind(bn, track):
    """Not in the network, and nothing of one individual in the evaluator for the next."""
    of = network(track)
    before = copy.deepcopy(of.state_dict())
    evaluator = fast_evaluator(of, bn, images(3, (7, 3, 8, 8)))
    raw, decoded = population(1)
    first, other, again = (evaluator.logits(alphas) for alphas in (raw, decoded, raw))
    assert torch.equal(again, first)
    assert not torch.equal(other, first)
    assert not first.requires_grad
    assert of.training
    for name, value in of.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_without_running_statistics_only_the_searched_cells_use_the_batch():
    tracked, untracked, x = network(True), network(False), images(3, (8, 3, 8, 8))
    with torch.no_grad():  # other running statistics than 0 and 1
        for of in (tracked, untracked):
            of.train()(images(4, (8, 3, 8, 8)), seeded_alphas(1, (1, 6, 5)))
    tracked.eval()
    for cell in tracked.cells:
        cell.train(isinstance(cell, Cell))
    for alphas in population(1):
        with torch.no_grad():
            expected = tracked(x, alphas)
        assert_close(plain_logits(untracked, x, alphas, "running"), expected)
        assert_close(fast_evaluator(untracked, "running", x).logits(alphas), expected)


@both_modes
def test_evaluator_uses_the_weights_it_was_made_with(bn):
    of, x, alphas = network(), images(3, (8, 3, 16, 16)), seeded_alphas(0, (1, 6, 5))
    before = fast_evaluator(of, bn, x).logits(alphas)
    train(Fast(of), of, 1)
    after = fast_evaluator(of, bn, x).logits(alphas)
    assert_close(after, plain_logits(of, x, alphas, bn))
    assert (after - before).abs().max() > 1e-3


# ---- bfloat16


@both_modes
def test_autocast_keeps_fitness_logits_in_float32(bn):
    of, x, alphas = network(), images(3, (8, 3, 8, 8)), decode(seeded_alphas(0, (1, 6, 5)))
    expected = plain_logits(of, x, alphas, bn)
    with torch.autocast("cpu", torch.bfloat16):
        logits = fast_evaluator(of, bn, x).logits(alphas)
        plain = plain_logits(of, x, alphas, bn)
    assert logits.dtype == torch.float32
    assert plain.dtype == torch.float32
    assert_close(logits, expected, 0.1)


def test_autocast_keeps_gradients_in_float32():
    """Autocast begins anew after the fitness, as in the program: torch 2.6 reuses casts made without gradients."""
    of, x, alphas = network(), images(3, (8, 3, 8, 8)), decode(seeded_alphas(0, (1, 6, 5)))
    with torch.autocast("cpu", torch.bfloat16):
        fast_evaluator(of, "batch", x).logits(alphas)
    with torch.autocast("cpu", torch.bfloat16):
        cross_entropy(Fast(of)(x, alphas), torch.arange(8)).backward()
    for p in of.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()
