"""Faster BatchNorm, depthwise convolutions and pools, for the fast paths of both search spaces."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from operations import average_pool, depthwise_conv, in_low_precision_on_cpu, neighbour_mean, on_cpu, split_phases
from support.devices import memory_format

# Without gradients, batch statistics on a CPU are computed from parts of the batch of about this
# many pixels: see `batch_norm_stats`.
PIXELS_PER_PART = 2**14


# ---- layout


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along channels: k tensors (B, C, H, W) -> (B, k C, H, W).

    The gradient of each part is dense, in the layout that the layer before it expects.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return Concatenate.apply(*tensors)
    # If `Concatenate.apply` of two tensors is compiled without gradients, it returns one of its
    # inputs.
    return torch.cat(tensors, dim=1)


class Concatenate(torch.autograd.Function):
    """`torch.cat` along channels whose gradients are dense copies instead of views."""

    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim=1)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        parts = grad.chunk(len(ctx.needs_input_grad), dim=1)
        return tuple(part.contiguous(memory_format=memory_format(part.device)) for part in parts)


def every_second(x: Tensor, first: int) -> Tensor:
    """Return x[:, :, first::2, first::2] as a dense tensor whose gradient is dense too."""
    if memory_format(x.device) == torch.channels_last:
        return x.permute(0, 2, 3, 1)[:, first::2, first::2].contiguous().permute(0, 3, 1, 2)
    return x[:, :, first::2, first::2].contiguous()


# ---- BatchNorm


class NormUpdate(NamedTuple):
    """The batch statistics with which a BatchNorm's running statistics are updated."""

    norm: nn.BatchNorm2d
    mean: Tensor  # (C,)
    inverse_std: Tensor  # (C,), 1 / sqrt(biased variance + eps)
    count: int  # values per channel, B * H * W


def batch_norm(x: Tensor, norm: nn.BatchNorm2d, updates: list[NormUpdate] | None) -> Tensor:
    """Apply a BatchNorm module to x (B, C, H, W) without updating the module's running statistics.

    If `updates` is a list, x is normalised with the batch statistics, and they are appended to the
    list for `move_statistics`. If `updates` is None, x is normalised with the running statistics.
    """
    if updates is None:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    y, mean, inverse_std = batch_norm_stats(x, norm.weight, norm.bias, norm.eps)
    updates.append(NormUpdate(norm, mean, inverse_std, count=x.numel() // x.shape[1]))
    return y


def batch_norm_stats(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x (B, C, H, W) with the batch's statistics.

    Returns (y (B, C, H, W), mean (C,), inverse_std (C,)), where inverse_std is
    1 / sqrt(biased variance + eps).

    On a CPU, torch sums a channels-last tensor in one float32 accumulator, so the variance of a
    large batch has an error of 1e-5. Without gradients we give torch smaller parts of the batch and
    combine the statistics of the parts. With gradients we use `ExactBatchNormCPU`.
    """
    if not on_cpu(x):
        return torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, eps)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler would fuse the parts of the batch again
        return ExactBatchNormCPU.apply(x, scale, shift, eps)
    images_per_part = max(1, PIXELS_PER_PART // x[0, 0].numel())
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).split(images_per_part)
    part_means = []
    part_variances = []
    for part in parts:
        mean, variance = torch.batch_norm_update_stats(part, None, None, 0.0)  # (C,), biased variance (C,)
        part_means.append(mean)
        part_variances.append(variance)
    means = torch.stack(part_means)  # (parts, C)
    variances = torch.stack(part_variances)  # (parts, C)
    shares = means.new_tensor([len(part) / len(x) for part in parts]).unsqueeze(1)  # (parts, 1)
    mean = (shares * means).sum(0)
    # The variance of the batch is the mean variance within the parts plus the variance of their
    # means.
    variance = (shares * (variances + (means - mean).square())).sum(0)
    y = F.batch_norm(x, mean, variance, scale, shift, False, eps=eps)
    return y, mean, torch.rsqrt(variance + eps)


class ExactBatchNormCPU(torch.autograd.Function):
    """`batch_norm_stats` with gradients; the variance is computed as the mean squared deviation.

    Training needs this precision: a tiny error can turn a ReLU on or off, which changes the
    gradients visibly.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, C), a view if channels-last
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        mean = rows.mean(0)
        variance = (rows - mean).square_().mean(0)
        inverse_std = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, scale, mean, inverse_std)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, inverse_std)
        return F.batch_norm(x, mean, variance, scale, shift, False, eps=eps), mean, inverse_std

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, inverse_std = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, inverse_std, True, ctx.eps, needed
        )
        return *gradients, None


