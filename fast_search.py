"""The supernet of `model_search` computed faster, on the same modules and parameters.

`forward` trains, an `Evaluator` measures many individuals on one batch. What makes them fast:

- channels-last throughout on CPU and CUDA; `none` left out; states are visited one after another and each adds its
  edges to all later nodes, so ReLU, pools and normalised pools come once a state instead of once an edge, and live no
  longer than it;
- BatchNorm's scale is the mixing weight, and weighted candidates are added up in place;
- where a cell reduces, dilated and 1x1 convolutions see every second pixel only, which is sliced once a state, and the
  1x1 convolutions of all edges out of it are one;
- on a CPU, depthwise convolutions have a backward pass made of the kernels that are fast there (see Depthwise), and
  average pools are depthwise convolutions.
"""

import torch
from torch import nn
from torch.nn import functional as F

from fast_ops import average_pool, batch_norm, batch_norm_stats, concatenate, depthwise, every_second, move_statistics
from genotypes import PRIMITIVES
from operations import FactorizedReduce
from support.devices import compiled, memory_format

MAX_POOL, AVG_POOL, SKIP = (PRIMITIVES.index(name) for name in ("max_pool_3x3", "avg_pool_3x3", "skip_connect"))
FIRST_CONV = SKIP + 1
RUNNING = ("running_mean", "running_var")


def row(node, state):
    """Return the row in the alphas, and the place in a cell, of the edge from a state to a node."""
    return node * (node + 3) // 2 + state


def forward(network, x, alphas, *, compile=False):
    """Compute what `network(x, alphas)` does in train mode: logits, with gradients; BatchNorm buffers move likewise."""
    bn_updates, cell_of = [], compiled(mixed_cell) if compile else mixed_cell

    def searched_cell(cell, h0, h1, weights):
        kernels, norms, eps = outgoing_kernels(cell, "batch")
        s, moments = cell_of(h0, h1, weights, kernels, None, cell._multiplier, eps)
        count = s.numel() // s.shape[1]
        for group, of_group in zip(norms, moments, strict=True):
            shared = len(of_group[0]) == group[0].num_features
            rows = ([moment] * len(group) if shared else moment.chunk(len(group)) for moment in of_group)
            bn_updates.extend((norm, *of_norm, count) for norm, *of_norm in zip(group, *rows, strict=True))
        return s

    inputs = first_cell_inputs(network, x, bn_updates)
    logits = cells_logits(network, *inputs, torch.softmax(alphas, dim=-1), searched_cell, bn_updates)
    move_statistics(bn_updates)
    return logits


class Evaluator:
    """Measures individuals with "batch" or "running" BatchNorm statistics, without gradients, buffers untouched.

    What depends on the weights alone is prepared here, once: make a new one when they have moved.
    """

    @torch.no_grad()
    def __init__(self, network, bn, *, compile=False):
        self.network, self.bn = network, bn
        self.cell_of = compiled(mixed_cell) if compile else mixed_cell
        self.arguments = {}
        for cell in network.cells:
            kernels, norms, eps = outgoing_kernels(cell, bn)
            running = None
            if bn == "running":
                running = [[torch.cat([getattr(norm, name) for norm in group]) for name in RUNNING] for group in norms]
            self.arguments[cell] = kernels, running, cell._multiplier, eps

    @torch.no_grad()
    def set_batch(self, x):
        """Do what all individuals share on a batch of images (B, 3, H, W)."""
        self.inputs = first_cell_inputs(self.network, x, self.bn_updates())

    @torch.no_grad()
    def logits(self, alphas):
        """Return the logits (B, num_classes) of one individual (2, 14, 8), raw or decoded, on the batch."""
        weights = torch.softmax(alphas, dim=-1)
        return cells_logits(self.network, *self.inputs, weights, self.searched_cell, self.bn_updates())

    def searched_cell(self, cell, h0, h1, weights):
        return self.cell_of(h0, h1, weights, *self.arguments[cell])[0]

    def bn_updates(self):
        return [] if self.bn == "batch" else None


# ---- a searched cell, a function of tensors alone: compiled, equal cells share a graph


def outgoing_kernels(cell, bn):
    """Return (kernels, norms, eps of the norms) of a cell, in the order in which `mixed_cell` needs them.

    `kernels` has for each state the 1x1 kernels of the skip_connects out of it that reduce, concatenated over the edges
    ([] where they do not), and for each edge those of its convolutions by operation. `norms` are the BatchNorms, in
    groups of those which are computed as one: of such skip_connects, and, with "batch" statistics, behind one pool.
    """
    kernels, norms = [], []
    for state in range(1 + cell._steps):
        edges = [list(cell._ops[row(node, state)]._ops) for node in range(max(0, state - 1), cell._steps)]
        pools = [[ops[o][1] for o in (MAX_POOL, AVG_POOL)] for ops in edges]
        if bn == "batch":
            norms += zip(*pools, strict=True)
        skips = [ops[SKIP] for ops in edges if isinstance(ops[SKIP], FactorizedReduce)]
        if skips:
            norms.append([skip.bn for skip in skips])
        halves = ([skip.conv_1.weight for skip in skips], [skip.conv_2.weight for skip in skips])
        convolutions = []
        for ops, of_pools in zip(edges, pools, strict=True):
            layers = [list(op.op) for op in ops[FIRST_CONV:]]
            convolutions.append([[m.weight for m in of_op if isinstance(m, nn.Conv2d)] for of_op in layers])
            norms += [[m] for of_op in layers for m in of_op if isinstance(m, nn.BatchNorm2d)]
            if bn == "running":
                norms += [[norm] for norm in of_pools]
        kernels.append(([torch.cat(half) for half in halves if half], convolutions))
    return kernels, norms, norms[0][0].eps


