"""The supernet of `model_search` computed faster, on the same modules and parameters.

`forward` trains, `fitness` measures many individuals on one batch. What makes them fast:

- channels-last throughout; `none` left out; states are visited one after another and each adds its edges to all later
  nodes, so ReLU, pools and normalised pools come once a state instead of once an edge, and live no longer than it;
- behind a reduction, dilated and 1x1 convolutions see every second pixel only, which is sliced once a state;
- on a CPU, 1x1 convolution, BatchNorm and mixing weight are one step (see ConvNorm), depthwise convolutions have a
  backward pass made of the kernels that are fast there (see Depthwise), and pools are made of other operations.
"""

import functools

import torch
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from operations import FactorizedReduce

LIMIT = 64
compiled = functools.cache(torch.compile)


def forward(network, x, alphas, *, compile=False):
    """What `network(x, alphas)` returns in train mode: logits, with gradients; the BatchNorm buffers move likewise."""
    norm = BatchStatistics()
    logits = finish(network, *begin(network, x, norm), torch.softmax(alphas, dim=-1), norm, compile)
    move_statistics(norm.seen)
    return logits


def fitness(network, bn, *, compile=False):
    """Measure individuals with "batch" or "running" BatchNorm statistics, without gradients, buffers untouched.

    Returns `prepare`: `prepare(x)` does what all individuals share on a batch of images and returns `logits_of`, and
    `logits_of(alphas)` gives the logits (B, num_classes) of one individual (2, 14, 8), raw or decoded. What depends on
    the weights alone is computed once: call `fitness` again after the weights have changed.
    """
    norm = {"batch": BatchStatistics, "running": RunningStatistics}[bn]()

    @torch.no_grad()
    def prepare(x):
        shared = begin(network, x, norm)

        @torch.no_grad()
        def logits_of(alphas):
            norm.seen.clear()
            return finish(network, *shared, torch.softmax(alphas, dim=-1), norm, compile)

        return logits_of

    return prepare


# ---- the network; `norm` is one of the classes below and says how BatchNorm is computed


def begin(network, x, norm):
    """What does not depend on alphas: the inputs of the first cell and the first input of the second, preprocessed."""
    conv, bn = network.stem
    s = norm.bn(F.conv2d(x.contiguous(memory_format=torch.channels_last), conv.weight, padding=1), bn).relu_()
    cells = network.cells
    h0_next = preprocess(cells[1].preprocess0, s, norm) if len(cells) > 1 else None
    return preprocess(cells[0].preprocess0, s, norm), preprocess(cells[0].preprocess1, s, norm), h0_next


def finish(network, h0, h1, h0_next, weights, norm, compile):
    """The logits, from what `begin` returns and the mixing weights (2, E, O)."""
    cells, cell_of = network.cells, compiled(mixed_cell) if compile else mixed_cell
    for i, cell in enumerate(cells):
        s = cell_of(cell, h0, h1, weights[int(cell.reduction)], norm)  # (B, multiplier * C, H, W)
        if i + 1 < len(cells):
            # Both cells that take s do so now, behind one ReLU: the wide tensor need not wait for the second.
            s = s.relu_()
            h0, h1 = h0_next, preprocess(cells[i + 1].preprocess1, s, norm)
            h0_next = preprocess(cells[i + 2].preprocess0, s, norm) if i + 2 < len(cells) else None
    return network.classifier(s.mean((2, 3)))


def preprocess(module, s, norm):
    """`module` applied to a state that has been through its ReLU."""
    if isinstance(module, FactorizedReduce):
        return factorized_reduce(module, every_second(s, 0), every_second(s, 1), norm)
    _, conv, bn = module.op
    return norm.conv_bn(s, conv, bn)


def mixed_cell(cell, h0, h1, weights, norm):
    """A cell's output from its preprocessed inputs and the mixing weights (E, O)."""
    weights = weights.unsqueeze(-1).repeat(1, 1, h0.shape[1])  # (E, O, C), as BatchNorm takes its scale
    nodes = [None] * cell._steps
    for j in range(1 + cell._steps):
        state = h0 if j == 0 else h1 if j == 1 else nodes[j - 2]
        later = range(max(0, j - 1), cell._steps)
        edges = [sum(range(2, 2 + i)) + j for i in later]
        candidates = [cell._ops[e]._ops for e in edges]
        shared = share(state, 2 if cell.reduction and j < 2 else 1, candidates, norm)
        for i, e, ops in zip(later, edges, candidates, strict=True):
            nodes[i] = add_edge(nodes[i], shared, ops, weights[e].unbind(), norm)
    return Concatenate.apply(*nodes[-cell._multiplier :])


