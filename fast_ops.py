"""BatchNorm, depthwise convolutions and pools computed faster, for the supernets of both spaces."""

import functools

import torch
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

PIXELS = 2**14  # whose statistics are computed at a time where there are no gradients


@functools.cache
def compiled(cell):
    # Cells of several sizes, with and without gradients, and a last, smaller batch: more shapes than the default limit.
    # Newer releases call the setting recompile_limit and keep this name, the only one of torch 2.6, for it.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    return torch.compile(cell, dynamic=False)


class Concatenate(torch.autograd.Function):
    """Along channels. The gradients handed back are dense and channels-last, as everything before expects."""

    @staticmethod
    def forward(ctx, *tensors):
        return torch.cat(tensors, dim=1)

    @staticmethod
    def backward(ctx, grad):
        parts = grad.chunk(len(ctx.needs_input_grad), dim=1)
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)


def every_second(x, first):
    """x[:, :, first::2, first::2], channels-last in both directions."""
    return x.permute(0, 2, 3, 1)[:, first::2, first::2].contiguous().permute(0, 3, 1, 2)


def batch_norm(x, norms, bn_updates, weight=None):
    """x through any of `norms`, which are alike, times the mixing weight (C,), which takes the place of their scale.

    With the batch's statistics, which `bn_updates` gets with the norms; with the running ones where it is None.
    """
    bn = norms[0]
    scale, shift = (bn.weight, bn.bias) if weight is None else (weight, None)
    if bn_updates is None:
        return F.batch_norm(x, bn.running_mean, bn.running_var, scale, shift, False, 0.0, bn.eps)
    y, mean, var = batch_norm_stats(x, scale, shift, bn.eps)
    bn_updates += [(bn, mean, var, x.numel() // x.shape[1]) for bn in norms]
    return y


def batch_norm_stats(x, scale, shift, eps):
    """BatchNorm with the batch's statistics, and these: (y, mean, biased variance).

    On a CPU torch sums a channels-last tensor up in one float32 accumulator, which errs by 1e-5 in the variance.
    Without gradients it is given fewer pixels at a time; with them see ExactBatchNormCPU.
    """
    if x.is_cuda:
        y, mean, inverse_std = torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, eps)
        return y, mean, inverse_std.square().reciprocal() - eps
    if torch.is_grad_enabled():
        return ExactBatchNormCPU.apply(x, scale, shift, eps)
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).split(max(1, PIXELS // x[0, 0].numel()))
    moments = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]  # mean, biased variance
    means, variances = (torch.stack(of) for of in zip(*moments, strict=True))  # (parts, C)
    shares = means.new_tensor([len(part) / len(x) for part in parts]).unsqueeze(1)
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return F.batch_norm(x, mean, var, scale, shift, False, eps=eps), mean, var


class ExactBatchNormCPU(torch.autograd.Function):
    """`batch_norm_stats` with gradients, for which the smallest error can flip a ReLU and so become visible."""

    @staticmethod
    def forward(ctx, x, scale, shift, eps):
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, C), a view if channels-last
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        mean = rows.mean(0)
        var = (rows - mean).square_().mean(0)
        ctx.save_for_backward(x, scale, mean, torch.rsqrt(var + eps))
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, scale, shift, False, eps=eps), mean, var

    @staticmethod
    def backward(ctx, gradient, *_):
        x, scale, mean, inverse_std = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        return *torch.ops.aten.native_batch_norm_backward(
            gradient, x, scale, None, None, mean, inverse_std, True, ctx.eps, needed
        ), None


@torch.no_grad()
def move_statistics(bn_updates):
    """Move the running statistics as training does, from [(module, mean, biased variance, count)], in few kernels."""
    bn_updates = [update for update in bn_updates if update[0].running_mean is not None]
    norms, means, variances, counts = zip(*bn_updates, strict=True)
    variances = torch._foreach_mul(variances, [count / (count - 1) for count in counts])
    torch._foreach_lerp_([bn.running_mean for bn in norms], means, norms[0].momentum)
    torch._foreach_lerp_([bn.running_var for bn in norms], variances, norms[0].momentum)
    torch._foreach_add_([bn.num_batches_tracked for bn in norms], 1)


def average_pool(x, stride=1):
    """The 3x3 average over the neighbours that exist."""
    if x.is_cuda:
        return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    # On a CPU a depthwise convolution costs a fraction of the pooling.
    count = F.avg_pool2d(x.new_ones(1, 1, *x.shape[2:]), 3, stride, 1, divisor_override=1)
    return F.conv2d(x, x.new_ones(x.shape[1], 1, 3, 3), None, stride, 1, groups=x.shape[1]) / count


def depthwise(x, conv, even=None):
    """conv(x), where `even` is every second pixel of x if conv has a stride."""
    settings = conv.stride[0], conv.padding[0], conv.dilation[0]
    if even is not None and settings[2] == 2:  # stride and dilation 2, even padding: no other pixel counts
        x, settings = even, (1, conv.padding[0] // 2, 1)
    if x.requires_grad and x.device.type == "cpu" and x.dtype == conv.weight.dtype:
        return Depthwise.apply(x, conv.weight, *settings)
    return F.conv2d(x, conv.weight, None, *settings, conv.groups)


class Depthwise(torch.autograd.Function):
    """Depthwise convolution whose backward pass avoids what oneDNN is slow at: dilation, and rows wider than 3."""

    @staticmethod
    def forward(ctx, x, kernel, stride, padding, dilation):
        ctx.save_for_backward(x, kernel)
        ctx.settings = stride, padding, dilation
        return F.conv2d(x, kernel, None, stride, padding, dilation, len(kernel))

    @staticmethod
    def backward(ctx, grad):
        x, kernel = ctx.saved_tensors
        stride, padding, dilation = ctx.settings
        C, _, k, _ = kernel.shape
        if stride == 1:
            grad_x = F.conv2d(grad, kernel.flip(2, 3), None, 1, padding, dilation, C)
        else:
            grad_x = conv2d_input(x.shape, kernel, grad, stride, padding, dilation, C)
        if dilation == 2 and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            x, grad, padding, dilation = phases(x), phases(grad), padding // 2, 1
        if (k, dilation) == (5, 1):
            x = F.pad(x, (2, 2, 2, 2))
            halves = (conv2d_weight(part, (C, 1, 5, 3), grad, stride, 0, 1, C) for part in (x[..., :-2], x[..., 2:]))
            left, right = halves  # they share the middle column
            return grad_x, torch.cat([left, right[..., 1:]], dim=3), None, None, None
        return grad_x, conv2d_weight(x, kernel.shape, grad, stride, padding, dilation, C), None, None, None


def phases(x):
    """(B, C, H, W) -> (4 B, C, H / 2, W / 2): dilation 2 becomes dilation 1 within each."""
    B, C, H, W = x.shape
    x = x.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(4 * B, H // 2, W // 2, C).permute(0, 3, 1, 2)
