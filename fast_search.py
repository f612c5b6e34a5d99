"""The supernet of `model_search` computed faster, on the same modules and parameters.

`forward` trains, an `Evaluator` measures many individuals on one batch. What makes them fast:

- channels-last throughout on CPU and CUDA; `none` left out; states are visited one after another and each adds its
  edges to all later nodes, so ReLU, pools and normalised pools come once a state instead of once an edge, and live no
  longer than it;
- BatchNorm's scale is the mixing weight, and weighted candidates are added up in place;
- where a cell reduces, dilated and 1x1 convolutions see every second pixel only, which is sliced once a state, and the
  1x1 convolutions of all edges out of it are one;
- candidates out of the first cell's inputs, the same for all individuals, are computed once a batch, and an
  individual's weighted sums of them are one matrix product;
- on a CPU, depthwise convolutions have a backward pass made of the kernels that are fast there (see Depthwise), and
  average pools are depthwise convolutions.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from fast_ops import (
    batch_norm,
    batch_norm_stats,
    concatenate,
    depthwise,
    every_second,
    fast_average_pool,
    move_statistics,
)
from genotypes import PRIMITIVES
from operations import FactorizedReduce
from support.devices import memory_format, region_function

MAX_POOL, AVG_POOL, SKIP = (PRIMITIVES.index(name) for name in ("max_pool_3x3", "avg_pool_3x3", "skip_connect"))
FIRST_CONV = SKIP + 1
RUNNING = ("running_mean", "running_var")
SHARED_MB = 3072  # at most, of the first cell's shared candidates: 2,432 at the paper's sizes and batch, in float32


def row(node, state):
    """Return the row in the alphas, and the place in a cell, of the edge from a state to a node."""
    return node * (node + 3) // 2 + state


def forward(network, x, alphas, **settings):
    """Compute what `network(x, alphas)` does in train mode: logits, with gradients; BatchNorm buffers move likewise.

    `settings` are those of `region_function`.
    """
    bn_updates, cell_of = [], region_function(mixed_cell, **settings)

    def searched_cell(cell, h0, h1, weights):
        kernels, norms, eps = outgoing_kernels(cell, "batch")
        s, moments = cell_of([h0, h1, *[None] * cell._steps], weights, kernels, cell._multiplier, eps)
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
        self.cell_of = region_function(mixed_cell, compile)
        self.kernels = {cell: outgoing_kernels(cell, bn) for cell in network.cells}
        self.shared = SharedCandidates(network.cells[0], bn, *self.kernels[network.cells[0]][::2])

    @torch.no_grad()
    def set_batch(self, x):
        """Do what all individuals share on a batch of images (B, 3, H, W)."""
        self.inputs = first_cell_inputs(self.network, x, self.bn_updates())
        self.shared.set_inputs(*self.inputs[:2])

    @torch.no_grad()
    def logits(self, alphas):
        """Return the logits (B, num_classes) of one individual (2, 14, 8), raw or decoded, on the batch."""
        weights = torch.softmax(alphas, dim=-1)
        return cells_logits(self.network, *self.inputs, weights, self.searched_cell, self.bn_updates())

    def searched_cell(self, cell, h0, h1, weights):
        kernels, _, eps = self.kernels[cell]
        states = [h0, h1, *[None] * cell._steps]
        if cell is self.shared.cell and self.shared.matrix is not None:
            states, kernels = [None, None, *self.shared.sums(weights)], kernels[2:]
        return self.cell_of(states, weights, kernels, cell._multiplier, eps)[0]

    def bn_updates(self):
        return [] if self.bn == "batch" else None


class SharedCandidates:
    """The candidates on the edges out of the two inputs of a cell, where these are the same for all individuals.

    `matrix` has one in each row, flattened: first by input and operation the operations before `own`, which are the
    same on all edges out of an input, then by node, input and operation the others. It is None where it would take more
    than SHARED_MB.
    """

    def __init__(self, cell, bn, kernels, eps):
        self.cell, self.kernels, self.eps = cell, kernels, eps
        # A pool's norms differ between edges in their running statistics; so do skip_connects that reduce.
        self.own = 1 if bn == "running" else SKIP if cell.reduction else FIRST_CONV

    def set_inputs(self, *inputs):
        """Compute them for the cell's preprocessed inputs (B, C, H, W)."""
        self.matrix = None
        h, nodes, operations = inputs[0], self.cell._steps, len(PRIMITIVES)
        (B, C, *sides), common, own = h.shape, self.own - 1, operations - self.own
        count = 2 * (common + nodes * own)
        shape = (count * B, C, *(side // (2 if self.cell.reduction else 1) for side in sides))
        if math.prod(shape) * h.element_size() > SHARED_MB * 2**20:
            return
        maps = torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=memory_format(h.device)).chunk(count)
        ones = next(self.cell.parameters()).new_ones(nodes, operations, C)
        for state, h in enumerate(inputs):
            for node, o, y, _ in candidates(h, *self.kernels[state], ones, self.eps, []):
                of_input = state * common + o - 1
                of_edge = 2 * common + (2 * node + state) * own + o - self.own
                maps[of_input if o < self.own else of_edge].copy_(y)
        self.map, values = maps[0], maps[0].numel()
        self.matrix = maps[0].as_strided((count, values), (values, 1))

    def sums(self, weights):
        """Return for each node the sum (B, C, H, W) of its edges from the inputs, given the mixing weights (E, O)."""
        weights = torch.stack([weights[row(node, 0) : row(node, 2)] for node in range(self.cell._steps)])
        common, own = weights[..., 1 : self.own].flatten(1), weights[..., self.own :].flatten(1)  # (nodes, rows)
        sums = torch.cat([common, torch.block_diag(*own)], dim=1).to(self.matrix.dtype) @ self.matrix
        return [of_node.as_strided(self.map.shape, self.map.stride()) for of_node in sums]


# ---- a searched cell, a function of tensors alone: compiled, equal cells share a graph


def outgoing_kernels(cell, bn):
    """Return (kernels, norms, eps of the norms) of a cell, in the order in which `candidates` needs them.

    `kernels` has for each state the 1x1 kernels of the skip_connects out of it that reduce, concatenated over the edges
    ([] where they do not); for each edge those of its convolutions by operation; and the (mean, variance) of its norms
    with "running" statistics, else None. `norms` are the BatchNorms of all states, in groups of those which are
    computed as one: of such skip_connects, and, with "batch" statistics, behind one pool.
    """
    kernels, norms = [], []
    for state in range(1 + cell._steps):
        edges = [list(cell._ops[row(node, state)]._ops) for node in range(max(0, state - 1), cell._steps)]
        pools = [[ops[o][1] for o in (MAX_POOL, AVG_POOL)] for ops in edges]
        of_state = list(zip(*pools, strict=True)) if bn == "batch" else []
        skips = [ops[SKIP] for ops in edges if isinstance(ops[SKIP], FactorizedReduce)]
        if skips:
            of_state.append([skip.bn for skip in skips])
        halves = ([skip.conv_1.weight for skip in skips], [skip.conv_2.weight for skip in skips])
        convolutions = []
        for ops, of_pools in zip(edges, pools, strict=True):
            layers = [list(op.op) for op in ops[FIRST_CONV:]]
            convolutions.append([[m.weight for m in of_op if isinstance(m, nn.Conv2d)] for of_op in layers])
            of_state += [[m] for of_op in layers for m in of_op if isinstance(m, nn.BatchNorm2d)]
            if bn == "running":
                of_state += [[norm] for norm in of_pools]
        running = None
        if bn == "running":
            running = [[torch.cat([getattr(norm, name) for norm in group]) for name in RUNNING] for group in of_state]
        kernels.append(([torch.cat(half) for half in halves if half], convolutions, running))
        norms += of_state
    return kernels, norms, norms[0][0].eps


def mixed_cell(states, weights, kernels, multiplier, eps):
    """Compute a cell from its preprocessed inputs (B, C, H, W) and the mixing weights (E, O).

    `states` are the two inputs and None for each node, and `kernels` as `outgoing_kernels` returns them. Or the inputs
    are None, each node has the sum of its edges from them, and `kernels` are those of the nodes.
    Returns the output (B, multiplier * C, H, W) and the batch's (mean, inverse standard deviation) of each group.
    """
    states, moments = list(states), []
    any_state = next(h for h in states if h is not None)
    scales = weights.unsqueeze(-1).repeat(1, 1, any_state.shape[1])  # (E, O, C), as BatchNorm takes its scale
    weights = weights.to(any_state.dtype)
    for j, of_state in enumerate(kernels, start=len(states) - 1 - len(kernels)):
        nodes = range(max(0, j - 1), len(states) - 2)
        edges = [row(node, j) for node in nodes]
        for i, o, y, scaled in candidates(states[j], *of_state, [scales[e] for e in edges], eps, moments):
            total = states[2 + nodes[i]]
            if total is None:
                total = y
            elif scaled:
                total = total.add_(y)
            else:
                total = total.addcmul_(y, weights[edges[i], o])
            states[2 + nodes[i]] = total
    return concatenate(states[-multiplier:]), moments


def candidates(h, reducing, convolutions, running, scales, eps, moments):
    """Yield the candidates on the edges out of a state h (B, C, H, W), normalised: (edge, operation, y, scaled).

    y is multiplied by the edge's part of `scales`, [(O, C)], where `scaled` says so; each edge's first one is. The
    first three of the other arguments come from `outgoing_kernels`. To the list `moments` is added what the norms with
    the batch's statistics return.
    """
    unread = iter(running or ())

    def norm(x, scale=None):
        if running is not None:
            return F.batch_norm(x, *next(unread), scale, None, False, 0.0, eps)
        y, *of_group = batch_norm_stats(x, scale, None, eps)
        moments.append(of_group)
        return y

    stride, even = 2 if reducing else 1, None
    pools = [F.max_pool2d(h, 3, stride, 1), fast_average_pool(h, stride)]
    if running is None:  # once for all edges: the BatchNorms behind them differ in the running statistics only
        pools = [norm(pool) for pool in pools]
    relu = torch.relu(h)
    if reducing:
        even = every_second(relu, 0)
        skips = factorized_reduce(even, every_second(relu, 1), *reducing, len(scales))
        skips = norm(skips, torch.cat([scale[SKIP] for scale in scales])).chunk(len(scales), dim=1)
    for i, scale in enumerate(scales):
        for o, (kernel, pointwise, *second) in enumerate(convolutions[i], start=FIRST_CONV):
            y = F.conv2d(depthwise(relu, kernel, 1 if second else 2, even), pointwise)
            if second:  # separable: the same again
                kernel, pointwise = second
                y = F.conv2d(depthwise(norm(y).relu_(), kernel), pointwise)
            yield i, o, norm(y, scale[o]), True
        yield (i, SKIP, skips[i], True) if reducing else (i, SKIP, h, False)
        for o, pool in zip((MAX_POOL, AVG_POOL), pools, strict=True):
            yield (i, o, norm(pool, scale[o]), True) if running else (i, o, pool, False)


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