def share(h, stride, candidates, norm):
    """What all edges out of the state h need: itself, its ReLU, second pixels of that, normalised pools."""
    pools = (
        norm.pool(pooled, [ops[o][1] for ops in candidates])
        for o, pooled in ((1, max_pool(h, stride)), (2, average_pool(h, stride)))
    )
    r = torch.relu(h)
    return h, r, *((every_second(r, 0), every_second(r, 1)) if stride == 2 else (None, None)), *pools


def add_edge(total, shared, ops, weights, norm):
    """`total` plus the weighted candidates of one edge; `total` is altered, None stands for zero."""
    h, r, even, odd, *pools = shared
    _, max_op, avg_op, skip, *convolutions = ops
    for op, w in zip(convolutions, weights[4:], strict=True):
        _, conv, *rest = op.op
        if len(rest) > 2:  # separable
            z = norm.conv_bn(depthwise(r, conv), *rest[:2]).relu_()
            y = norm.conv_bn(depthwise(z, rest[3]), *rest[4:], w)
        else:
            y = norm.conv_bn(depthwise(r, conv, even), *rest, w)
        total = y if total is None else total.add_(y)
    if even is None:
        total = total.addcmul_(h, weights[3][0].to(h.dtype))
    else:
        total = total.add_(factorized_reduce(skip, even, odd, norm, weights[3]))
    for pooled, op, w in zip(pools, (max_op, avg_op), weights[1:3], strict=True):
        total = norm.add_pool(total, pooled, op[1], w)
    return total


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


def factorized_reduce(module, even, odd, norm, weight=None):
    y = torch.cat([F.conv2d(even, module.conv_1.weight), F.conv2d(odd, module.conv_2.weight)], dim=1)
    return norm.bn(y, module.bn, weight)


# ---- faster on a CPU


def on_cpu(x):
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def max_pool(x, stride):
    if x.requires_grad or not on_cpu(x):
        return F.max_pool2d(x, 3, stride, 1)
    x = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    x = torch.maximum(torch.maximum(x[..., :-2:stride], x[..., 1:-1:stride]), x[..., 2::stride])
    return torch.maximum(torch.maximum(x[:, :, :-2:stride], x[:, :, 1:-1:stride]), x[:, :, 2::stride])


def average_pool(x, stride):
    """Over the neighbours that exist. On a CPU a depthwise convolution costs a fraction of the pooling."""
    if not on_cpu(x):
        return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    count = F.avg_pool2d(x.new_ones(1, 1, *x.shape[2:]), 3, stride, 1, divisor_override=1)
    return F.conv2d(x, x.new_ones(x.shape[1], 1, 3, 3), None, stride, 1, groups=x.shape[1]) / count


