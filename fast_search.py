"""The supernet of `model_search` computed faster, on the same modules and parameters.

`forward` trains, `fitness` measures many individuals on one batch. What makes them fast:

- channels-last throughout; `none` left out; states are visited one after another and each adds its edges to all later
  nodes, so ReLU, pools and normalised pools come once a state instead of once an edge, and live no longer than it;
- BatchNorm's scale is the mixing weight, and weighted candidates are added up in place;
- behind a reduction, dilated and 1x1 convolutions see every second pixel only, which is sliced once a state;
- on a CPU, depthwise convolutions have a backward pass made of the kernels that are fast there (see Depthwise), and
  average pools are depthwise convolutions.
"""

import torch
from torch.nn import functional as F

from fast_ops import Concatenate, average_pool, compiled, depthwise, every_second, move_statistics, normalise
from operations import FactorizedReduce


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


def factorized_reduce(module, even, odd, seen, weight=None):
    y = torch.cat([F.conv2d(even, module.conv_1.weight), F.conv2d(odd, module.conv_2.weight)], dim=1)
    return normalise(y, [module.bn], seen, weight)


def phases(x):
    """(B, C, H, W) -> (4 B, C, H / 2, W / 2): dilation 2 becomes dilation 1 within each."""
    B, C, H, W = x.shape
    x = x.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(4 * B, H // 2, W // 2, C).permute(0, 3, 1, 2)
