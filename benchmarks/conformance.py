"""Compare every primitive of the networks, forward and backward, with float64 in NCHW on the CPU.

    python benchmarks/conformance.py                   # on the CPU: minutes
    python benchmarks/conformance.py --device cuda     # also as CUDA graphs

A primitive is a convolution, a pool or a BatchNorm. The programs call primitives in these forms:

    plain       as in the reference networks
    fast        as in the fast paths of the searches
    gpu         as on a GPU, but computed on the chosen device
    compiled    as with --compile
    recorded    as with --cuda_graph

The sizes are the paper's and some smaller ones.

For each primitive, form and dtype, the script prints the worst error of an output or a gradient.
The printed number is the norm of the errors, divided by the norm that rounding explains (see
support/kernel_check.py). A kernel with a number above 1 is wrong, and the exit code is then 1.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fast_ops
import operations
from support import devices, kernel_check

SIZES = [  # channels, and height and width in pixels
    *[(16, 32), (32, 16), (64, 8)],  # the supernets
    *[(36, 32), (72, 16), (144, 8)],  # retraining on CIFAR
    *[(24, 112), (48, 28), (96, 16)],  # retraining on ImageNet
    *itertools.product((2, 3, 5), (8, 16, 28, 32, 64)),  # few channels
]
BATCHES = (2, 5, 64)
ELEMENTS = 2**20  # elements of the largest input: 64 images in the first cells of the supernet


@dataclass(frozen=True)
class Primitive:
    """A function of images and weights in one form, with its expected results and gradients."""

    name: str
    form: str
    function: Callable  # (x (B, C, H, W), *weights) -> Tensor
    weights: Callable[[int], list[tuple]]  # (C) -> shapes of the weights
    expected: Callable  # (x, *weights) -> list of kernel_check.Expected
    expected_gradients: Callable  # (gradient, x, *weights) -> list of kernel_check.Expected


def no_weights(C: int) -> list[tuple]:
    """Return the weights' shapes of a function that has no weights: an empty list."""
    return []


def convolution(
    name: str,
    form: str,
    function: Callable,
    weights: Callable[[int], list[tuple]],
    stride: int,
    padding: int | tuple[int, int],
    dilation: int = 1,
    groups: int | None = None,
) -> Primitive:
    """Return the primitive of a convolution.

    With `groups` None, each channel has its own kernel.
    """

    def settings(weight: Tensor) -> tuple:
        pads = padding if isinstance(padding, tuple) else (padding, padding)
        return (stride, stride), pads, (dilation, dilation), False, (0, 0), groups or len(weight)

    def expected(x: Tensor, weight: Tensor) -> list:
        return kernel_check.convolution(x, weight, None, *settings(weight))

    def expected_gradients(gradient: Tensor, x: Tensor, weight: Tensor) -> list:
        mask = (True, True, False)
        return kernel_check.convolution_backward(gradient, x, weight, None, *settings(weight), mask)[:2]

    return Primitive(name, form, function, weights, expected, expected_gradients)


