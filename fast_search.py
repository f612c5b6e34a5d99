"""The supernet of `model_search` computed faster, on the same modules and parameters.

`forward` trains, an `Evaluator` measures many individuals on one batch. What makes them fast:

- channels-last throughout; `none` left out; states are visited one after another and each adds its edges to all later
  nodes, so ReLU, pools and normalised pools come once a state instead of once an edge, and live no longer than it;
- BatchNorm's scale is the mixing weight, and weighted candidates are added up in place;
- behind a reduction, dilated and 1x1 convolutions see every second pixel only, which is sliced once a state;
- on a CPU, depthwise convolutions have a backward pass made of the kernels that are fast there (see Depthwise), and
  average pools are depthwise convolutions.
"""

import torch
from torch.nn import functional as F

from fast_ops import Concatenate, average_pool, batch_norm, compiled, depthwise, every_second, move_statistics
from operations import FactorizedReduce


def forward(network, x, alphas, *, compile=False):
    """What `network(x, alphas)` returns in train mode: logits, with gradients; the BatchNorm buffers move likewise."""
    bn_updates = []
    inputs = first_cell_inputs(network, x, bn_updates)
    logits = cells_logits(network, *inputs, torch.softmax(alphas, dim=-1), bn_updates, compile)
    move_statistics(bn_updates)
    return logits


class Evaluator:
    """Measures individuals with "batch" or "running" BatchNorm statistics, without gradients, buffers untouched."""

    def __init__(self, network, bn, *, compile=False):
        self.network, self.bn, self.compile = network, bn, compile

    @torch.no_grad()
    def set_batch(self, x):
        """Do what all individuals share on a batch of images (B, 3, H, W)."""
        self.inputs = first_cell_inputs(self.network, x, self.bn_updates())

    @torch.no_grad()
    def logits(self, alphas):
        """The logits (B, num_classes) of one individual (2, 14, 8), raw or decoded, on the batch."""
        weights = torch.softmax(alphas, dim=-1)
        return cells_logits(self.network, *self.inputs, weights, self.bn_updates(), self.compile)

    def bn_updates(self):
        return [] if self.bn == "batch" else None


# ---- the network. `bn_updates` collects BatchNorm statistics, see `batch_norm`.


def first_cell_inputs(network, x, bn_updates):
    """What does not depend on alphas: the inputs of the first cell and the first input of the second, preprocessed."""
    conv, bn = network.stem
    s = batch_norm(conv(x.contiguous(memory_format=torch.channels_last)), [bn], bn_updates).relu_()
    cells = network.cells
    h0_next = preprocess(cells[1].preprocess0, s, bn_updates) if len(cells) > 1 else None
    return preprocess(cells[0].preprocess0, s, bn_updates), preprocess(cells[0].preprocess1, s, bn_updates), h0_next


def cells_logits(network, h0, h1, h0_next, weights, bn_updates, compile):
    """The logits, from what `first_cell_inputs` returns and the mixing weights (2, E, O)."""
    cells, cell_of = network.cells, compiled(mixed_cell) if compile else mixed_cell
    for i, cell in enumerate(cells):
        of_type = weights[int(cell.reduction)]
        s, moments = cell_of(cell, h0, h1, of_type, bn_updates is not None)  # (B, multiplier * C, H, W)
        if bn_updates is not None:
            bn_updates += moments
        if i + 1 < len(cells):
            # Both cells that take s do so now, behind one ReLU: the wide tensor need not wait for the second.
            s = s.relu_()
            h0, h1 = h0_next, preprocess(cells[i + 1].preprocess1, s, bn_updates)
            h0_next = preprocess(cells[i + 2].preprocess0, s, bn_updates) if i + 2 < len(cells) else None
            del s
    return network.classifier(s.mean((2, 3)))


def preprocess(module, s, bn_updates):
    """`module` applied to a state that has been through its ReLU."""
    if isinstance(module, FactorizedReduce):
        return factorized_reduce(module, every_second(s, 0), every_second(s, 1), bn_updates)
    _, conv, bn = module.op
    return batch_norm(conv(s), [bn], bn_updates)


def mixed_cell(cell, h0, h1, weights, batch):
    """A cell's output from its preprocessed inputs and the mixing weights (E, O), and its `bn_updates` if `batch`."""
    bn_updates = [] if batch else None
    weights = weights.unsqueeze(-1).repeat(1, 1, h0.shape[1])  # (E, O, C), as BatchNorm takes its scale
    nodes = [None] * cell._steps
    for j in range(1 + cell._steps):
        state = h0 if j == 0 else h1 if j == 1 else nodes[j - 2]
        later = range(max(0, j - 1), cell._steps)
        edges = [sum(range(2, 2 + i)) + j for i in later]
        candidates = [cell._ops[e]._ops for e in edges]
        shared = shared_by_edges(state, 2 if cell.reduction and j < 2 else 1, candidates, bn_updates)
        for i, e, ops in zip(later, edges, candidates, strict=True):
            nodes[i] = add_edge(nodes[i], shared, ops, weights[e].unbind(), bn_updates)
    return Concatenate.apply(*nodes[-cell._multiplier :]), bn_updates


def shared_by_edges(h, stride, candidates, bn_updates):
    """What all edges out of the state h need: itself, its ReLU, second pixels of that, and pools.

    These are normalised once by the batch's statistics: the BatchNorms behind them differ in the running ones only.
    """
    pools = [F.max_pool2d(h, 3, stride, 1), average_pool(h, stride)]
    if bn_updates is not None:
        pools = [batch_norm(x, [ops[o][1] for ops in candidates], bn_updates) for o, x in enumerate(pools, start=1)]
    r = torch.relu(h)
    return h, r, *((every_second(r, 0), every_second(r, 1)) if stride == 2 else (None, None)), *pools


def add_edge(total, shared, ops, weights, bn_updates):
    """`total` plus the weighted candidates of one edge; `total` is altered, None stands for zero."""
    h, r, even, odd, *pools = shared
    _, max_op, avg_op, skip, *convolutions = ops
    for op, w in zip(convolutions, weights[4:], strict=True):
        _, conv, pointwise, bn, *second = op.op
        y = pointwise(depthwise(r, conv, even))
        if second:  # separable: the same again
            y = batch_norm(y, [bn], bn_updates).relu_()
            _, conv, pointwise, bn = second
            y = pointwise(depthwise(y, conv))
        y = batch_norm(y, [bn], bn_updates, w)
        total = y if total is None else total.add_(y)
    if even is None:
        total = total.addcmul_(h, weights[3][0].to(h.dtype))
    else:
        total = total.add_(factorized_reduce(skip, even, odd, bn_updates, weights[3]))
    for pooled, op, w in zip(pools, (max_op, avg_op), weights[1:3], strict=True):
        if bn_updates is None:
            total = total.add_(batch_norm(pooled, [op[1]], None, w))
        else:
            total = total.addcmul_(pooled, w[0].to(pooled.dtype))
    return total


def factorized_reduce(module, even, odd, bn_updates, weight=None):
    y = torch.cat([F.conv2d(even, module.conv_1.weight), F.conv2d(odd, module.conv_2.weight)], dim=1)
    return batch_norm(y, [module.bn], bn_updates, weight)
