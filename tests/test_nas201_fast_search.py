"""The fast path of the NAS-Bench-201 supernet equals the plain one."""

import copy

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


def network(track=True):
    return fill(Network(8, 2, 10, track_running_stats=track))


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


def train(forward, of, steps, dtype=torch.float32):
    """Logits and gradients of the last of a few SGD steps."""
    optimizer = torch.optim.SGD(of.parameters(), lr=0.025, momentum=0.9, nesterov=True)
    for step in range(steps):
        alphas = seeded_alphas(step, (1, 6, 5)).to(dtype)
        logits = forward(images(step, (8, 3, 16, 16)).to(dtype), alphas if step % 2 else decode(alphas))
        optimizer.zero_grad()
        cross_entropy(logits, torch.arange(8)).backward()
        optimizer.step()
    return logits.detach(), [p.grad for p in of.parameters()]


@both_trackings
def test_training_step_equals_the_plain_one(track):
    plain, fast = network(track), network(track)
    logits, gradients = train(plain, plain, 1)
    fast_logits, fast_gradients = train(Fast(fast), fast, 1)
    assert_close(fast_logits, logits)
    for actual, expected in zip(fast_gradients, gradients, strict=True):
        assert (actual - expected).norm() <= 1e-3 * expected.norm()


@both_trackings
def test_several_steps_in_float64_leave_equal_weights_and_buffers(track, kernels):
    """In float64 no rounding flips a ReLU, so nothing but the algebra can make a difference."""
    plain, fast = network(track).double(), network(track).double()
    before = copy.deepcopy(plain.state_dict())
    logits, _ = train(plain, plain, 3, torch.float64)
    fast_logits, _ = train(Fast(fast), fast, 3, torch.float64)
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


def test_alphas_get_gradients():
    alphas = seeded_alphas(1, (1, 6, 5))
    of, x = network(), images(2, (4, 3, 16, 16))
    gradients = []
    for forward in (of, Fast(of)):
        leaf = alphas.clone().requires_grad_()
        forward(x, leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("key", TRAJECTORIES["s2_supernet"])
def test_training_trajectory_is_that_of_the_original(key):
    steps = trajectory(
        Fast(fill(Network(SMALL["C"], SMALL["N"], SMALL["classes"]))), *TRAJECTORIES["s2_supernet"][key], nesterov=True
    )
    assert_matches(steps, SMALL[key], key)


@pytest.mark.parametrize("case", SMALL["cases"], ids=lambda case: str(case["seed"]))
def test_eval_logits_are_those_of_the_original(case):
    of = fill(Network(SMALL["C"], SMALL["N"], SMALL["classes"]))
    evaluator = fast_evaluator(of, "running", images(17, (4, 3, 32, 32)))
    raw = seeded_alphas(case["seed"], (1, 6, 5))
    assert_close(evaluator.logits(raw), case["eval_logits_raw"])
    assert_close(evaluator.logits(decode(raw)), case["eval_logits_decoded"])


@both_trackings
@both_modes
def test_population_fitness_equals_one_by_one_and_moves_nothing(bn, track, kernels, monkeypatch):
    monkeypatch.setattr(fast_search, "IMAGES_PER_THREAD", 3)  # so that several parts and a smaller last one occur
    of, x = network(track), images(3, (26, 3, 16, 16))
    before, training = copy.deepcopy(of.state_dict()), of.training
    evaluator = fast_evaluator(of, bn, x)
    for alphas in population(4):
        expected = plain_logits(of, x, alphas, bn)
        for actual in (evaluator.logits(alphas), evaluator.logits(alphas[0])):  # (1, 6, 5) and (6, 5)
            assert not actual.requires_grad
            assert_close(actual, expected)
        two_best = expected.topk(2).values
        clear = two_best[:, 0] - two_best[:, 1] > 1e-4
        assert torch.equal(actual.argmax(1)[clear], expected.argmax(1)[clear])
    assert of.training is training
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())


def test_without_running_statistics_only_the_searched_cells_use_the_batch():
    tracked, untracked, x = network(True), network(False), images(3, (8, 3, 16, 16))
    with torch.no_grad():  # other running statistics than 0 and 1
        for of in (tracked, untracked):
            of.train()(images(4, (8, 3, 16, 16)), seeded_alphas(1, (1, 6, 5)))
    tracked.eval()
    for cell in tracked.cells:
        cell.train(isinstance(cell, Cell))
    for alphas in population(2):
        with torch.no_grad():
            expected = tracked(x, alphas)
        assert_close(plain_logits(untracked, x, alphas, "running"), expected)
        assert_close(fast_evaluator(untracked, "running", x).logits(alphas), expected)


@both_modes
def test_evaluator_uses_the_weights_it_was_made_with(bn):
    of, x, alphas = network(), images(3, (8, 3, 16, 16)), seeded_alphas(0, (1, 6, 5))
    before = fast_evaluator(of, bn, x).logits(alphas)
    train(Fast(of), of, 2)
    after = fast_evaluator(of, bn, x).logits(alphas)
    assert_close(after, plain_logits(of, x, alphas, bn))
    assert (after - before).abs().max() > 1e-3


@both_modes
def test_autocast_keeps_logits_and_gradients_in_float32(bn):
    of, x, alphas = network(), images(3, (8, 3, 16, 16)), decode(seeded_alphas(0, (1, 6, 5)))
    expected = plain_logits(of, x, alphas, bn)
    with torch.autocast("cpu", torch.bfloat16):
        logits = fast_evaluator(of, bn, x).logits(alphas)
        assert logits.dtype == plain_logits(of, x, alphas, bn).dtype == torch.float32
        assert_close(logits, expected, 0.1)
    with torch.autocast("cpu", torch.bfloat16):  # as in the program: torch 2.6 reuses casts made without gradients
        cross_entropy(Fast(of)(x, alphas), torch.arange(8)).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in of.parameters())