def depthwise(x, conv, even=None):
    settings = conv.stride[0], conv.padding[0], conv.dilation[0]
    if even is not None:  # stride 2, dilation 2 and even padding: every second pixel of x counts only
        x, settings = even, (1, conv.padding[0] // 2, 1)
    if x.requires_grad and on_cpu(x):
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


class ConvNorm(torch.autograd.Function):
    """A square 1x1 convolution W and the BatchNorm with batch statistics behind it; (y, mean, biased variance).

    The statistics of W z follow from the mean m and the covariance S of z, (C,) and (C, C): mean W m, variances
    diag(W S W'). So the output is one convolution of z, and what lies between is neither computed nor kept. Backwards,
    the gradient g comes in through its products with z, (C, C), and one convolution each of g and z.
    """

    @staticmethod
    def forward(ctx, z, kernel, weight, eps):
        W, m = kernel.flatten(1), z.mean((0, 2, 3))
        S = conv2d_weight(z, kernel.shape, z).flatten(1) / (z.numel() // z.shape[1]) - torch.outer(m, m)
        WS, mean = W @ S, W @ m
        var = (WS * W).sum(1).clamp_(min=0)
        inverse_std = torch.rsqrt(var + eps)
        scale = inverse_std if weight is None else inverse_std * weight
        ctx.save_for_backward(z, W, m, WS, inverse_std, scale)
        ctx.mark_non_differentiable(mean, var)
        return F.conv2d(z, (W * scale[:, None])[..., None, None], -mean * scale), mean, var

    @staticmethod
    def backward(ctx, g, *_):
        z, W, m, WS, inverse_std, scale = ctx.saved_tensors
        count, mean_g = z.numel() // z.shape[1], g.mean((0, 2, 3))
        gz = conv2d_weight(z, (*W.shape, 1, 1), g).flatten(1) / count - torch.outer(mean_g, m)  # centred
        gy = inverse_std * (gz * W).sum(1)  # mean product of g with the normalised output
        grad_W = scale[:, None] * (gz - (gy * inverse_std)[:, None] * WS) * count
        of_z = -(W.t() * (scale * inverse_std * gy)) @ W
        shift = -of_z @ m - W.t() @ (scale * mean_g)
        grad_z = F.conv2d(g, (W.t() * scale)[..., None, None], shift).add_(F.conv2d(z, of_z[..., None, None]))
        return grad_z, grad_W[..., None, None], gy * count if ctx.needs_input_grad[2] else None, None


class Norm(torch.autograd.Function):
    """BatchNorm with batch statistics: (y, mean, biased variance).

    torch's own sums a channels-last tensor up in one float32 accumulator. That errs by 1e-5 in the variance, enough to
    flip a ReLU here and there and so to change gradients visibly. These sums are precise and as fast.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, eps):
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, C), a view
        mean = rows.mean(0)
        var = (rows - mean).square_().mean(0)
        ctx.save_for_backward(x, scale, mean, torch.rsqrt(var + eps))
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, scale, shift, False, eps=eps), mean, var

    @staticmethod
    def backward(ctx, g, *_):
        x, scale, mean, inverse_std = ctx.saved_tensors
        arguments = g, x, scale, None, None, mean, inverse_std, True, ctx.eps, list(ctx.needs_input_grad[:3])
        return *torch.ops.aten.native_batch_norm_backward(*arguments), None


def normalise(x, scale, shift, eps):
    if on_cpu(x):
        return Norm.apply(x, scale, shift, eps)
    y, mean, inverse_std = torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, eps)
    return y, mean, inverse_std.square().reciprocal() - eps


# ---- BatchNorm. `weight` is a mixing weight, repeated for each channel (C,), and None outside edges.


class BatchStatistics:
    """Statistics of the batch. `seen` collects them: [(modules, mean, biased variance, count)]."""

    def __init__(self):
        self.seen = []

    def note(self, norms, x, y, mean, var):
        self.seen.append((norms, mean, var, x.numel() // x.shape[1]))
        return y

    def bn(self, x, bn, weight=None):
        return self.note([bn], x, *normalise(x, *affine(bn, weight), bn.eps))

    def conv_bn(self, z, conv, bn, weight=None):
        if conv.in_channels == conv.out_channels <= LIMIT and on_cpu(z):
            return self.note([bn], z, *ConvNorm.apply(z, conv.weight, weight, bn.eps))
        return self.bn(F.conv2d(z, conv.weight), bn, weight)

    def pool(self, pooled, norms):
        """Normalised once: the BatchNorms behind one state's pools have no parameters and differ in buffers only."""
        return self.note(norms, pooled, *normalise(pooled, None, None, norms[0].eps))

    def add_pool(self, total, pooled, bn, weight):
        return total.addcmul_(pooled, weight[0].to(pooled.dtype))


class RunningStatistics:
    """Running statistics: BatchNorm is linear and folded into the convolution before it."""

    def __init__(self):
        self.seen, self.folded = [], {}  # conv -> (kernel, bias)

    def bn(self, x, bn, weight=None):
        return F.batch_norm(x, bn.running_mean, bn.running_var, *affine(bn, weight), False, 0.0, bn.eps)

    def conv_bn(self, z, conv, bn, weight=None):
        if conv not in self.folded:
            scale = torch.rsqrt(bn.running_var + bn.eps)
            self.folded[conv] = conv.weight * scale.view(-1, 1, 1, 1), -bn.running_mean * scale
        kernel, bias = self.folded[conv]
        return F.conv2d(z, kernel, bias) if weight is None else F.conv2d(z, kernel * weight[0], bias * weight)

    def pool(self, pooled, norms):
        return pooled

    def add_pool(self, total, pooled, bn, weight):
        return total.add_(self.bn(pooled, bn, weight))


def affine(bn, weight):
    return (bn.weight, bn.bias) if weight is None else (weight, None)


@torch.no_grad()
def move_statistics(seen):
    """Move the running statistics as training does, from `BatchStatistics.seen`, in few kernels."""
    running, targets, momentum = [], [], seen[0][0][0].momentum
    for norms, mean, var, count in seen:
        unbiased = var * (count / (count - 1))
        for bn in norms:
            running += bn.running_mean, bn.running_var
            targets += mean, unbiased
    torch._foreach_lerp_(running, targets, momentum)
    torch._foreach_add_([bn.num_batches_tracked for norms, *_ in seen for bn in norms], 1)
