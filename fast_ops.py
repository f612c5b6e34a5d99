"""BatchNorm, depthwise convolutions and pools computed faster, for the supernets of both spaces."""

import torch
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from operations import average_pool, depthwise_conv, in_low_precision_on_cpu, neighbour_mean, on_cpu, split_phases
from support.devices import memory_format

PIXELS = 2**14  # whose statistics are computed at a time where there are no gradients


def concatenate(tensors):
    """Concatenate along channels. The gradients handed back are dense, in the layout that everything before expects."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return Concatenate.apply(*tensors)
    return torch.cat(tensors, dim=1)  # compiled without gradients, a Function of two tensors returns one of them


class Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        return torch.cat(tensors, dim=1)

    @staticmethod
    def backward(ctx, grad):
        parts = grad.chunk(len(ctx.needs_input_grad), dim=1)
        return tuple(part.contiguous(memory_format=memory_format(part.device)) for part in parts)


def every_second(x, first):
    """Return x[:, :, first::2, first::2], dense in both directions."""
    if memory_format(x.device) == torch.channels_last:
        return x.permute(0, 2, 3, 1)[:, first::2, first::2].contiguous().permute(0, 3, 1, 2)
    return x[:, :, first::2, first::2].contiguous()


def batch_norm(x, bn, bn_updates):
    """Apply the module `bn` with the batch's statistics, or the running ones where `bn_updates` is None.

    To the list `bn_updates` is added what `move_statistics` needs.
    """
    if bn_updates is None:
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
    y, mean, inverse_std = batch_norm_stats(x, bn.weight, bn.bias, bn.eps)
    bn_updates.append((bn, mean, inverse_std, x.numel() // x.shape[1]))
    return y


def batch_norm_stats(x, scale, shift, eps):
    """Return BatchNorm with the batch's statistics, and these: (y, mean, 1 / sqrt(biased variance + eps)).

    On a CPU torch sums a channels-last tensor up in one float32 accumulator, which errs by 1e-5 in the variance.
    Without gradients it is given fewer pixels at a time; with them see ExactBatchNormCPU.
    """
    if not on_cpu(x):
        return torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, eps)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # which fuses the sums of a whole batch
        return ExactBatchNormCPU.apply(x, scale, shift, eps)
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).split(max(1, PIXELS // x[0, 0].numel()))
    moments = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]  # mean, biased variance
    means, variances = (torch.stack(of) for of in zip(*moments, strict=True))  # (parts, C)
    shares = means.new_tensor([len(part) / len(x) for part in parts]).unsqueeze(1)
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return F.batch_norm(x, mean, var, scale, shift, False, eps=eps), mean, torch.rsqrt(var + eps)


class ExactBatchNormCPU(torch.autograd.Function):
    """`batch_norm_stats` with gradients, for which the smallest error can flip a ReLU and so become visible."""

    @staticmethod
    def forward(ctx, x, scale, shift, eps):
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, C), a view if channels-last
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        mean = rows.mean(0)
        var = (rows - mean).square_().mean(0)
        inverse_std = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, scale, mean, inverse_std)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, inverse_std)
        return F.batch_norm(x, mean, var, scale, shift, False, eps=eps), mean, inverse_std

    @staticmethod
    def backward(ctx, gradient, *_):
        x, scale, mean, inverse_std = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        return *torch.ops.aten.native_batch_norm_backward(
            gradient, x, scale, None, None, mean, inverse_std, True, ctx.eps, needed
        ), None


@torch.no_grad()
def move_statistics(bn_updates):
    """Move the running statistics as training does, in few kernels.

    `bn_updates` has for each BatchNorm (module, mean, inverse standard deviation as in `batch_norm_stats`, values).
    """
    bn_updates = [update for update in bn_updates if update[0].running_mean is not None]
    norms, means, inverse_stds, counts = zip(*bn_updates, strict=True)
    variances = torch._foreach_pow(inverse_stds, -2)
    torch._foreach_sub_(variances, norms[0].eps)
    torch._foreach_mul_(variances, [count / (count - 1) for count in counts])
    torch._foreach_lerp_([bn.running_mean for bn in norms], means, norms[0].momentum)
    torch._foreach_lerp_([bn.running_var for bn in norms], variances, norms[0].momentum)
    torch._foreach_add_([bn.num_batches_tracked for bn in norms], 1)


def fast_average_pool(x, stride=1):
    """Compute `average_pool` in the form that is fast on the device: on a CPU, a depthwise convolution."""
    return neighbour_mean(x, stride) if on_cpu(x) else average_pool(x, stride)


def depthwise(x, kernel, dilation=1, even=None):
    """Convolve each channel with its kernel of (C, 1, k, k): with stride 2 where every second pixel of x is given."""
    stride, padding = 1 if even is None else 2, dilation * (kernel.shape[-1] // 2)
    if even is not None and dilation == 2:  # stride and dilation 2, even padding: no other pixel counts
        x, stride, padding, dilation = even, 1, padding // 2, 1
    if on_cpu(x) and x.requires_grad and not in_low_precision_on_cpu(x):
        return Depthwise.apply(x, kernel, stride, padding, dilation)
    return depthwise_conv(x, kernel, stride, padding, dilation)


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
            x, grad, padding, dilation = split_phases(x), split_phases(grad), padding // 2, 1
        if (k, dilation) == (5, 1):
            x = F.pad(x, (2, 2, 2, 2))
            halves = (conv2d_weight(part, (C, 1, 5, 3), grad, stride, 0, 1, C) for part in (x[..., :-2], x[..., 2:]))
            left, right = halves  # they share the middle column
            return grad_x, torch.cat([left, right[..., 1:]], dim=3), None, None, None
        return grad_x, conv2d_weight(x, kernel.shape, grad, stride, padding, dilation, C), None, None, None
