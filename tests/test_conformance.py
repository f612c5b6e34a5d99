"""Kernels in the dtypes, layouts and sizes that the programs use: see benchmarks/conformance.py."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fast_ops
import fast_search
import genotypes
import nas201.fast_search
import nas201.model_search
import nas201.train_search
import operations
import train
import train_search
from benchmarks import conformance
from model import NetworkCIFAR
from model_search import Network
from operations import OPS
from support import devices, self_check
from support.kernel_check import KernelCheck

aten = torch.ops.aten
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRIMITIVES = {f"{primitive.name}, {primitive.form}": primitive for primitive in conformance.primitives()}
CPU = torch.device("cpu")


def errors(primitive, sizes, dtype, device=CPU, form=None):
    """Return {(size, output): error} of those outputs that err by more than rounding explains."""
    rows = [(size, *row) for size in sizes for row in conformance.check(primitive, *size, dtype, device, form)]
    assert rows
    return {(size, output): overall for size, output, worst, overall in rows if max(worst, overall) > 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_err_as_rounding_explains(name, dtype):
    assert not errors(PRIMITIVES[name], conformance.sizes(full=False), DTYPES[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_of_many_sizes(name, dtype):
    """All but the largest: `make conformance` tries these too."""
    assert not errors(PRIMITIVES[name], conformance.sizes(full=True, most=2**17), DTYPES[dtype])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", [None, "recorded", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_on_a_gpu(name, dtype, form):
    sizes = [(5, 16, 32)] if form == "compiled" else conformance.sizes(full=True)
    assert not errors(PRIMITIVES[name], sizes, DTYPES[dtype], torch.device("cuda"), form)


# ---- the two errors that we know, in whatever PyTorch and on whatever machine this runs


class BrokenOneDNN(TorchDispatchMode):
    """oneDNN's bfloat16 gradient of dilated kernels from 32x32 pixels on, as on some CPUs."""

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        found = kernel(*args, **(kwargs or {}))
        if kernel is aten.convolution_backward.default:
            _, x, weight, _, stride, _, dilation = args[:7]
            depthwise = len(weight) == args[9] > 1
            if depthwise and x.dtype == torch.bfloat16 and (max(stride), max(dilation)) == (1, 2):
                if min(x.shape[2:]) >= 32:
                    return found[0], torch.full_like(found[1], 1e3), found[2]
        return found


class BrokenPool(TorchDispatchMode):
    """The backward pass of padded average pools in channels-last, without the padding as on CUDA."""

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        found = kernel(*args, **(kwargs or {}))
        if kernel is aten.avg_pool2d_backward.default and max(args[4]) > 0 and not args[1].is_contiguous():
            return found.roll(-1, dims=2)
        return found


def gradients(module, dtype, side=32, libraries=contextlib.nullcontext):
    """Return the gradients of the input and of the parameters of a module, in channels-last."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, side, side, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    with libraries():
        with devices.autocast(CPU, dtype == torch.bfloat16):
            y = module(x)
        gradient = torch.randn(y.shape, generator=generator).to(y.dtype)
        return torch.autograd.grad(y, (x, *module.parameters()), gradient)


def test_broken_libraries_break_what_they_should():
    conv = torch.nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False).to(memory_format=torch.channels_last)
    pool = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    cases = ((conv, torch.bfloat16, 1, BrokenOneDNN), (pool, torch.float32, 0, BrokenPool))
    for module, dtype, wrong, libraries in cases:
        right = gradients(module, dtype)[wrong]
        found = gradients(module, dtype, libraries=libraries)[wrong]
        assert (found - right).norm() > 0.5 * right.norm()


def test_the_kernel_check_sees_broken_libraries():
    conv = torch.nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False).to(memory_format=torch.channels_last)
    pool = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    cases = ((conv, torch.bfloat16, "weights", BrokenOneDNN), (pool, torch.float32, "input", BrokenPool))
    for module, dtype, wrong, libraries in cases:
        for broken in (contextlib.nullcontext, libraries):
            x = torch.randn(3, 4, 32, 32).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
            with broken(), KernelCheck() as check, devices.autocast(CPU, dtype == torch.bfloat16):
                y = module(x)
                y.backward(torch.randn_like(y))
            found = {row.output for row in check.rows if row.overall > self_check.LIMIT}
            assert found == ({f"gradient of the {wrong}"} if broken is libraries else set())


@pytest.mark.parametrize("side", [32, 33, 64])
@pytest.mark.parametrize("name", ["dil_conv_3x3", "dil_conv_5x5"])
def test_dilated_convolutions_do_without_the_broken_kernel(name, side):
    torch.manual_seed(0)
    op = OPS[name](4, 1, True)
    right = gradients(op, torch.bfloat16, side)
    found = gradients(op, torch.bfloat16, side, BrokenOneDNN)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("name", ["s1", "s2"])
def test_average_pools_do_without_the_broken_kernel(name, monkeypatch):
    op = OPS["avg_pool_3x3"](4, 1, True) if name == "s1" else nas201.model_search.OPS["avg_pool_3x3"](4, True, True)
    right = gradients(op, torch.float32)
    monkeypatch.setattr(operations, "on_cpu", lambda x: False)
    found = gradients(op, torch.float32, libraries=BrokenPool)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    "space", ["s1 fast", pytest.param("s1 plain", marks=pytest.mark.slow), "s2 fast", "s2 plain", "retraining"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_steps_do_without_broken_kernels(space, dtype, monkeypatch):
    """A whole step is the same on broken libraries: in bfloat16 on a CPU, in float32 computed as on a GPU."""
    torch.manual_seed(0)
    if space == "retraining":
        network, alphas = NetworkCIFAR(4, 10, 3, False, genotypes.EvNASA), None
    elif "s1" in space:
        network, alphas = Network(2, 10, 3, steps=2, multiplier=2), torch.rand(2, 5, 8)
    else:
        network, alphas = nas201.model_search.Network(2, 1, 10), torch.rand(6, 5)
    fast = {"s1 fast": fast_search.forward, "s2 fast": nas201.fast_search.forward}.get(space)
    if dtype == "float32":
        for module in (operations, fast_ops, nas201.fast_search):
            monkeypatch.setattr(module, "on_cpu", lambda x: False)

    def loss(network, x, y, compile):
        if space == "retraining":
            return network(x)[0].square().mean()
        return (fast or torch.nn.Module.__call__)(network, x, alphas).square().mean()

    def step():
        generator = torch.Generator().manual_seed(0)
        amp = dtype == "bfloat16"
        return self_check.training_step(network, loss, 2, (3, 32, 32), 10, amp, False, generator)

    value, right = step()
    with BrokenPool() if dtype == "float32" else BrokenOneDNN():
        found_value, found = step()
    assert found_value == value
    for kind in right:
        assert torch.equal(found[kind], right[kind]), kind


# ---- the self-check of a run


class WrongPointwise(TorchDispatchMode):
    """A library whose 1x1 convolutions in bfloat16 return gradients of weights without the last image's part."""

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if kernel is aten.convolution_backward.default and args[1].dtype == torch.bfloat16:
            gradient, x, *rest = args
            if rest[0].shape[2:] == (1, 1):
                found = kernel(*args)
                return found[0], kernel(gradient[:-1], x[:-1], *rest)[1], found[2]
        return kernel(*args, **(kwargs or {}))


