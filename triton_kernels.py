"""Triton kernels for fitness on a GPU. Each one computes in one pass over memory what takes PyTorch several passes.

Feature maps (B, C, H, W) are channels-last. Each kernel has a reference in plain PyTorch next to
it. `errors` compares the two, and `usable` says whether a device may use the kernels. Only modules
that run on a GPU import this module, because Triton is missing on many other machines.
"""

import functools
import math
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from support import distributed

BLOCK = 1024  # elements of a program that works element by element
ELEMENTS = 1024  # pixels times channels that a program of `separable` computes at a time
PROGRAMS = 1024  # of `separable`, at most
LIMIT = 0.02  # largest error, as a share of the largest value, with which the kernels are used


def empty_map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return an empty channels-last feature map (B, channels, height, width)."""
    shape = (len(like), channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def pixel_stride(x: Tensor) -> int:
    """Return the distance in memory of neighbouring pixels of x, which may be a slice of a map with more channels."""
    for dim in (3, 2, 0):
        if x.shape[dim] > 1:  # the stride of a dimension of size 1 says nothing
            return x.stride(dim) // (math.prod(x.shape[2:]) if dim == 0 else math.prod(x.shape[dim + 1 :]))
    return x.shape[1]


# ---- with_border: the input of `nas201.fast_search.cell_by_source`


@triton.jit
def border_kernel(y, x0, x1, stride0, stride1, count, C, H, W, TWO: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)  # elements of a map (B, H + 2, W + 2, C)
    inside = i < count
    channel = i % C
    pixel = i // C
    column = pixel % (W + 2)
    row = pixel // (W + 2) % (H + 2)
    image = pixel // ((W + 2) * (H + 2))
    # The output is the mean of four pixels. Away from the border, they are four times the same one.
    row0 = tl.minimum(tl.maximum(row - 1, 0), H - 1)
    row1 = tl.where(row == 0, tl.minimum(1, H - 1), tl.where(row == H + 1, tl.maximum(H - 2, 0), row0))
    column0 = tl.minimum(tl.maximum(column - 1, 0), W - 1)
    column1 = tl.where(column == 0, tl.minimum(1, W - 1), tl.where(column == W + 1, tl.maximum(W - 2, 0), column0))
    total = tl.zeros([SIZE], tl.float32)
    for corner in tl.static_range(4):
        source_row = row0 if corner < 2 else row1
        source_column = column0 if corner % 2 == 0 else column1
        source = (image * H + source_row) * W + source_column
        total += tl.load(x0 + source * stride0 + channel, mask=inside, other=0.0).to(tl.float32)
        if TWO:
            total += tl.load(x1 + source * stride1 + channel, mask=inside, other=0.0).to(tl.float32)
    mean = total / 4
    at_border = (row == 0) | (row == H + 1) | (column == 0) | (column == W + 1)
    active = tl.where(at_border, 0.0, tl.maximum(mean, 0.0))
    tl.store(y + pixel * 2 * C + channel, active, mask=inside)
    tl.store(y + pixel * 2 * C + C + channel, mean, mask=inside)


def border_reference(parts: list[Tensor]) -> Tensor:
    """Compute `with_border`: ReLU(x) and x for the sum x of the parts, each with a border of one pixel.

    The border of ReLU(x) is 0, as in a padded convolution. The border of x is the mean of the two
    pixels next to it. So at the margin the mean of three pixels, one of them of the border, is the
    mean of the two others: a pool over 3x3 pixels computes what `average_pool` computes, which does
    not count padding.
    """
    x = sum(parts)
    active = F.pad(torch.relu(x), (1, 1, 1, 1))
    for dim in (2, 3):
        first = x.narrow(dim, 0, min(2, x.shape[dim])).mean(dim, keepdim=True)
        last = x.narrow(dim, max(0, x.shape[dim] - 2), min(2, x.shape[dim])).mean(dim, keepdim=True)
        x = torch.cat([first, x, last], dim)
    return torch.cat([active, x], dim=1)


@torch.library.custom_op("evnas::with_border", mutates_args=(), schema="(Tensor[] parts) -> Tensor")
def with_border(parts: list[Tensor]) -> Tensor:
    """Sum one or two parts (B, C, H, W), and make the sum's input for `nas201.fast_search.cell_by_source`.

    Returns (B, 2 * C, H + 2, W + 2), see `border_reference`.
    """
    x0 = parts[0]
    x1 = parts[-1]
    C, H, W = x0.shape[1:]
    y = empty_map(x0, 2 * C, H + 2, W + 2)
    count = y.numel() // 2
    strides = (pixel_stride(x0), pixel_stride(x1))
    border_kernel[(triton.cdiv(count, BLOCK),)](y, x0, x1, *strides, count, C, H, W, TWO=len(parts) == 2, SIZE=BLOCK)
    return y


@with_border.register_fake
def _(parts: list[Tensor]) -> Tensor:
    C, H, W = parts[0].shape[1:]
    return empty_map(parts[0], 2 * C, H + 2, W + 2)


# ---- separable: ReLU, depthwise convolution and 1x1 convolution, for the candidates of the DARTS space


@triton.jit
def separable_kernel(
    y,
    moments,  # (programs, 3, C), of each program's pixels: number, mean, sum of squared deviations
    x,
    affine,  # (2, C)
    depthwise,  # (C, 1, K, K)
    pointwise,  # (C, C, 1, 1)
    pixels,
    H_in,
    W_in,
    H,
    W,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C, rounded up to a power of 2
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    AFFINE: tl.constexpr,
    SIZE: tl.constexpr,  # pixels at a time
):
    channel = tl.arange(0, CHANNELS)
    has_channel = channel < C
    both = has_channel[:, None] & has_channel[None, :]
    dtype = y.dtype.element_ty
    # pointwise[out, in], read as (in, out)
    matrix = tl.load(pointwise + channel[None, :] * C + channel[:, None], mask=both, other=0.0).to(dtype)
    if AFFINE:
        factor = tl.load(affine + channel, mask=has_channel, other=0.0)
        offset = tl.load(affine + C + channel, mask=has_channel, other=0.0)
    count = 0.0
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for first in range(tl.program_id(0) * SIZE, pixels, tl.num_programs(0) * SIZE):
        pixel = first + tl.arange(0, SIZE)
        has_pixel = pixel < pixels
        column = pixel % W
        row = pixel // W % H
        image = pixel // (W * H)
        total = tl.zeros([SIZE, CHANNELS], tl.float32)
        for tap in range(K * K):
            source_row = row * STRIDE + (tap // K - K // 2) * DILATION
            source_column = column * STRIDE + (tap % K - K // 2) * DILATION
            inside = has_pixel & (source_row >= 0) & (source_row < H_in) & (source_column >= 0) & (source_column < W_in)
            inside = inside[:, None] & has_channel[None, :]
            source = (image * H_in + source_row) * W_in + source_column
            value = tl.load(x + source[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            if AFFINE:
                value = tl.where(inside, value * factor[None, :] + offset[None, :], 0.0)
            weight = tl.load(depthwise + channel * K * K + tap, mask=has_channel, other=0.0).to(tl.float32)
            total += tl.maximum(value, 0.0) * weight[None, :]
        result = tl.dot(total.to(dtype), matrix, input_precision="ieee").to(dtype)
        stored = has_pixel[:, None] & has_channel[None, :]
        tl.store(y + pixel[:, None] * C + channel[None, :], result, mask=stored)
        # Merge the moments of these pixels with those of the pixels before them.
        result = result.to(tl.float32)
        new_count = tl.sum(has_pixel.to(tl.float32))
        new_mean = tl.sum(tl.where(stored, result, 0.0), 0) / new_count
        deviation = tl.where(stored, result - new_mean[None, :], 0.0)
        between = new_mean - mean
        share = new_count / (count + new_count)
        squares += tl.sum(deviation * deviation, 0) + between * between * count * share
        mean += between * share
        count += new_count
    place = moments + tl.program_id(0) * 3 * C + channel
    tl.store(place, tl.zeros([CHANNELS], tl.float32) + count, mask=has_channel)
    tl.store(place + C, mean, mask=has_channel)
    tl.store(place + 2 * C, squares, mask=has_channel)


@torch.library.custom_op(
    "evnas::separable",
    mutates_args=(),
    schema="(Tensor x, Tensor depthwise, Tensor pointwise, int stride, int dilation, Tensor? affine, "
    f"int most_programs={PROGRAMS}) -> (Tensor, Tensor)",
)
def separable(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    stride: int,
    dilation: int,
    affine: Tensor | None,
    most_programs: int = PROGRAMS,
) -> tuple[Tensor, Tensor]:
    """Convolve ReLU(x) for x (B, C, H, W): depthwise with a kernel (C, 1, K, K), then with a 1x1 kernel (C, C, 1, 1).

    `affine` (2, C) has factors and offsets that are applied to x before the ReLU. Returns the result
    (B, C, H / stride, W / stride), and its moments for `normalisation`. At most `most_programs`
    programs of the GPU share the work, and each has its own moments.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    C, H, W = x.shape[1:]
    K = depthwise.shape[-1]
    y = empty_map(x, C, H // stride, W // stride)
    pixels = y.numel() // C
    channels = max(16, triton.next_power_of_2(C))
    size = max(16, ELEMENTS // channels)
    programs = min(most_programs, triton.cdiv(pixels, size))
    moments = torch.empty(programs, 3, C, device=x.device)
    separable_kernel[(programs,)](
        y,
        moments,
        x,
        x if affine is None else affine,
        depthwise,
        pointwise,
        pixels,
        H,
        W,
        *y.shape[2:],
        C=C,
        CHANNELS=channels,
        K=K,
        STRIDE=stride,
        DILATION=dilation,
        AFFINE=affine is not None,
        SIZE=size,
    )
    return y, moments


@separable.register_fake
def _(x, depthwise, pointwise, stride, dilation, affine, most_programs=PROGRAMS):
    C, H, W = x.shape[1:]
    return empty_map(x, C, H // stride, W // stride), torch.empty(most_programs, 3, C, device=x.device)


def separable_reference(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, stride: int, dilation: int, affine: Tensor | None
) -> Tensor:
    """Compute the first result of `separable`."""
    if affine is not None:
        x = x * affine[0].view(-1, 1, 1) + affine[1].view(-1, 1, 1)
    padding = depthwise.shape[-1] // 2 * dilation
    return F.conv2d(F.conv2d(F.relu(x), depthwise, None, stride, padding, dilation, len(depthwise)), pointwise)


# ---- normalisation: batch statistics as factors and offsets


@triton.jit
def normalisation_kernel(
    affine,  # (2, C)
    moments,
    weight,
    programs,
    pixels,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
):
    channel = tl.arange(0, CHANNELS)
    has_channel = channel < C
    sums = tl.zeros([SIZE, CHANNELS], tl.float32)
    for first in range(0, programs, SIZE):
        program = first + tl.arange(0, SIZE)
        mask = (program < programs)[:, None] & has_channel[None, :]
        place = moments + program[:, None] * 3 * C + channel[None, :]
        sums += tl.load(place, mask=mask, other=0.0) * tl.load(place + C, mask=mask, other=0.0)
    mean = tl.sum(sums, 0) / pixels
    # The sum of squared deviations is that within the programs plus that of the programs' means.
    squares = tl.zeros([SIZE, CHANNELS], tl.float32)
    for first in range(0, programs, SIZE):
        program = first + tl.arange(0, SIZE)
        mask = (program < programs)[:, None] & has_channel[None, :]
        place = moments + program[:, None] * 3 * C + channel[None, :]
        between = tl.load(place + C, mask=mask, other=0.0) - mean[None, :]
        squares += tl.load(place + 2 * C, mask=mask, other=0.0)
        squares += tl.load(place, mask=mask, other=0.0) * between * between
    factor = tl.load(weight) / tl.sqrt(tl.sum(squares, 0) / pixels + eps)
    tl.store(affine + channel, factor, mask=has_channel)
    tl.store(affine + C + channel, -mean * factor, mask=has_channel)


@torch.library.custom_op(
    "evnas::normalisation", mutates_args=(), schema="(Tensor moments, Tensor weight, int pixels, float eps) -> Tensor"
)
def normalisation(moments: Tensor, weight: Tensor, pixels: int, eps: float) -> Tensor:
    """Return BatchNorm with batch statistics, times `weight` (one value), as factors and offsets (2, C).

    `moments` come from `separable`, and `pixels` is the number of values per channel, B * H * W.
    """
    programs, _, C = moments.shape
    affine = torch.empty(2, C, device=moments.device)
    sizes = {"C": C, "CHANNELS": triton.next_power_of_2(C), "SIZE": 64}
    normalisation_kernel[(1,)](affine, moments, weight, programs, pixels, eps, **sizes)
    return affine


@normalisation.register_fake
def _(moments: Tensor, weight: Tensor, pixels: int, eps: float) -> Tensor:
    return torch.empty(2, moments.shape[2], device=moments.device)


def normalisation_reference(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `normalisation` from the feature map y (B, C, H, W) that `separable` returned."""
    variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    factor = weight * torch.rsqrt(variance + eps)
    return torch.stack([factor, -mean * factor])


# ---- weighted_sum: the candidates of an edge of the DARTS space


@triton.jit
def weighted_term(place, affine, channel, C, inside):
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(affine + channel, mask=inside, other=0.0)
    offset = tl.load(affine + C + channel, mask=inside, other=0.0)
    return value * factor + offset


@triton.jit
def weighted_sum_kernel(
    y,
    total,
    x0,
    x1,
    x2,
    x3,
    x4,
    x5,
    x6,
    stride4,
    affine,  # (7, 2, C)
    count,
    C,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < count
    channel = i % C
    result = tl.zeros([SIZE], tl.float32)
    if not FIRST:
        result = tl.load(total + i, mask=inside, other=0.0).to(tl.float32)
    result += weighted_term(x0 + i, affine, channel, C, inside)
    result += weighted_term(x1 + i, affine + 2 * C, channel, C, inside)
    result += weighted_term(x2 + i, affine + 4 * C, channel, C, inside)
    result += weighted_term(x3 + i, affine + 6 * C, channel, C, inside)
    result += weighted_term(x4 + i // C * stride4 + channel, affine + 8 * C, channel, C, inside)
    result += weighted_term(x5 + i, affine + 10 * C, channel, C, inside)
    result += weighted_term(x6 + i, affine + 12 * C, channel, C, inside)
    tl.store(y + i, result, mask=inside)


@torch.library.custom_op(
    "evnas::weighted_sum", mutates_args=(), schema="(Tensor? total, Tensor[] maps, Tensor affine) -> Tensor"
)
def weighted_sum(total: Tensor | None, maps: list[Tensor], affine: Tensor) -> Tensor:
    """Add seven maps (B, C, H, W), each with its factors and offsets in `affine` (7, 2, C), to `total` (None is 0).

    The fifth map may be a slice of more channels.
    """
    maps = [x if k == 4 else x.contiguous(memory_format=torch.channels_last) for k, x in enumerate(maps)]
    y = empty_map(maps[0], *maps[0].shape[1:])
    settings = {"FIRST": total is None, "SIZE": BLOCK}
    grid = (triton.cdiv(y.numel(), BLOCK),)
    before = maps[0] if total is None else total
    weighted_sum_kernel[grid](y, before, *maps, pixel_stride(maps[4]), affine, y.numel(), y.shape[1], **settings)
    return y


@weighted_sum.register_fake
def _(total: Tensor | None, maps: list[Tensor], affine: Tensor) -> Tensor:
    return empty_map(maps[0], *maps[0].shape[1:])


def weighted_sum_reference(total: Tensor | None, maps: list[Tensor], affine: Tensor) -> Tensor:
    """Compute `weighted_sum`."""
    terms = [
        x * factor.view(-1, 1, 1) + offset.view(-1, 1, 1) for x, (factor, offset) in zip(maps, affine, strict=True)
    ]
    return sum(terms) if total is None else total + sum(terms)


# ---- whether a device may use them


@torch.no_grad()
def errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Compare each kernel with its reference in float64. Returns {case: largest error / largest value}."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x

    def error(actual: Tensor, expected: Tensor) -> float:
        return ((actual.double() - expected).abs().max() / expected.abs().max()).item()

    found = {}
    for H, W in ((1, 1), (2, 3), (5, 6)):
        x = random(3, 8, H, W)
        parts = [x[:, :4], x[:, 4:]]
        expected = border_reference([part.double() for part in parts])
        found[f"border of {H}x{W}"] = error(with_border(parts), expected)
        found[f"border of {H}x{W}, one part"] = error(with_border(parts[1:]), border_reference([parts[1].double()]))
    for C, K, stride, dilation in ((16, 3, 1, 1), (24, 5, 1, 2), (16, 5, 2, 1), (5, 3, 2, 2)):
        x = random(2, C, 6, 10)
        depthwise = random(C, K * K).view(C, 1, K, K)
        pointwise = random(C, C).view(C, C, 1, 1)
        weight = torch.rand((), generator=generator).to(device)
        case = f"C {C}, kernel {K}, stride {stride}, dilation {dilation}"
        for affine in (None, torch.randn(2, C, generator=generator).to(device)):
            y, moments = separable(x, depthwise, pointwise, stride, dilation, affine, most_programs=2)
            precise = (x.double(), depthwise.double(), pointwise.double(), stride, dilation)
            expected = separable_reference(*precise, None if affine is None else affine.double())
            name = case if affine is None else f"{case}, normalised"
            found[f"convolution, {name}"] = error(y, expected)
            actual = normalisation(moments, weight, y.numel() // C, 1e-5)
            found[f"statistics, {name}"] = error(actual, normalisation_reference(y.double(), weight.double(), 1e-5))
    for total in (None, random(3, 16, 6, 6)):
        maps = [random(3, 16, 6, 6) for _ in range(7)]
        maps[4] = random(3, 32, 6, 6)[:, 16:]
        affine = torch.randn(7, 2, 16, generator=generator).to(device)
        precise = (None if total is None else total.double(), [x.double() for x in maps], affine.double())
        found[f"sum, {total is None}"] = error(weighted_sum(total, maps, affine), weighted_sum_reference(*precise))
    return found


@functools.cache
def usable(device: torch.device) -> bool:
    """Return whether all kernels compute the right values in bfloat16 on a device. If not, print a note."""
    try:
        found = errors(device, torch.bfloat16)
        case = max(found, key=lambda case: (found[case] != found[case], found[case]))  # NaN counts as the largest
        problem = None if found[case] <= LIMIT else f"{case}: relative error {found[case]:.2g}"
    except Exception as error:  # Triton's compilers raise many kinds
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem is not None:
        distributed.say(
            f"note: fitness uses PyTorch's kernels, because Triton's fail here ({problem})", file=sys.stderr
        )
    return problem is None
