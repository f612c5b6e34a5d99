"""Check PyTorch's kernels one by one, as a program calls them, against float64 in NCHW on the CPU.

    with KernelCheck() as check:
        loss = network(x).mean()
        loss.backward()
    wrong = [row for row in check.rows if row.worst > 1]

Convolutions, matrix products, BatchNorms, pools and means are computed a second time, from the same
inputs as the kernel's, so that errors do not add up from one operation to the next. Each kernel is
checked once for each combination of shapes, layouts, dtypes and settings.

How large an error may be: in a sum of n terms, each addition rounds to float32 or better. The error
is then about sqrt(n) u times the sum of the magnitudes of the terms, where u is the unit roundoff
(Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019). We allow `SLACK` times as much, because fast
algorithms such as Winograd's add transformed terms. A kernel may also store partial sums in the
format of the result: one for each image in a gradient of weights, one for each tap of the kernel in
a convolution. A random partial sum is about as large as the root of the sum of its terms' squares,
which is at least the sum of their magnitudes divided by sqrt(n). We did not fit this bound to any
measured error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
SLACK = 16
TAIL = 6  # standard deviations within which the largest of a million normal errors is


@dataclass(frozen=True)
class Row:
    """The errors of one output of one kernel, as multiples of what rounding explains.

    `worst` is the largest ratio of an element's error to its bound, `overall` the ratio of the
    norms.
    """

    kernel: str
    output: str
    setting: str
    worst: float
    overall: float

    def __str__(self):
        return f"{self.kernel}, {self.output} ({self.setting})"


@dataclass
class Expected:
    """What one output should be (float64, on the CPU), and the sum of the magnitudes of its terms.

    `terms` is the number of terms in the sum, and `stores` the number of partial sums that a kernel
    may store in the format of the result. If `exact`, the output copies an input and nothing is
    rounded.
    """

    output: str
    value: torch.Tensor
    magnitude: torch.Tensor
    terms: int = 1
    stores: int = 1
    exact: bool = False


class KernelCheck(TorchDispatchMode):
    """Checks each kernel that is called in the block; `rows` has a Row for each of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.seen = set()

    def __torch_dispatch__(
        self, kernel: torch._ops.OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Run a kernel, and compare its outputs with what is expected."""
        kwargs = kwargs or {}
        expect = EXPECTED.get(kernel)
        inputs = [value for value in args if isinstance(value, torch.Tensor)]
        if expect is None or kwargs or not inputs or not inputs[0].is_floating_point():
            return kernel(*args, **kwargs)
        setting = (str(kernel), *(setting_of(value) for value in args))
        if setting in self.seen:
            return kernel(*args)
        self.seen.add(setting)
        precise = [to_reference(value) for value in args]  # before the kernel, which may change running statistics
        found = kernel(*args)
        outputs = found if isinstance(found, tuple | list) else [found]
        for output, expected in zip(outputs, expect(*precise), strict=False):
            if output is not None and expected is not None:
                errors = compare(output, expected, coarsest(inputs))
                self.rows.append(Row(name_of(kernel), expected.output, setting_text(kernel, args), *errors))
        return found


def compare(output: torch.Tensor, expected: Expected, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest ratio of an error to its bound, and the ratio of the norms of both.

    `dtype` is the coarsest format among the kernel's inputs: a kernel may store its result in it
    before converting it.
    """
    stored = max(unit_roundoff(dtype), unit_roundoff(output.dtype))
    summed = min(stored, unit_roundoff(torch.float32))
    value = expected.value
    root = expected.terms**0.5
    of_sum = SLACK * root * summed * expected.magnitude
    of_stores = stored * expected.stores**0.5 * (value.abs() + expected.magnitude / root)
    if expected.exact:
        of_sum, of_stores = torch.zeros_like(value), torch.zeros_like(value)
    smallest = torch.finfo(output.dtype).tiny
    error = (output.detach().cpu().double() - value).abs().nan_to_num(nan=float("inf"))
    if not error.numel():
        return 0.0, 0.0
    worst = (error / (of_sum + TAIL * of_stores + smallest)).max().item()
    return worst, (error.norm() / (of_sum + of_stores + smallest).norm()).item()


def coarsest(tensors: list[torch.Tensor]) -> torch.dtype:
    """Return the dtype with the largest unit roundoff among floating-point tensors."""
    return max((tensor.dtype for tensor in tensors if tensor.is_floating_point()), key=unit_roundoff)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def to_reference(value: object) -> object:
    """Return a tensor in NCHW on the CPU, in float64 if it is floating-point, and anything else as
    it is.
    """
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu().contiguous()
    return value.double() if value.is_floating_point() else value.clone()


# ---- what is expected: a function of a kernel's arguments in float64 for each kernel


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *settings: object) -> list[Expected]:
    value = aten.convolution(x, weight, bias, *settings)
    magnitude = aten.convolution(x.abs(), weight.abs(), None if bias is None else bias.abs(), *settings)
    taps = area(weight.shape[2:])
    return [Expected("output", value, magnitude, terms=weight[0].numel() + (bias is not None), stores=taps)]