SMALL = "--dataset digits --epochs 1 --batch_size 8 --train_samples 16 --init_channels 2 --amp".split()
SEARCH = [*SMALL, *"--pop_size 2 --tsize 1 --valid_samples 20 --baselines 0 --run_name run".split()]
SCRIPTS = [
    pytest.param(train_search.main, [*SEARCH, "--layers", "3"], id="s1", marks=pytest.mark.slow),
    pytest.param(nas201.train_search.main, [*SEARCH, "--num_cells", "1"], id="s2"),
    pytest.param(train.main, [*SMALL, "--arch", "EvNASA", "--layers", "3"], id="retraining"),
]


@pytest.mark.parametrize("main, argv", SCRIPTS)
def test_a_wrong_kernel_is_refused_by_name(main, argv, fails):
    with WrongPointwise():
        line = fails(main, argv)
    for word in (
        "convolution_backward",
        "gradient of the weights",
        "bfloat16",
        "kernel 1x1",
        "--amp",
        "--no-self_check",
    ):
        assert word in line


@pytest.mark.slow
@pytest.mark.parametrize("main, argv", SCRIPTS)
def test_without_the_self_check_a_wrong_kernel_is_used(main, argv, tmp_path, monkeypatch, quick_report):
    monkeypatch.chdir(tmp_path)
    with WrongPointwise():
        main([*argv, "--no-self_check"])
    assert len(list(tmp_path.glob("*/history.jsonl"))) == 1


def test_the_self_check_changes_nothing(tmp_path, monkeypatch, quick_report):
    monkeypatch.chdir(tmp_path)
    for folder, flags in (("with", []), ("without", ["--no-self_check"])):
        nas201.train_search.main([*SEARCH, "--num_cells", "1", "--dir", folder, *flags])
    weights = [torch.load(f"{folder}/run/weights/weights.pt", weights_only=True) for folder in ("with", "without")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    said = ["self-check" in (tmp_path / folder / "run/log.txt").read_text() for folder in ("with", "without")]
    assert said == [True, False]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize("wrong", [False, True])
def test_a_compiled_step_is_compared_with_one_that_is_not(wrong, monkeypatch):
    """Here the compiler is a stand-in that, if it is wrong, doubles the gradients of each cell."""
    torch.manual_seed(0)
    network = NetworkCIFAR(4, 10, 3, False, genotypes.EvNASA)

    def compiled(function):
        return lambda *args: Doubled.apply(function(*args)) if wrong else function(*args)

    monkeypatch.setattr(devices, "compiled", compiled)
    args = train.make_parser().parse_args(["--arch", "EvNASA", "--compile", "--label_smooth", "0"])

    def loss(network, x, y, compile):
        return train.training_loss(args, network, x, y, compile)[0]

    context = pytest.raises(self_check.UserError, match="--compile") if wrong else contextlib.nullcontext()
    with context:
        assert "self-check" in self_check.self_check(network, loss, 8, (3, 16, 16), 10, args)
