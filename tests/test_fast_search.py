"""The fast path of the DARTS-space supernet equals the plain one."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import fast_ops
import fast_search
from encoding import decode
from fitness import PlainEvaluator, batch_norm_mode, measure_fitness
from model_search import Network
from operations import OPS

from golden import REFERENCE, TRAJECTORIES, assert_close, assert_matches, fill, images, seeded_alphas, trajectory

SMALL = REFERENCE["s1_supernet"]["small"]
both_modes = pytest.mark.parametrize("bn", ["batch", "running"])


class Fast(torch.nn.Module):
    """A network whose forward is the fast path's, for helpers that call one."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, alphas):
        return fast_search.forward(self.network, x, alphas)


def network(layers=5, C=4):
    return fill(Network(C, 10, layers))


def fast_evaluator(of, bn, x):
    evaluator = fast_search.Evaluator(of, bn)
    evaluator.set_batch(x)
    return evaluator


def plain_logits(of, x, alphas, bn):
    with torch.no_grad(), batch_norm_mode(of, bn):
        return of(x, alphas)


def individual(seed):
    """Raw and decoded alphas in turn."""
    raw = seeded_alphas(seed)
    return decode(raw) if seed % 2 else raw


def train(forward, of, steps, dtype=torch.float32, side=16):
    """Logits and gradients of the last of a few SGD steps."""
    optimizer = torch.optim.SGD(of.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    for step in range(1, 1 + steps):
        logits = forward(images(step, (8, 3, side, side)).to(dtype), individual(step).to(dtype))
        optimizer.zero_grad()
        cross_entropy(logits, torch.arange(8)).backward()
        optimizer.step()
    return logits.detach(), [p.grad for p in of.parameters()]


@pytest.mark.parametrize("layers, C, side", [(5, 4, 16), (3, 16, 8)])
def test_training_step_equals_the_plain_one(layers, C, side):
    """Small networks: in larger ones rounding flips a ReLU now and then, which is more than this in a gradient."""
    plain, fast = network(layers, C), network(layers, C).to(memory_format=torch.channels_last)
    logits, gradients = train(plain, plain, 1, side=side)
    fast_logits, fast_gradients = train(Fast(fast), fast, 1, side=side)
    assert_close(fast_logits, logits)
    actual, expected = (torch.cat([g.flatten() for g in of]) for of in (fast_gradients, gradients))
    assert (actual - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize(
    "layers, side, kernels", [(2, 8, "cpu"), (3, 12, "cpu"), (2, 8, "gpu"), (2, 8, "gpu-nchw")], indirect=["kernels"]
)
def test_several_steps_in_float64_leave_equal_weights_and_buffers(layers, side, kernels):
    """In float64 no rounding flips a ReLU, so nothing but the algebra can make a difference.

    12 becomes odd behind the reductions, where dilated convolutions have another backward pass.
    """
    plain, fast = network(layers, 2).double(), network(layers, 2).double()
    before = copy.deepcopy(plain.state_dict())
    logits, gradients = train(plain, plain, 2, torch.float64, side)
    fast_logits, fast_gradients = train(Fast(fast), fast, 2, torch.float64, side)
    torch.testing.assert_close(fast_logits, logits, rtol=1e-9, atol=1e-9)
    for actual, expected in zip(fast_gradients, gradients, strict=True):
        assert (actual - expected).norm() <= 1e-8 * expected.norm()
    state = fast.state_dict()
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-8, atol=1e-9, msg=name)
        assert not torch.equal(expected, before[name]), name


def test_alphas_get_gradients():
    of, x = network().double(), images(2, (4, 3, 16, 16)).double()
    gradients = []
    for forward in (of, Fast(of)):
        alphas = seeded_alphas(1).double().requires_grad_()
        forward(x, alphas).square().sum().backward()
        gradients.append(alphas.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("key", TRAJECTORIES["s1_supernet"])
def test_training_trajectory_is_that_of_the_original(key):
    steps = trajectory(Fast(network()), *TRAJECTORIES["s1_supernet"][key])
    assert_matches(steps, SMALL[key], key)


def test_eval_logits_are_those_of_the_original():
    evaluator = fast_evaluator(network(), "running", images(13, (8, 3, 32, 32)))
    raw = seeded_alphas(SMALL["alpha_seed"])
    assert_close(evaluator.logits(raw), SMALL["eval_logits_raw"])
    assert_close(evaluator.logits(decode(raw)), SMALL["eval_logits_decoded"])


@both_modes
@pytest.mark.parametrize(
    "layers, C, side, kernels, shared_mb",
    [
        (1, 4, 8, "cpu", 3072),
        (2, 4, 8, "cpu", 3072),
        (5, 4, 12, "cpu", 3072),
        (5, 4, 12, "cpu", 0.1),
        pytest.param(8, 16, 16, "cpu", 3072, marks=pytest.mark.slow),
        (2, 4, 8, "gpu", 3072),
        (2, 4, 8, "gpu-nchw", 3072),
        (3, 4, 8, "gpu-nchw", 3072),
    ],
    indirect=["kernels"],
)
def test_fitness_logits_equal_the_plain_ones_and_nothing_moves(bn, layers, C, side, kernels, shared_mb, monkeypatch):
    """With the first cell's candidates kept (38 to 56 maps of images, channels and pixels) or beyond the bound."""
    monkeypatch.setattr(fast_search, "SHARED_MB", shared_mb)
    of, x = network(layers, C), images(3, (16, 3, side, side))
    before, training = copy.deepcopy(of.state_dict()), of.training
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        of, x = of.to(dtype), x.to(dtype)
        evaluator = fast_evaluator(of, bn, x)
        assert (evaluator.shared.matrix is None) == (shared_mb == 0.1)
        for seed in (1, 2, 1) if dtype == torch.float32 else (2,):
            alphas = individual(seed).to(dtype)
            actual, expected = evaluator.logits(alphas), plain_logits(of, x, alphas, bn)
            assert not actual.requires_grad
            assert_close(actual, expected, tolerance)
    assert of.training is training
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())


@pytest.fixture(scope="module")
def trained():
    """A supernet in which architectures differ; measuring leaves it as it is."""
    torch.manual_seed(0)
    of = Network(4, 10, 3)
    train(Fast(of), of, 20, side=8)
    return of


@both_modes
@pytest.mark.parametrize("decoded", [False, True], ids=["raw", "decoded"])
def test_fitness_of_a_population_equals_the_plain_one(trained, bn, decoded):
    """8x8 images as the handwritten digits are, two batches, the second smaller, one individual twice."""

    class Loader(list):
        size = 40

    loader = Loader((images(s, (n, 3, 8, 8)), torch.arange(n) % 10) for s, n in ((1, 28), (2, 12)))
    raw = seeded_alphas(7, (4, 2, 14, 8))
    population = torch.cat([raw, raw[:1]])
    population = decode(population) if decoded else population
    plain, fast = (
        measure_fitness(trained, population, loader, bn, way) for way in (PlainEvaluator, fast_search.Evaluator)
    )
    assert torch.equal(fast, plain)
    assert len(plain.unique()) > 1 or not decoded  # raw individuals are all alike


@both_modes
def test_evaluator_uses_the_weights_it_was_made_with(bn):
    of, x = network(), images(3, (8, 3, 16, 16))
    before = fast_evaluator(of, bn, x).logits(individual(1))
    train(Fast(of), of, 2)
    after = fast_evaluator(of, bn, x).logits(individual(1))
    assert_close(after, plain_logits(of, x, individual(1), bn))
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [4, 6, 7, 8])
def test_fast_average_pool_equals_the_operation(stride, side):
    x = images(0, (2, 5, side, side)).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast_ops.fast_average_pool(x, stride), OPS["avg_pool_3x3"](5, stride, False)(x))