def convolution_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *settings: object
) -> list[Expected | None]:
    values = aten.convolution_backward(gradient, x, weight, *settings)
    magnitudes = aten.convolution_backward(gradient.abs(), x.abs(), weight.abs(), *settings)
    pixels = gradient.numel() // gradient.shape[1]
    of_input = weight.numel() // x.shape[1]
    names = ("gradient of the input", "gradient of the weights", "gradient of the bias")
    terms = (of_input, pixels, pixels)
    stores = (area(weight.shape[2:]), len(x), len(x))
    rows = zip(names, values, magnitudes, terms, stores, strict=True)
    return [None if value is None else Expected(name, value, *rest) for name, value, *rest in rows]


def linear_in_input(kernel: Callable, output: str) -> Callable:
    """Return what to expect of a kernel that is linear in its first argument, with coefficients of
    at least 0.
    """

    def expect(x: torch.Tensor, *settings: object) -> list[Expected]:
        value = kernel(x, *settings)
        terms = max(1, x.numel() // max(1, value.numel()))
        return [Expected(output, value, kernel(x.abs(), *settings), terms)]

    return expect


def average_pool(x: torch.Tensor, kernel_size: Sequence[int], *settings: object) -> list[Expected]:
    value = aten.avg_pool2d(x, kernel_size, *settings)
    magnitude = aten.avg_pool2d(x.abs(), kernel_size, *settings)
    taps = area(kernel_size)
    return [Expected("output", value, magnitude, taps, taps)]


def average_pool_backward(
    gradient: torch.Tensor, x: torch.Tensor, kernel_size: Sequence[int], *settings: object
) -> list[Expected]:
    value = aten.avg_pool2d_backward(gradient, x, kernel_size, *settings)
    magnitude = aten.avg_pool2d_backward(gradient.abs(), x, kernel_size, *settings)
    taps = area(kernel_size)
    return [Expected("gradient of the input", value, magnitude, taps, taps)]


def max_pool(x: torch.Tensor, *settings: object) -> list[Expected]:
    value, _ = aten.max_pool2d_with_indices(x, *settings)
    return [Expected("output", value, value.abs(), exact=True)]  # indices differ where two neighbours are equal


def max_pool_backward(
    gradient: torch.Tensor, x: torch.Tensor, kernel_size: Sequence[int], *settings: object
) -> list[Expected]:
    value = aten.max_pool2d_with_indices_backward(gradient, x, kernel_size, *settings)
    magnitude = aten.max_pool2d_with_indices_backward(gradient.abs(), x, kernel_size, *settings)
    taps = area(kernel_size)
    return [Expected("gradient of the input", value, magnitude, taps, taps)]


def area(kernel_size: Sequence[int]) -> int:
    return kernel_size[0] * kernel_size[-1]


def matrix_product(a: torch.Tensor, b: torch.Tensor) -> list[Expected]:
    return [Expected("output", a @ b, a.abs() @ b.abs(), terms=a.shape[-1])]


def matrix_product_and_sum(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[Expected]:
    return [Expected("output", c + a @ b, c.abs() + a.abs() @ b.abs(), terms=a.shape[-1] + 1)]


def log_softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> list[Expected]:
    value = torch.log_softmax(x, dim)
    return [Expected("output", value, value.abs() + x.abs().amax(dim, keepdim=True), terms=x.shape[dim])]


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> list[Expected]:
    """Of y, and in training of the batch's mean and inverse standard deviation."""
    count = x.numel() // x.shape[1]
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else (running_mean, running_var)
    inverse_std = (var + eps).rsqrt()
    scale = inverse_std if weight is None else inverse_std * weight
    shift = torch.zeros_like(mean) if bias is None else bias
    centred = per_channel(scale) * (x - per_channel(mean))
    y = centred + per_channel(shift)
    magnitude = per_channel(scale.abs()) * (x.abs() + per_channel(mean.abs())) + per_channel(shift.abs())
    if not training:
        return [Expected("output", y, magnitude)]
    of_mean = x.abs().mean((0, 2, 3))
    of_inverse_std = inverse_std * x.square().mean((0, 2, 3)) / (var + eps) / 2  # by its derivative with regard to var
    magnitude = magnitude + per_channel(scale.abs() * of_mean)
    magnitude = magnitude + centred.abs() * per_channel(of_inverse_std / inverse_std)
    return [
        Expected("output", y, magnitude, count),
        Expected("mean", mean, of_mean, count),
        Expected("inverse standard deviation", inverse_std, of_inverse_std + inverse_std, count),
    ]


def batch_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    mean: torch.Tensor | None,
    inverse_std: torch.Tensor | None,
    training: bool,
    eps: float,
    mask: Sequence[bool],
) -> list[Expected | None]:
    """Of the gradients of x, weight and bias."""
    count = x.numel() // x.shape[1]
    if not training:
        mean, inverse_std = running_mean, (running_var + eps).rsqrt()
    normal = (x - per_channel(mean)) * per_channel(inverse_std)
    normal_magnitude = (x.abs() + per_channel(mean.abs())) * per_channel(inverse_std)
    scale = per_channel(inverse_std if weight is None else inverse_std * weight)
    of_weight = (gradient * normal).sum((0, 2, 3))
    of_weight_magnitude = (gradient.abs() * normal_magnitude).sum((0, 2, 3))
    of_bias, of_bias_magnitude = gradient.sum((0, 2, 3)), gradient.abs().sum((0, 2, 3))
    of_x, of_x_magnitude = gradient, gradient.abs()
    if training:
        of_x = of_x - per_channel(of_bias / count) - normal * per_channel(of_weight / count)
        of_x_magnitude = of_x_magnitude + per_channel(of_bias_magnitude / count)
        of_x_magnitude = of_x_magnitude + normal_magnitude * per_channel(of_weight_magnitude / count)
    return [
        Expected("gradient of the input", scale * of_x, scale.abs() * of_x_magnitude, count) if mask[0] else None,
        Expected("gradient of the weights", of_weight, of_weight_magnitude, count) if mask[1] else None,
        Expected("gradient of the bias", of_bias, of_bias_magnitude, count) if mask[2] else None,
    ]


def batch_statistics(x: torch.Tensor, *settings: object) -> list[Expected]:
    count = x.numel() // x.shape[1]
    value = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    magnitude = x.abs().mean((0, 2, 3)), x.square().mean((0, 2, 3))
    return [Expected(name, *pair, count) for name, *pair in zip(("mean", "variance"), value, magnitude, strict=True)]


def per_channel(values: torch.Tensor) -> torch.Tensor:  # (C,) -> (1, C, 1, 1)
    return values.view(1, -1, 1, 1)


def cudnn_batch_norm_backward(
    x: torch.Tensor,
    gradient: torch.Tensor,
    weight: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    mean: torch.Tensor | None,
    inverse_std: torch.Tensor | None,
    eps: float,
    _: object,
) -> list[Expected | None]:
    mask = (True, True, True)
    return batch_norm_backward(gradient, x, weight, running_mean, running_var, mean, inverse_std, True, eps, mask)


EXPECTED = {
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.avg_pool2d.default: average_pool,
    aten.avg_pool2d_backward.default: average_pool_backward,
    aten.max_pool2d_with_indices.default: max_pool,
    aten.max_pool2d_with_indices_backward.default: max_pool_backward,
    aten._adaptive_avg_pool2d.default: linear_in_input(aten._adaptive_avg_pool2d, "output"),
    aten.mean.dim: linear_in_input(aten.mean.dim, "output"),
    aten.sum.dim_IntList: linear_in_input(aten.sum.dim_IntList, "output"),
    aten.mm.default: matrix_product,
    aten.addmm.default: matrix_product_and_sum,
    aten._log_softmax.default: log_softmax,
    aten.native_batch_norm.default: batch_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.cudnn_batch_norm.default: batch_norm,
    aten.cudnn_batch_norm_backward.default: cudnn_batch_norm_backward,
    aten.batch_norm_update_stats.default: batch_statistics,
}


# ---- words


def name_of(kernel: torch._ops.OpOverload) -> str:
    """Return the name of a kernel without its library and variant, such as "convolution"."""
    return kernel.name().split("::")[1].split(".")[0]


def setting_of(value: object) -> object:
    """Return what decides which kernel runs: device, dtype, shape and strides of a tensor, else the
    value as text.
    """
    if isinstance(value, torch.Tensor):
        return value.device.type, value.dtype, tuple(value.shape), value.stride()
    return str(value)


def setting_text(kernel: torch._ops.OpOverload, args: Sequence[object]) -> str:
    """Return the setting as text, such as "cpu, bfloat16, channels-last, 64x16x32x32, kernel 5x5,
    dilation 2".
    """
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    x = tensors[1] if kernel is aten.convolution_backward.default else tensors[0]
    parts = [x.device.type, str(x.dtype).removeprefix("torch.")]
    if x.dim() == 4 and not x.is_contiguous():
        parts.append("channels-last" if x.is_contiguous(memory_format=torch.channels_last) else "strided")
    parts.append("x".join(map(str, x.shape)))
    if kernel in (aten.convolution.default, aten.convolution_backward.default):
        weight = tensors[-1] if kernel is aten.convolution_backward.default else tensors[1]
        stride, _, dilation, *_, groups = args[3:9] if kernel is aten.convolution.default else args[4:10]
        parts.append("kernel " + "x".join(map(str, weight.shape[2:])))
        if groups > 1:
            parts.append(f"depthwise to {weight.shape[0]} channels")
        else:
            parts.append(f"to {weight.shape[0]} channels")
        parts += [f"stride {stride[0]}"] * (stride[0] > 1) + [f"dilation {dilation[0]}"] * (dilation[0] > 1)
    elif "pool2d" in name_of(kernel) and "adaptive" not in name_of(kernel):
        size, stride = [value for value in args if isinstance(value, tuple | list)][:2]
        parts += ["kernel " + "x".join(map(str, size)), f"stride {stride[0]}" if stride else "stride as the kernel"]
    return ", ".join(parts)
