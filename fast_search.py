"""The supernet of `model_search` computed faster, on the same modules and parameters.

`forward` trains, `fitness` measures many individuals on one batch. What makes them fast:

- channels-last throughout; `none` left out; states are visited one after another and each adds its edges to all later
  nodes, so ReLU, pools and normalised pools come once a state instead of once an edge, and live no longer than it;
- BatchNorm's scale is the mixing weight, and weighted candidates are added up in place;
- behind a reduction, dilated and 1x1 convolutions see every second pixel only, which is sliced once a state;
- on a CPU, depthwise convolutions have a backward pass made of the kernels that are fast there (see Depthwise), and
  average pools are depthwise convolutions.
"""

import functools

import torch
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from operations import FactorizedReduce

PIXELS = 2**14  # whose statistics are computed at a time where there are no gradients


@functools.cache
def compiled(cell):
    # Cells of several sizes, with and without gradients, and a last, smaller batch: more shapes than the default limit.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(cell, dynamic=False)


def forward(network, x, alphas, *, compile=False):
    """What `network(x, alphas)` returns in train mode: logits, with gradients; the BatchNorm buffers move likewise."""
    seen = []
    logits = finish(network, *begin(network, x, seen), torch.softmax(alphas, dim=-1), seen, compile)
    move_statistics(seen)
    return logits


def fitness(network, bn, *, compile=False):
    """Measure individuals with "batch" or "running" BatchNorm statistics, without gradients, buffers untouched.

    Returns `prepare`: `prepare(x)` does what all individuals share on a batch of images and returns `logits_of`, and
    `logits_of(alphas)` gives the logits (B, num_classes) of one individual (2, 14, 8), raw or decoded.
    """

    @torch.no_grad()
    def prepare(x):
        shared = begin(network, x, [] if bn == "batch" else None)

        @torch.no_grad()
        def logits_of(alphas):
            seen = [] if bn == "batch" else None
            return finish(network, *shared, torch.softmax(alphas, dim=-1), seen, compile)

        return logits_of

    return prepare


# ---- the network. `seen` collects BatchNorm statistics, see `normalise`.


def begin(network, x, seen):
    """What does not depend on alphas: the inputs of the first cell and the first input of the second, preprocessed."""
    conv, bn = network.stem
    s = normalise(conv(x.contiguous(memory_format=torch.channels_last)), [bn], seen).relu_()
    cells = network.cells
    h0_next = preprocess(cells[1].preprocess0, s, seen) if len(cells) > 1 else None
    return preprocess(cells[0].preprocess0, s, seen), preprocess(cells[0].preprocess1, s, seen), h0_next


def finish(network, h0, h1, h0_next, weights, seen, compile):
    """The logits, from what `begin` returns and the mixing weights (2, E, O)."""
    cells, cell_of = network.cells, compiled(mixed_cell) if compile else mixed_cell
    for i, cell in enumerate(cells):
        s, moments = cell_of(cell, h0, h1, weights[int(cell.reduction)], seen is not None)  # (B, multiplier * C, H, W)
        if seen is not None:
            seen += moments
        if i + 1 < len(cells):
            # Both cells that take s do so now, behind one ReLU: the wide tensor need not wait for the second.
            s = s.relu_()
            h0, h1 = h0_next, preprocess(cells[i + 1].preprocess1, s, seen)
            h0_next = preprocess(cells[i + 2].preprocess0, s, seen) if i + 2 < len(cells) else None
            del s
    return network.classifier(s.mean((2, 3)))


def preprocess(module, s, seen):
    """`module` applied to a state that has been through its ReLU."""
    if isinstance(module, FactorizedReduce):
        return factorized_reduce(module, every_second(s, 0), every_second(s, 1), seen)
    _, conv, bn = module.op
    return normalise(conv(s), [bn], seen)


def mixed_cell(cell, h0, h1, weights, batch):
    """A cell's output from its preprocessed inputs and the mixing weights (E, O), and what `seen` gets if `batch`."""
    seen = [] if batch else None
    weights = weights.unsqueeze(-1).repeat(1, 1, h0.shape[1])  # (E, O, C), as BatchNorm takes its scale
    nodes = [None] * cell._steps
    for j in range(1 + cell._steps):
        state = h0 if j == 0 else h1 if j == 1 else nodes[j - 2]
        later = range(max(0, j - 1), cell._steps)
        edges = [sum(range(2, 2 + i)) + j for i in later]
        candidates = [cell._ops[e]._ops for e in edges]
        shared = share(state, 2 if cell.reduction and j < 2 else 1, candidates, seen)
        for i, e, ops in zip(later, edges, candidates, strict=True):
            nodes[i] = add_edge(nodes[i], shared, ops, weights[e].unbind(), seen)
    return Concatenate.apply(*nodes[-cell._multiplier :]), seen


