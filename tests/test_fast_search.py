"""The fast path of the DARTS-space supernet equals the plain one."""

import copy
import functools

import pytest
import torch
from torch.nn.functional import cross_entropy

import fast_ops
import fast_search
from encoding import decode
from fitness import PlainEvaluator, batch_norm_mode, measure_fitness
from model_search import Network
from operations import OPS
from support import devices

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


@functools.cache
def weights(layers, C):
    """The filled weights and buffers: filling a network takes longer than loading it."""
    return fill(Network(C, 10, layers)).state_dict()


def network(layers=5, C=4, dtype=torch.float32):
    of = Network(C, 10, layers)
    of.load_state_dict(weights(layers, C))
    return of.to(dtype)


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


def test_training_step_in_float32_equals_the_plain_one():
    """A small network: in larger ones rounding flips a ReLU now and then, which is more than this in a gradient."""
    plain, fast = network(3, 16), network(3, 16).to(memory_format=torch.channels_last)
    logits, gradients = train(plain, plain, 1, side=8)
    fast_logits, fast_gradients = train(Fast(fast), fast, 1, side=8)
    assert_close(fast_logits, logits)
    actual, expected = (torch.cat([g.flatten() for g in of]) for of in (fast_gradients, gradients))
    assert (actual - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize(
    "layers, side, steps, kernels",
    [
        (3, 8, 1, "cpu"),
        (3, 8, 1, "gpu"),
        pytest.param(3, 12, 2, "cpu", marks=pytest.mark.slow),
        pytest.param(4, 12, 1, "gpu", marks=pytest.mark.slow),
        pytest.param(2, 8, 1, "gpu-nchw", marks=pytest.mark.slow),
    ],
    indirect=["kernels"],
)
def test_steps_in_float64_leave_equal_weights_and_buffers(layers, side, steps, kernels):
    """In float64 no rounding flips a ReLU, so nothing but the algebra can make a difference.

    12 becomes odd after the reductions, where dilated convolutions are not split into phases.
    """
    plain, fast = network(layers, 2, torch.float64), network(layers, 2, torch.float64)
    before = copy.deepcopy(plain.state_dict())
    logits, gradients = train(plain, plain, steps, torch.float64, side)
    fast_logits, fast_gradients = train(Fast(fast), fast, steps, torch.float64, side)
    torch.testing.assert_close(fast_logits, logits, rtol=1e-9, atol=1e-9)
    for actual, expected in zip(fast_gradients, gradients, strict=True):
        assert (actual - expected).norm() <= 1e-8 * expected.norm()
    state = fast.state_dict()
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-8, atol=1e-9, msg=name)
        assert not torch.equal(expected, before[name]), name


def test_alphas_get_the_gradients_of_the_plain_network():
    of, x = network(3, 2, torch.float64), images(2, (4, 3, 8, 8)).double()
    gradients = []
    for forward in (of, Fast(of)):
        alphas = seeded_alphas(1).double().requires_grad_()
        forward(x, alphas).square().sum().backward()
        gradients.append(alphas.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    assert (gradients[0].abs().sum((1, 2)) > 0).all()  # of both kinds of cell


def test_training_trajectory_is_that_of_the_original():
    steps = trajectory(Fast(network()), *TRAJECTORIES["s1_supernet"]["train_traj"])
    assert_matches(steps, SMALL["train_traj"], "train_traj")


# ---- fitness


def test_eval_logits_are_those_of_the_original():
    evaluator = fast_evaluator(network(), "running", images(13, (8, 3, 32, 32)))
    raw = seeded_alphas(SMALL["alpha_seed"])
    assert_close(evaluator.logits(raw), SMALL["eval_logits_raw"])
    assert_close(evaluator.logits(decode(raw)), SMALL["eval_logits_decoded"])


def evaluators(of, bn, x, monkeypatch):
    """The evaluators that keep the candidates of shared inputs, and that compute them for each individual."""
    for shared_mb in (3072, 0):
        monkeypatch.setattr(fast_search, "SHARED_MB", shared_mb)
        evaluator = fast_evaluator(of, bn, x)
        assert len(evaluator.shared) == min(2, len(of.cells))
        for shared in evaluator.shared.values():
            assert (shared.matrix is None) == (shared_mb == 0)
        yield evaluator


# A normal cell comes first in a network of 3 or more layers. In one of 4 there is another one, after the reductions,
# and 12 becomes odd before it.
@both_modes
@pytest.mark.parametrize(
    "layers, C, side, kernels",
    [
        (1, 4, 8, "cpu"),
        pytest.param(4, 4, 12, "cpu", marks=pytest.mark.slow),
        pytest.param(8, 16, 16, "cpu", marks=pytest.mark.slow),
        (2, 4, 8, "gpu"),
        pytest.param(4, 4, 12, "gpu", marks=pytest.mark.slow),
        pytest.param(2, 4, 8, "gpu-nchw", marks=pytest.mark.slow),
        pytest.param(3, 4, 8, "gpu-nchw", marks=pytest.mark.slow),
    ],
    indirect=["kernels"],
)
def test_fitness_logits_in_float64_equal_the_plain_ones(bn, layers, C, side, kernels, monkeypatch):
    of, x = network(layers, C, torch.float64), images(3, (4, 3, side, side)).double()
    expected = [plain_logits(of, x, individual(seed).double(), bn) for seed in (1, 2)]
    for evaluator in evaluators(of, bn, x, monkeypatch):
        assert_close(evaluator.logits(individual(1).double()), expected[0], 1e-8)
        assert_close(evaluator.logits(individual(2).double()), expected[1], 1e-8)


@both_modes
@pytest.mark.parametrize(
    "layers, C, side",
    [(3, 4, 8), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(4, 4, 12), (8, 16, 16)])],
)
def test_fitness_logits_in_float32_equal_the_plain_ones(bn, layers, C, side, monkeypatch):
    of, x = network(layers, C), images(3, (16, 3, side, side))
    expected = plain_logits(of, x, individual(1), bn)
    for evaluator in evaluators(of, bn, x, monkeypatch):
        assert_close(evaluator.logits(individual(1)), expected)