def depthwise(k: int, stride: int, dilation: int) -> Iterator[Primitive]:
    """Yield a depthwise convolution in the form of the reference and in that of the fast path."""
    name = f"depthwise {k}x{k}, stride {stride}, dilation {dilation}"
    padding = dilation * (k // 2)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return operations.depthwise_conv(x, weight, stride, padding, dilation)

    def fast(x: Tensor, weight: Tensor) -> Tensor:
        return fast_ops.depthwise(x, weight, dilation, fast_ops.every_second(x, 0) if stride == 2 else None)

    for form, function in (("plain", plain), ("fast", fast)):
        yield convolution(name, form, function, lambda C: [(C, 1, k, k)], stride, padding, dilation)


def dense(name: str, weights: Callable[[int], list[tuple]], stride: int, padding: int | tuple[int, int]) -> Primitive:
    """Return the primitive of a convolution that mixes channels."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, stride, padding)

    return convolution(name, "plain", function, weights, stride, padding, groups=1)


def halving(x: Tensor, weight: Tensor) -> Tensor:
    """Apply a 1x1 convolution with stride 2, as FactorizedReduce does."""
    return operations.halving_conv(x, weight, x.shape[1])


def average_pool(form: str, function: Callable, size: int, stride: int, padding: int) -> Primitive:
    """Return the primitive of an average pool that ignores the padding."""
    settings = ((size, size), (stride, stride), (padding, padding), False, False, None)

    def expected(x: Tensor) -> list:
        return kernel_check.average_pool(x, *settings)

    def expected_gradients(gradient: Tensor, x: Tensor) -> list:
        return kernel_check.average_pool_backward(gradient, x, *settings)

    return Primitive(
        f"average pool {size}x{size}, stride {stride}", form, function, no_weights, expected, expected_gradients
    )


def max_pool(stride: int) -> Primitive:
    """Return the primitive of a 3x3 max pool."""
    settings = ((3, 3), (stride, stride), (1, 1))

    def expected_gradients(gradient: Tensor, x: Tensor) -> list:
        _, indices = torch.ops.aten.max_pool2d_with_indices(x, *settings)
        return kernel_check.max_pool_backward(gradient, x, *settings, (1, 1), False, indices)

    return Primitive(
        f"max pool 3x3, stride {stride}",
        "plain",
        lambda x: F.max_pool2d(x, *settings),
        no_weights,
        lambda x: kernel_check.max_pool(x, *settings),
        expected_gradients,
    )


def batch_norm(form: str, function: Callable) -> Primitive:
    """Return the primitive of a BatchNorm with the batch's statistics and a scale."""
    eps = 1e-5

    def expected(x: Tensor, weight: Tensor) -> list:
        return kernel_check.batch_norm(x, weight, None, None, None, True, 0.0, eps)[:1]

    def expected_gradients(gradient: Tensor, x: Tensor, weight: Tensor) -> list:
        statistics = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + eps).rsqrt()
        mask = (True, True, False)
        gradients = kernel_check.batch_norm_backward(gradient, x, weight, None, None, *statistics, True, eps, mask)
        return gradients[:2]

    name = "BatchNorm, batch statistics"
    return Primitive(name, form, function, lambda C: [(C,)], expected, expected_gradients)