@torch.no_grad()
def move_statistics(updates: Iterable[NormUpdate]) -> None:
    """Update running statistics as BatchNorm modules do in training, with few kernels for all modules.

    BatchNorms without running statistics are skipped. All other BatchNorms must have the same
    momentum and eps.
    """
    updates = [update for update in updates if update.norm.running_mean is not None]
    norms = [update.norm for update in updates]
    momentum = norms[0].momentum
    variances = torch._foreach_pow([update.inverse_std for update in updates], -2)
    torch._foreach_sub_(variances, norms[0].eps)
    torch._foreach_mul_(variances, [update.count / (update.count - 1) for update in updates])  # unbiased
    torch._foreach_lerp_([norm.running_mean for norm in norms], [update.mean for update in updates], momentum)
    torch._foreach_lerp_([norm.running_var for norm in norms], variances, momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def split_update(norms: list[nn.BatchNorm2d], mean: Tensor, inverse_std: Tensor, count: int) -> Iterator[NormUpdate]:
    """Yield the update of each of k BatchNorms that were computed as one, from their joint statistics.

    If all k BatchNorms normalised the same C channels, `mean` is (C,) and applies to each
    BatchNorm. If the input was k * C concatenated channels, `mean` is (k * C,) and each BatchNorm
    gets C values.
    """
    same_channels = len(mean) == norms[0].num_features
    means = [mean] * len(norms) if same_channels else mean.chunk(len(norms))
    inverse_stds = [inverse_std] * len(norms) if same_channels else inverse_std.chunk(len(norms))
    for norm, norm_mean, norm_inverse_std in zip(norms, means, inverse_stds, strict=True):
        yield NormUpdate(norm, norm_mean, norm_inverse_std, count)


# ---- pools and depthwise convolutions


def fast_average_pool(x: Tensor, stride: int = 1) -> Tensor:
    """Compute `average_pool` in the fastest way for the device: on a CPU, as a depthwise convolution."""
    return neighbour_mean(x, stride) if on_cpu(x) else average_pool(x, stride)


def depthwise(x: Tensor, kernel: Tensor, dilation: int = 1, even: Tensor | None = None) -> Tensor:
    """Convolve each channel of x (B, C, H, W) with its own kernel; `kernel` holds all of them, (C, 1, k, k).

    Without `even` the stride is 1. With `even`, which is every_second(x, 0), the stride is 2 and
    the result is (B, C, H / 2, W / 2).
    """
    padding = dilation * (kernel.shape[-1] // 2)
    stride = 1 if even is None else 2
    if stride == 2 and dilation == 2:
        # Stride, dilation and padding are all even, so only pixels with even coordinates enter the
        # sums. On only these pixels, the convolution has stride 1 and dilation 1.
        x = even
        stride = 1
        padding = padding // 2
        dilation = 1
    if on_cpu(x) and x.requires_grad and not in_low_precision_on_cpu(x):
        return Depthwise.apply(x, kernel, stride, padding, dilation)
    return depthwise_conv(x, kernel, stride, padding, dilation)


class Depthwise(torch.autograd.Function):
    """Depthwise convolution for CPUs, whose backward pass avoids the cases in which oneDNN is slow.

    oneDNN is slow for dilated convolutions and for the gradients of kernels wider than 3. A dilated
    convolution becomes an undilated one on the phases of the image (see `split_phases`). The
    gradient of a 5x5 kernel is computed in two halves of three columns each, which share the middle
    column.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.settings = (stride, padding, dilation)
        return F.conv2d(x, kernel, None, stride, padding, dilation, len(kernel))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        stride, padding, dilation = ctx.settings
        C, _, k, _ = kernel.shape
        if stride == 1:
            grad_x = F.conv2d(grad, kernel.flip(2, 3), None, 1, padding, dilation, C)
        else:
            grad_x = conv2d_input(x.shape, kernel, grad, stride, padding, dilation, C)
        if dilation == 2 and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            x = split_phases(x)
            grad = split_phases(grad)
            padding = padding // 2
            dilation = 1
        if k == 5 and dilation == 1:
            x = F.pad(x, (2, 2, 2, 2))
            left = conv2d_weight(x[..., :-2], (C, 1, 5, 3), grad, stride, 0, 1, C)  # columns 0, 1, 2
            right = conv2d_weight(x[..., 2:], (C, 1, 5, 3), grad, stride, 0, 1, C)  # columns 2, 3, 4
            grad_kernel = torch.cat([left, right[..., 1:]], dim=3)
        else:
            grad_kernel = conv2d_weight(x, kernel.shape, grad, stride, padding, dilation, C)
        return grad_x, grad_kernel, None, None, None


# ---- Triton


def uses_triton(x: Tensor) -> bool:
    """Return whether fitness computes feature maps like x with the kernels of `triton_kernels`.

    These are for bfloat16 on CUDA, and count elements in 32 bits. They are checked first, once in
    each process.
    """
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or 8 * x.numel() >= 2**31:
        return False
    try:
        import triton_kernels
    except ImportError:  # builds of PyTorch without Triton
        return False
    return triton_kernels.usable(x.device)