@both_modes
@pytest.mark.parametrize("shared_mb", [3072, 0])
def test_measuring_leaves_nothing_behind(bn, shared_mb, monkeypatch):
    """Not in the network, and nothing of one individual in the evaluator for the next."""
    monkeypatch.setattr(fast_search, "SHARED_MB", shared_mb)
    of = network(2)
    before = copy.deepcopy(of.state_dict())
    evaluator = fast_evaluator(of, bn, images(3, (4, 3, 8, 8)))
    first, other, again = (evaluator.logits(individual(seed)) for seed in (1, 2, 1))
    assert torch.equal(again, first)
    assert not torch.equal(other, first)
    assert not first.requires_grad
    assert of.training
    for name, value in of.state_dict().items():
        assert torch.equal(value, before[name]), name


@both_modes
def test_fitness_of_a_population_equals_the_plain_one(bn):
    """8x8 images as the handwritten digits are, two batches, the second smaller, one individual twice.

    The labels are what the plain network answers to this individual, so its fitness is 100 %.
    """

    class Loader(list):
        size = 24

    of = network(1, 4, torch.float64)
    population = torch.stack([individual(seed) for seed in (1, 2, 1)]).double()
    batches = [images(1, (16, 3, 8, 8)).double(), images(2, (8, 3, 8, 8)).double()]
    loader = Loader((x, plain_logits(of, x, population[0], bn).argmax(1)) for x in batches)
    plain, fast = (measure_fitness(of, population, loader, bn, way) for way in (PlainEvaluator, fast_search.Evaluator))
    assert torch.equal(fast, plain)
    assert plain[0] == plain[2] == 100
    assert plain[1] < 90


def test_recorded_fitness_is_recorded_once_per_batch(monkeypatch):
    """On a GPU. The first two individuals of each shape of a batch are measured without the recording."""

    class Loader(list):
        size = 24

    class Recorded:
        def __init__(self, function, warm_up):
            self.function = function
            warm_ups.append(warm_up)

        def __call__(self, alphas):
            return self.function(alphas)

    of = network(1)
    population = torch.stack([individual(seed) for seed in range(4)])
    loader = Loader(
        (images(i, (size, 3, 8, 8)), torch.zeros(size, dtype=torch.int64)) for i, size in enumerate((9, 9, 6))
    )
    monkeypatch.setattr(devices, "can_record", lambda device: True)
    monkeypatch.setattr(devices, "Recorded", Recorded)
    warm_ups = []
    expected = measure_fitness(of, population, loader, "batch", fast_search.Evaluator)
    assert warm_ups == []
    fitness = measure_fitness(of, population, loader, "batch", fast_search.Evaluator, cuda_graph=True)
    assert torch.equal(fitness, expected)
    assert warm_ups == [2, 0, 2]


@both_modes
def test_evaluator_uses_the_weights_it_was_made_with(bn):
    of, x = network(2), images(3, (8, 3, 8, 8))
    before = fast_evaluator(of, bn, x).logits(individual(1))
    train(Fast(of), of, 1, side=8)
    after = fast_evaluator(of, bn, x).logits(individual(1))
    assert_close(after, plain_logits(of, x, individual(1), bn))
    assert (after - before).abs().max() > 1e-3


# ---- operations


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


# ---- bfloat16


@both_modes
def test_autocast_keeps_fitness_logits_in_float32(bn):
    of, x = network(3), images(3, (8, 3, 8, 8))
    expected = plain_logits(of, x, individual(1), bn)
    with torch.autocast("cpu", torch.bfloat16):
        logits = fast_evaluator(of, bn, x).logits(individual(1))
        plain = plain_logits(of, x, individual(1), bn)
    assert logits.dtype == torch.float32
    assert plain.dtype == torch.float32
    assert_close(logits, expected, 0.1)


def test_autocast_keeps_gradients_in_float32():
    """Autocast begins anew after the fitness, as in the program: torch 2.6 reuses casts made without gradients."""
    of, x = network(3), images(3, (8, 3, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        fast_evaluator(of, "batch", x).logits(individual(1))
    with torch.autocast("cpu", torch.bfloat16):
        cross_entropy(Fast(of)(x, individual(1)), torch.arange(8)).backward()
    for p in of.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()