def mixed_cell(h0, h1, weights, kernels, running, multiplier, eps):
    """Compute a cell from its preprocessed inputs (B, C, H, W) and the mixing weights (E, O).

    `kernels` are as `outgoing_kernels` returns them; `running` has the (mean, variance) of each group of norms, or is
    None for the batch's statistics. Returns the output (B, multiplier * C, H, W) and the batch's (mean, inverse
    standard deviation) of each group.
    """
    moments, unread = [], iter(running or ())

    def norm(x, scale=None):
        if running is not None:
            return F.batch_norm(x, *next(unread), scale, None, False, 0.0, eps)
        y, *of_group = batch_norm_stats(x, scale, None, eps)
        moments.append(of_group)
        return y

    scales = weights.unsqueeze(-1).repeat(1, 1, h0.shape[1])  # (E, O, C), as BatchNorm takes its scale
    weights = weights.to(h0.dtype)
    states = [h0, h1] + [None] * (len(kernels) - 1)
    for j, (reducing, convolutions) in enumerate(kernels):
        nodes = range(max(0, j - 1), len(kernels) - 1)
        edges = [row(node, j) for node in nodes]
        h, stride, even = states[j], 2 if reducing else 1, None
        pools = [F.max_pool2d(h, 3, stride, 1), average_pool(h, stride)]
        if running is None:  # once for all edges: the BatchNorms behind them differ in the running statistics only
            pools = [norm(pool) for pool in pools]
        relu = torch.relu(h)
        if reducing:
            even = every_second(relu, 0)
            skips = factorized_reduce(even, every_second(relu, 1), *reducing, len(edges))
            skips = norm(skips, torch.cat([scales[e, SKIP] for e in edges])).chunk(len(edges), dim=1)
        for i, (node, e) in enumerate(zip(nodes, edges, strict=True)):
            of_edge = scales[e, FIRST_CONV:].unbind()
            total = add_convolutions(states[2 + node], relu, even, convolutions[i], of_edge, norm)
            total = total.add_(skips[i]) if reducing else total.addcmul_(h, weights[e, SKIP])
            for o, pool in zip((MAX_POOL, AVG_POOL), pools, strict=True):
                total = total.add_(norm(pool, scales[e, o])) if running else total.addcmul_(pool, weights[e, o])
            states[2 + node] = total
    return concatenate(states[-multiplier:]), moments


def add_convolutions(total, x, even, kernels, scales, norm):
    """Add the weighted convolutions of one edge to `total`, which is altered; None stands for zero."""
    for (kernel, pointwise, *second), scale in zip(kernels, scales, strict=True):
        y = F.conv2d(depthwise(x, kernel, 1 if second else 2, even), pointwise)
        if second:  # separable: the same again
            kernel, pointwise = second
            y = F.conv2d(depthwise(norm(y).relu_(), kernel), pointwise)
        y = norm(y, scale)
        total = y if total is None else total.add_(y)
    return total


def factorized_reduce(even, odd, kernels_1, kernels_2, edges=1):
    """Compute FactorizedReduce before its BatchNorm, of several edges at once: (B, edges * C, H, W)."""
    halves = F.conv2d(even, kernels_1).chunk(edges, dim=1), F.conv2d(odd, kernels_2).chunk(edges, dim=1)
    return torch.cat([half for pair in zip(*halves, strict=True) for half in pair], dim=1)


# ---- the network around the searched cells; `bn_updates` is that of `batch_norm`


def first_cell_inputs(network, x, bn_updates):
    """Return what does not depend on alphas: the first cell's inputs and the second's first, preprocessed."""
    conv, bn = network.stem
    s = batch_norm(conv(x.contiguous(memory_format=memory_format(x.device))), bn, bn_updates).relu_()
    cells = network.cells
    h0_next = preprocess(cells[1].preprocess0, s, bn_updates) if len(cells) > 1 else None
    return preprocess(cells[0].preprocess0, s, bn_updates), preprocess(cells[0].preprocess1, s, bn_updates), h0_next


def cells_logits(network, h0, h1, h0_next, weights, searched_cell, bn_updates):
    """Return the logits, from what `first_cell_inputs` returns and the mixing weights (2, E, O)."""
    cells = network.cells
    for i, cell in enumerate(cells):
        s = searched_cell(cell, h0, h1, weights[int(cell.reduction)])  # (B, multiplier * C, H, W)
        if i + 1 < len(cells):
            # Both cells that take s do so now, behind one ReLU: the wide tensor need not wait for the second.
            s = s.relu_()
            h0, h1 = h0_next, preprocess(cells[i + 1].preprocess1, s, bn_updates)
            h0_next = preprocess(cells[i + 2].preprocess0, s, bn_updates) if i + 2 < len(cells) else None
            del s
    return network.classifier(s.mean((2, 3)))


def preprocess(module, s, bn_updates):
    """Apply `module` to a state that has been through its ReLU."""
    if isinstance(module, FactorizedReduce):
        pixels = every_second(s, 0), every_second(s, 1)
        return batch_norm(factorized_reduce(*pixels, module.conv_1.weight, module.conv_2.weight), module.bn, bn_updates)
    _, conv, bn = module.op
    return batch_norm(conv(s), bn, bn_updates)
