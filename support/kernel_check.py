"""Compare each PyTorch kernel that a program calls with float64 arithmetic in NCHW on the CPU.

    with KernelCheck() as check:
        loss = network(x).mean()
        loss.backward()
    wrong = [row for row in check.rows if row.worst > 1]

Convolutions, matrix products, BatchNorms, pools and means are checked. Each of these operations is
computed a second time from the kernel's own inputs, so that errors do not add up from one operation
to the next. Each kernel is checked once for each combination of shapes, layouts, dtypes and
settings.

The bound on an error has two parts.

- Summation: we expect a kernel to round each addition to float32 or better. The error of a sum of n
  terms is then about sqrt(n) u times the sum of the terms' magnitudes, where u is the unit roundoff
  (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019). We allow `SLACK` times this error, because fast
  algorithms such as Winograd's add transformed terms.
- Storage: a kernel may store partial sums in the format of the result. A gradient of weights may
  store one partial sum for each image, and a convolution one for each tap of its kernel. A random
  partial sum is about as large as the square root of the sum of its squared terms. This square root
  is at least the sum of the terms' magnitudes, divided by sqrt(n).

We did not fit the bound to any measured error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
SLACK = 16
TAIL = 6  # the largest of a million normal errors is within this number of standard deviations


@dataclass(frozen=True)
class Row:
    """The errors of one output of a kernel, as multiples of the error that rounding explains.

    `worst` is the largest ratio of an element's error to the element's bound. `overall` is the norm
    of all errors divided by the norm of the errors that rounding explains.
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
    """The expected value of one output of a kernel, and what its rounding error depends on.

    `value` is in float64 on the CPU. Each element is a sum of `terms` terms, and `magnitude` is the
    sum of the magnitudes of these terms. `stores` is the number of partial sums that a kernel may
    store in the format of the result. If `exact`, the output only copies elements of an input, so
    nothing is rounded.
    """

    output: str
    value: torch.Tensor
    magnitude: torch.Tensor
    terms: int = 1
    stores: int = 1
    exact: bool = False


class KernelCheck(TorchDispatchMode):
    """Checks each kernel that is called in its `with` block.

    `rows` gets a Row for each output of each kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.seen = set()

    def __torch_dispatch__(
        self, kernel: torch._ops.OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Run a kernel, and compare the kernel's outputs with the expected values."""
        kwargs = kwargs or {}
        expect = EXPECTED.get(kernel)
        inputs = [value for value in args if isinstance(value, torch.Tensor)]
        if expect is None or kwargs or not inputs or not inputs[0].is_floating_point():
            return kernel(*args, **kwargs)
        setting = (str(kernel), *(setting_of(value) for value in args))
        if setting in self.seen:
            return kernel(*args)
        self.seen.add(setting)
        # Copy the inputs before the kernel runs, because the kernel may change running statistics.
        precise = [to_reference(value) for value in args]
        found = kernel(*args)
        outputs = found if isinstance(found, tuple | list) else [found]
        for output, expected in zip(outputs, expect(*precise), strict=False):
            if output is not None and expected is not None:
                errors = compare(output, expected, coarsest(inputs))
                self.rows.append(Row(name_of(kernel), expected.output, setting_text(kernel, args), *errors))
        return found


def compare(output: torch.Tensor, expected: Expected, dtype: torch.dtype) -> tuple[float, float]:
    """Return the errors of an output as `worst` and `overall` of a Row.

    `dtype` is the coarsest format among the kernel's inputs. A kernel may round its result to this
    format before it converts the result to the format of the output.
    """
    stored = max(unit_roundoff(dtype), unit_roundoff(output.dtype))
    summed = min(stored, unit_roundoff(torch.float32))
    value = expected.value
    root = expected.terms**0.5
    of_sum = SLACK * root * summed * expected.magnitude  # the summation part of the bound
    # The storage part. Rounding errors of stored partial sums are independent, so their sum grows
    # with the square root of their number.
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
    """Return a tensor in NCHW on the CPU, converted to float64 if it is floating-point.

    Any other value is returned unchanged.
    """
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu().contiguous()
    return value.double() if value.is_floating_point() else value.clone()


# ---- expected outputs: each function gets the arguments of its kernel in float64


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
    # Each output pixel of each image adds one term to a weight's gradient. A pixel of one input
    # channel is multiplied with `of_input` weights.
    pixels = gradient.numel() // gradient.shape[1]
    of_input = weight.numel() // x.shape[1]
    names = ("gradient of the input", "gradient of the weights", "gradient of the bias")
    terms = (of_input, pixels, pixels)
    stores = (area(weight.shape[2:]), len(x), len(x))
    rows = zip(names, values, magnitudes, terms, stores, strict=True)
    return [None if value is None else Expected(name, value, *rest) for name, value, *rest in rows]


def linear_in_input(kernel: Callable, output: str) -> Callable:
    """Return the function for `EXPECTED` of a kernel that is linear in its first argument.

    The kernel's coefficients must be at least 0. The kernel of |x| is then the sum of the
    magnitudes of the terms.
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
    # The indices are not compared, because they may differ where two neighbours are equal.
    return [Expected("output", value, value.abs(), exact=True)]


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
    """Return the expected y and, in training, the expected mean and inverse std of the batch."""
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
    # The magnitude of the variance, times the derivative of (var + eps) ** -0.5.
    of_inverse_std = inverse_std * x.square().mean((0, 2, 3)) / (var + eps) / 2
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
    """Return the expected gradients of x, weight and bias."""
    count = x.numel() // x.shape[1]
    if not training:
        mean = running_mean
        inverse_std = (running_var + eps).rsqrt()
    normal = (x - per_channel(mean)) * per_channel(inverse_std)
    normal_magnitude = (x.abs() + per_channel(mean.abs())) * per_channel(inverse_std)
    scale = per_channel(inverse_std if weight is None else inverse_std * weight)
    of_weight = (gradient * normal).sum((0, 2, 3))
    of_weight_magnitude = (gradient.abs() * normal_magnitude).sum((0, 2, 3))
    of_bias, of_bias_magnitude = gradient.sum((0, 2, 3)), gradient.abs().sum((0, 2, 3))
    of_x = gradient
    of_x_magnitude = gradient.abs()
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
    """Return the part of an argument that decides which kernel runs.

    For a tensor this is its device, dtype, shape and strides. Any other value is returned as text.
    """
    if isinstance(value, torch.Tensor):
        return value.device.type, value.dtype, tuple(value.shape), value.stride()
    return str(value)


def setting_text(kernel: torch._ops.OpOverload, args: Sequence[object]) -> str:
    """Return a kernel's device, dtype, layout, shapes and settings as text.

    An example is "cpu, bfloat16, channels-last, 64x16x32x32, kernel 5x5, dilation 2".
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