def share(h, stride, candidates, seen):
    """What all edges out of the state h need: itself, its ReLU, second pixels of that, and pools.

    These are normalised once by the batch's statistics: the BatchNorms behind them differ in the running ones only.
    """
    pools = [F.max_pool2d(h, 3, stride, 1), average_pool(h, stride)]
    if seen is not None:
        pools = [normalise(x, [ops[o][1] for ops in candidates], seen) for o, x in enumerate(pools, start=1)]
    r = torch.relu(h)
    return h, r, *((every_second(r, 0), every_second(r, 1)) if stride == 2 else (None, None)), *pools


def add_edge(total, shared, ops, weights, seen):
    """`total` plus the weighted candidates of one edge; `total` is altered, None stands for zero."""
    h, r, even, odd, *pools = shared
    _, max_op, avg_op, skip, *convolutions = ops
    for op, w in zip(convolutions, weights[4:], strict=True):
        _, conv, pointwise, bn, *second = op.op
        y = pointwise(depthwise(r, conv, even))
        if second:  # separable: the same again
            y = normalise(y, [bn], seen).relu_()
            _, conv, pointwise, bn = second
            y = pointwise(depthwise(y, conv))
        y = normalise(y, [bn], seen, w)
        total = y if total is None else total.add_(y)
    if even is None:
        total = total.addcmul_(h, weights[3][0].to(h.dtype))
    else:
        total = total.add_(factorized_reduce(skip, even, odd, seen, weights[3]))
    for pooled, op, w in zip(pools, (max_op, avg_op), weights[1:3], strict=True):
        if seen is None:
            total = total.add_(normalise(pooled, [op[1]], None, w))
        else:
            total = total.addcmul_(pooled, w[0].to(pooled.dtype))
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


def factorized_reduce(module, even, odd, seen, weight=None):
    y = torch.cat([F.conv2d(even, module.conv_1.weight), F.conv2d(odd, module.conv_2.weight)], dim=1)
    return normalise(y, [module.bn], seen, weight)


# ---- BatchNorm and average pool, for both spaces


def normalise(x, norms, seen, weight=None):
    """x through any of `norms`, which are alike, times the mixing weight (C,), which takes the place of their scale.

    With the batch's statistics, which `seen` gets with the norms; with the running ones where `seen` is None.
    """
    bn = norms[0]
    scale, shift = (bn.weight, bn.bias) if weight is None else (weight, None)
    if seen is None:
        return F.batch_norm(x, bn.running_mean, bn.running_var, scale, shift, False, 0.0, bn.eps)
    y, mean, var = standardise(x, scale, shift, bn.eps)
    seen += [(bn, mean, var, x.numel() // x.shape[1]) for bn in norms]
    return y


def standardise(x, scale, shift, eps):
    """BatchNorm with the batch's statistics, and these: (y, mean, biased variance).

    On a CPU torch sums a channels-last tensor up in one float32 accumulator, which errs by 1e-5 in the variance.
    Without gradients it is given fewer pixels at a time; with them see Standardise.
    """
    if x.is_cuda:
        y, mean, inverse_std = torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, eps)
        return y, mean, inverse_std.square().reciprocal() - eps
    if torch.is_grad_enabled():
        return Standardise.apply(x, scale, shift, eps)
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).split(max(1, PIXELS // x[0, 0].numel()))
    moments = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]  # mean, biased variance
    means, variances = (torch.stack(of) for of in zip(*moments, strict=True))  # (parts, C)
    share = means.new_tensor([len(part) / len(x) for part in parts]).unsqueeze(1)
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return F.batch_norm(x, mean, var, scale, shift, False, eps=eps), mean, var


class Standardise(torch.autograd.Function):
    """`standardise` with gradients, for which the smallest error can flip a ReLU and so make a visible difference."""

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
def move_statistics(seen):
    """Move the running statistics as training does, from [(module, mean, biased variance, count)], in few kernels."""
    seen = [entry for entry in seen if entry[0].running_mean is not None]
    norms, means, variances, counts = zip(*seen, strict=True)
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


# ---- depthwise convolution


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