def primitives() -> list[Primitive]:
    """Return all primitives of the networks."""
    found = []
    for k, (stride, dilation) in itertools.product((3, 5), itertools.product((1, 2), (1, 2))):
        found += depthwise(k, stride, dilation)
    found += depthwise(7, 1, 1)
    found += [
        dense("1x1", lambda C: [(C, C, 1, 1)], 1, 0),
        convolution("1x1, stride 2", "plain", halving, lambda C: [(C // 2 + 1, C, 1, 1)], 2, 0, groups=1),
        dense("3x3", lambda C: [(C, C, 3, 3)], 1, 1),
        dense("3x3, stride 2", lambda C: [(2 * C, C, 3, 3)], 2, 1),
        dense("1x7", lambda C: [(C, C, 1, 7)], 1, (0, 3)),
        dense("7x1", lambda C: [(C, C, 7, 1)], 1, (3, 0)),
    ]
    for stride in (1, 2):
        pools = {
            "plain": lambda x, stride=stride: operations.average_pool(x, stride),
            "fast": lambda x, stride=stride: fast_ops.fast_average_pool(x, stride),
            "gpu": lambda x, stride=stride: operations.SoundAveragePool.apply(x, stride),
        }
        found += [average_pool(form, function, 3, stride, 1) for form, function in pools.items()]
    found.append(average_pool("plain", lambda x: F.avg_pool2d(x, 2, 2, count_include_pad=False), 2, 2, 0))
    found.append(average_pool("plain", lambda x: F.avg_pool2d(x, 5, 3, count_include_pad=False), 5, 3, 0))
    found += [max_pool(1), max_pool(2)]
    found.append(batch_norm("plain", lambda x, weight: F.batch_norm(x, None, None, weight, None, True)))
    found.append(batch_norm("fast", lambda x, weight: fast_ops.batch_norm_stats(x, weight, None, 1e-5)[0]))
    return found


def check(
    primitive: Primitive,
    images: int,
    C: int,
    side: int,
    dtype: torch.dtype,
    device: torch.device,
    form: str | None = None,
) -> list[tuple[str, float, float]]:
    """Return the errors of a primitive as [(output, worst, overall)], see `kernel_check.Row`.

    Images and weights are random, with values that `dtype` represents exactly. `form` is
    "compiled" or "recorded"; None means the primitive's own form.
    """
    generator = torch.Generator().manual_seed(C * side + images)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(dtype).float()
        if len(shape) != 4:
            return values.to(device)
        return values.to(device).contiguous(memory_format=devices.memory_format(device))

    function = torch.compile(primitive.function, dynamic=False) if form == "compiled" else primitive.function
    x = draw(images, C, side, side).to(dtype).requires_grad_()
    weights = [draw(*shape).requires_grad_() for shape in primitive.weights(C)]

    def step(gradient: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        with devices.autocast(device, dtype == torch.bfloat16):
            y = function(x, *weights)
        if gradient is None:
            return y
        return (y, *torch.autograd.grad(y, (x, *weights), gradient))

    y = step()
    gradient = draw(*y.shape).to(y.dtype)
    outputs = recorded(lambda: step(gradient)) if form == "recorded" else step(gradient)
    precise = [kernel_check.to_reference(value) for value in (gradient, x, *weights)]
    expected = primitive.expected(*precise[1:]) + primitive.expected_gradients(*precise)
    errors = []
    for value, expectation in zip(outputs, expected, strict=True):
        errors.append((expectation.output, *kernel_check.compare(value, expectation, dtype)))
    return errors


def recorded(function: Callable) -> tuple[Tensor, ...]:
    """Return the function's results, computed by a CUDA graph of its kernels."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # libraries must be loaded before recording begins
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    graph.replay()
    torch.cuda.synchronize()
    return outputs


def sizes(full: bool, most: int = ELEMENTS) -> Iterator[tuple[int, int, int]]:
    """Yield the sizes (images, channels, height and width) to check.

    With `full`, all sizes of at most `most` elements are checked. Otherwise only a few sizes are
    checked, for which wrong kernels are known.
    """
    if not full:
        yield from ((5, 2, 32), (5, 3, 8), (2, 16, 32))
        return
    for (C, side), images in itertools.product(SIZES, BATCHES):
        if images * C * side**2 <= most:
            yield images, C, side


def main() -> int:
    """Check all primitives, print the results, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="any PyTorch device, such as cuda (default: cpu)")
    parser.add_argument("--few", action="store_true", help="check only the few sizes that `make test` checks")
    parser.add_argument(
        "--compile", action="store_true", help="also check each compiled primitive at one size; takes minutes"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    start = time.perf_counter()
    wrong = 0
    devices.set_up(device)
    forms = [None, *["compiled"] * args.compile, *["recorded"] * (device.type == "cuda")]
    print(f"PyTorch {torch.__version__}, {devices.device_text(device)}")
    for primitive, dtype, form in itertools.product(primitives(), (torch.float32, torch.bfloat16), forms):
        worst = (0.0, "", ())
        for size in [(5, 16, 32)] if form == "compiled" else sizes(not args.few):
            for output, _, overall in check(primitive, *size, dtype, device, form):
                worst = max(worst, (overall, output, size))
        wrong += worst[0] > 1
        name = f"{primitive.name}, {form or primitive.form}, {str(dtype).removeprefix('torch.')}"
        print(f"{name:58} {worst[0]:8.3f}  {worst[1]} at {'x'.join(map(str, worst[2]))}", flush=True)
    print(f"{wrong} of these kernels are wrong; {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