@pytest.mark.parametrize(
    "kernel, stride, dilation, side",
    [(k, s, d, side) for k in (3, 5) for s, d in ((1, 1), (2, 1), (1, 2)) for side in (8, 9) if s == 1 or side == 8],
)
def test_depthwise_gradients_equal_those_of_the_module(kernel, stride, dilation, side):
    conv = torch.nn.Conv2d(4, 4, kernel, stride, kernel // 2 * dilation, dilation, groups=4, bias=False).double()
    x = images(0, (2, 4, side, side)).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    gradients = []
    even = fast_ops.every_second(x, 0) if stride == 2 else None
    for y in (conv(x), fast_ops.depthwise(x, conv.weight, dilation, even)):
        gradients.append(torch.autograd.grad(y.square().sum(), (x, conv.weight)))
    torch.testing.assert_close(gradients[1], gradients[0])


@both_modes
def test_autocast_keeps_logits_and_gradients_in_float32(bn):
    of, x = network(), images(3, (16, 3, 16, 16))
    expected = plain_logits(of, x, individual(1), bn)
    with torch.autocast("cpu", torch.bfloat16):
        logits = fast_evaluator(of, bn, x).logits(individual(1))
        assert logits.dtype == plain_logits(of, x, individual(1), bn).dtype == torch.float32
        assert_close(logits, expected, 0.1)
    with torch.autocast("cpu", torch.bfloat16):  # as in the program: torch 2.6 reuses casts made without gradients
        cross_entropy(Fast(of)(x, individual(1)), torch.arange(16) % 10).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in of.parameters())
