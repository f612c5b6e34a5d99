"""A several times faster computation of the supernet in `nas201.model_search`.

This module uses the reference's nn.Modules and parameters. `forward` computes the training pass of
the supernet, and an `Evaluator` measures many individuals on one batch. Tests check that `forward`
and `Evaluator` match the reference. Three things make the computation fast:

- Layout and shared work. All tensors are channels-last. ReLU and the average pool run once per node
  instead of once per edge. The operation `none` is skipped.
- With batch statistics, joined convolutions. All edges out of a node read the same input. So their
  1x1 convolutions become one convolution with concatenated output channels, and so do their 3x3
  convolutions. One BatchNorm follows each joined convolution, and its scale includes the mixing
  weights.
- With running statistics, folded convolutions. BatchNorm with running statistics is an affine map.
  So a node is one 3x3 convolution of the concatenated earlier nodes, plus the `skip_connect` and
  `avg_pool_3x3` of these nodes. The kernel of this convolution combines both convolutions of every
  edge, their BatchNorms and the mixing weights. On a GPU in bfloat16, `skip_connect` and
  `avg_pool_3x3` are part of the convolution as well (`cell_by_source`).

A cell is computed by a function of tensors, not of modules. So cells of the same shape share one
compiled graph.

Shapes: B images, C channels of a cell, E = 6 edges, O = 5 operations of an edge. Node 0 is a cell's
input. "target<-source" is the edge from node `source` to the later node `target`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fast_ops import (
    NormUpdate,
    batch_norm,
    batch_norm_stats,
    fast_average_pool,
    move_statistics,
    split_update,
    uses_triton,
)
from nas201.genotypes import PRIMITIVES
from nas201.model_search import Cell, Network
from operations import ReLUConvBN, on_cpu
from support.devices import memory_format, region_function

SKIP = PRIMITIVES.index("skip_connect")
CONV1 = PRIMITIVES.index("nor_conv_1x1")
CONV3 = PRIMITIVES.index("nor_conv_3x3")
POOL = PRIMITIVES.index("avg_pool_3x3")
CONVS = (CONV1, CONV3)  # adjacent indices of the alphas' last axis; `mix` relies on that
# With running statistics, a CPU processes this many images per thread at a time, so that their
# activations stay in the cache. A compiled cell keeps fewer activations, so it takes more images.
IMAGES_PER_THREAD = 16
COMPILED_IMAGES_PER_THREAD = 64

Moments = tuple[Tensor, Tensor]  # (mean, inverse standard deviation) of a batch
ApplyNorm = Callable[[nn.BatchNorm2d, Tensor], Tensor]  # replaces the call of the BatchNorm module


def row(target: int, source: int) -> int:
    """Return the number of the edge target<-source: its row in the alphas.

    Edges are sorted by target and then by source. Target t has t incoming edges, so the edges of
    earlier targets are 1 + 2 + ... + (t - 1) = t (t - 1) / 2.
    """
    return target * (target - 1) // 2 + source


def mixing_weights(alphas: Tensor) -> Tensor:
    """Return the softmax over operations, (E, O), of alphas (1, E, O) or (E, O)."""
    return torch.softmax(alphas.reshape(alphas.shape[-2:]), dim=-1)


# ---- batch statistics


class CellKernels(NamedTuple):
    """The convolutions of a cell, joined over all edges out of a node, and their BatchNorms.

    Both lists are indexed by source node and then by operation, in the order of CONVS. `mixed_cell`
    returns batch statistics in the same order.
    """

    kernels: list[list[Tensor]]  # each (targets * C, C, k, k)
    norms: list[list[list[nn.BatchNorm2d]]]  # the third index is the target node


def outgoing_kernels(cell: Cell) -> CellKernels:
    """Join the convolutions of a cell for `mixed_cell`."""
    kernels = []
    norms = []
    for source in range(cell.max_nodes - 1):
        edges = [cell.edges[f"{target}<-{source}"] for target in range(source + 1, cell.max_nodes)]
        kernels_of_source = []
        norms_of_source = []
        for op in CONVS:
            kernels_of_source.append(torch.cat([edge[op].op[1].weight for edge in edges]))
            norms_of_source.append([edge[op].op[2] for edge in edges])
        kernels.append(kernels_of_source)
        norms.append(norms_of_source)
    return CellKernels(kernels, norms)


def mixed_cell(
    x: Tensor, weights: Tensor, kernels: list[list[Tensor]], eps: float
) -> tuple[Tensor, list[list[Moments]]]:
    """Compute a cell with batch statistics, for x (B, C, H, W) and the mixing weights (E, O).

    `kernels` comes from CellKernels. Returns the output (B, C, H, W), and the batch statistics by
    source node and operation.
    """
    C = x.shape[1]
    nodes = [x] + [None] * len(kernels)
    moments = []
    for source, kernels_of_source in enumerate(kernels):
        x = nodes[source]
        targets = range(source + 1, len(nodes))
        # fmt: off
        w = torch.stack([weights[row(target, source)] for target in targets])  # (targets, O)
        active = torch.relu(x)                                                 # (B, C, H, W)
        pooled = fast_average_pool(x)                                          # (B, C, H, W)
        # fmt: on
        out = 0
        moments_of_source = []
        for op, kernel in zip(CONVS, kernels_of_source, strict=True):
            scale = w[:, op].repeat_interleave(C)  # (targets * C,)
            y = F.conv2d(active, kernel, padding=kernel.shape[-1] // 2)  # (B, targets * C, H, W)
            y, mean, inverse_std = batch_norm_stats(y, scale, None, eps)
            out = out + y
            moments_of_source.append((mean, inverse_std))
        moments.append(moments_of_source)
        w = w.to(out.dtype)
        convolved = out.chunk(len(targets), dim=1)  # each (B, C, H, W)
        for target, edge_weights, edge in zip(targets, w, convolved, strict=True):
            edge = torch.addcmul(edge, x, edge_weights[SKIP])
            edge = torch.addcmul(edge, pooled, edge_weights[POOL])
            nodes[target] = edge if nodes[target] is None else nodes[target] + edge
    return nodes[-1], moments


def forward(network: Network, x: Tensor, alphas: Tensor, *, compile: bool = False, checkpoint: bool = False) -> Tensor:
    """Compute `network(x, alphas)` in train mode: logits (B, num_classes), with gradients.

    Running statistics are updated as in the reference. `compile` compiles the cells. `checkpoint`
    recomputes the cells in the backward pass instead of keeping their activations.
    """
    cell_of = region_function(mixed_cell, compile, checkpoint)
    weights = mixing_weights(alphas)
    updates = []

    def searched_cell(cell: Cell, s: Tensor) -> Tensor:
        kernels, norms = outgoing_kernels(cell)
        out, moments = cell_of(s, weights, kernels, norms[0][0][0].eps)
        count = s.numel() // s.shape[1]
        for norms_of_source, moments_of_source in zip(norms, moments, strict=True):
            for joined, (mean, inverse_std) in zip(norms_of_source, moments_of_source, strict=True):
                updates.extend(split_update(joined, mean, inverse_std, count))
        return out

    def apply_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return batch_norm(x, norm, updates)

    s = stem(network, x, apply_norm)
    logits = after_stem(network, s, searched_cell, apply_norm)
    move_statistics(updates)
    return logits


# ---- running statistics


class Folded(NamedTuple):
    """The convolutions into node k, with folded BatchNorms, for several cells of the same shape.

    The mixing weights are not applied yet.
    """

    # Axes: cell, operation of CONVS, output channel, source node, and (kernels only) input channel,
    # kernel height, kernel width.
    kernels: Tensor  # (cells, 2, C, k, C, 3, 3)
    biases: Tensor  # (cells, 2, C, k)


class FoldedCell(NamedTuple):
    """A cell with the mixing weights applied, for `folded_cell`: one convolution into each node k = 1, 2, ..."""

    weights: Tensor  # (E, O), the mixing weights
    kernels: tuple[Tensor, ...]  # that of node k is (C, k * C, 3, 3)
    biases: tuple[Tensor, ...]  # each (C,)


class CellBySource(NamedTuple):
    """A cell with the mixing weights applied, for `cell_by_source`: one convolution out of each node but the last."""

    kernels: tuple[Tensor, ...]  # each (targets * C, 2 * C, 3, 3)
    bias: Tensor  # (targets * C,), of all nodes that node 0 leads to


def fold(cells: list[Cell]) -> list[Folded]:
    """Fold BatchNorms into convolutions, for each node but the first.

    The cells must have the same shape.
    """
    nodes = []
    for target in range(1, cells[0].max_nodes):
        kernels = []
        biases = []
        for cell in cells:
            for op in CONVS:
                for source in range(target):
                    kernel, bias = fold_conv(cell.edges[f"{target}<-{source}"][op])
                    kernels.append(kernel)
                    biases.append(bias)
        shape = (len(cells), len(CONVS), target)
        # (cells, 2, k, C, ...) -> (cells, 2, C, k, ...)
        all_kernels = torch.stack(kernels).unflatten(0, shape).transpose(2, 3)
        all_biases = torch.stack(biases).unflatten(0, shape).transpose(2, 3)
        nodes.append(Folded(all_kernels, all_biases))
    return nodes


def fold_conv(module: ReLUConvBN) -> tuple[Tensor, Tensor]:
    """Return the kernel (C, C, 3, 3) and bias (C,) of a convolution with its BatchNorm folded in.

    A 1x1 kernel is padded with zeros to a 3x3 kernel.
    """
    _, conv, norm = module.op
    scale = torch.rsqrt(norm.running_var + norm.eps)
    margin = 1 - conv.padding[0]  # 1 if the kernel is 1x1, else 0
    kernel = F.pad(conv.weight * scale.view(-1, 1, 1, 1), (margin,) * 4)
    return kernel, -norm.running_mean * scale


class Mixed(NamedTuple):
    """The convolutions into node k with the mixing weights applied, for several cells of the same shape."""

    kernels: Tensor  # (cells, C, k, C, 3, 3): cell, output channel, source node, input channel
    biases: Tensor  # (cells, C)


def mix(nodes: list[Folded], weights: Tensor) -> list[Mixed]:
    """Apply the mixing weights (E, O) to the convolutions that `fold` returned."""
    mixed = []
    for k, (kernels, biases) in enumerate(nodes, start=1):
        # The edges into node k are adjacent rows of the weights, and CONVS are adjacent columns.
        w = weights[row(k, 0) : row(k + 1, 0), CONV1 : CONV3 + 1].t()  # (2, k)
        mixed.append(Mixed((kernels * w.view(1, 2, 1, k, 1, 1, 1)).sum(1), (biases * w.view(1, 2, 1, k)).sum((1, 3))))
    return mixed


def folded_cells(nodes: list[Folded], weights: Tensor) -> list[FoldedCell]:
    """Return the cells for `folded_cell`, from what `fold` returned and the mixing weights (E, O)."""
    mixed = mix(nodes, weights)
    kernels_of_cells = zip(*(kernels.flatten(2, 3) for kernels, _ in mixed), strict=True)
    biases_of_cells = zip(*(biases for _, biases in mixed), strict=True)
    return [FoldedCell(weights, *parts) for parts in zip(kernels_of_cells, biases_of_cells, strict=True)]


def cells_by_source(nodes: list[Folded], weights: Tensor) -> list[CellBySource]:
    """Return the cells for `cell_by_source`, from what `fold` returned and the mixing weights (E, O)."""
    mixed = mix(nodes, weights)
    cells, C = mixed[0].biases.shape
    box = weights.new_full((3, 3), 1 / 9)
    center = F.pad(weights.new_ones(1, 1), (1, 1, 1, 1))  # 1 in the middle of 3x3 zeros
    kernels_of_sources = []
    for source in range(len(nodes)):
        targets = range(source + 1, len(nodes) + 1)
        # fmt: off
        convolutions = torch.cat([mixed[target - 1].kernels[:, :, source] for target in targets], dim=1)
        w = torch.stack([weights[row(target, source)] for target in targets])  # (targets, O)
        linear = w[:, SKIP, None, None] * center + w[:, POOL, None, None] * box  # (targets, 3, 3)
        linear = torch.einsum("thw,oi->toihw", linear, torch.eye(C).to(w))     # (targets, C, C, 3, 3)
        linear = linear.flatten(0, 1).expand(cells, -1, -1, -1, -1)            # (cells, targets * C, C, 3, 3)
        kernels_of_sources.append(torch.cat([convolutions, linear], dim=2))    # (cells, targets * C, 2 * C, 3, 3)
        # fmt: on
    bias_of_cells = torch.cat([biases for _, biases in mixed], dim=1)  # (cells, nodes * C)
    kernels_of_cells = zip(*kernels_of_sources, strict=True)
    return [CellBySource(*parts) for parts in zip(kernels_of_cells, bias_of_cells, strict=True)]


def folded_cell(x: Tensor, weights: Tensor, kernels: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> Tensor:
    """Compute a cell as one convolution into each node, for x (B, C, H, W). The rest comes from FoldedCell."""
    nodes = [x]
    active = []  # ReLU of each node
    pooled = []  # average pool of each node
    for target, (kernel, bias) in enumerate(zip(kernels, biases, strict=True), start=1):
        active.append(torch.relu(nodes[-1]))
        pooled.append(fast_average_pool(nodes[-1]))
        out = F.conv2d(torch.cat(active, dim=1), kernel, bias, padding=1)  # (B, C, H, W)
        for source in range(target):
            w = weights[row(target, source)].to(out.dtype)  # (O,)
            out = out.addcmul_(nodes[source], w[SKIP]).addcmul_(pooled[source], w[POOL])
        nodes.append(out)
    return nodes[-1]


def cell_by_source(x: Tensor, kernels: tuple[Tensor, ...], bias: Tensor) -> Tensor:
    """Compute a cell as one convolution out of each node, for x (B, C, H, W). The rest comes from CellBySource.

    The convolution reads the node's ReLU and the node itself, each with a border that makes the
    average pool a convolution (`triton_kernels.border_reference`). The second half of its kernel is
    `skip_connect` and `avg_pool_3x3`, which do not mix channels. So every node is read and written
    less often than in `folded_cell`, with twice the multiply-adds.
    """
    from triton_kernels import with_border

    parts = [[x], *([] for _ in kernels)]  # for each node, the feature maps whose sum it is
    for source, kernel in enumerate(kernels):
        y = F.conv2d(with_border(parts[source]), kernel, bias if source == 0 else None)  # (B, targets * C, H, W)
        for part_list, part in zip(parts[source + 1 :], y.chunk(len(kernels) - source, dim=1), strict=True):
            part_list.append(part)
    return functools.reduce(torch.add, parts[-1])


class Evaluator:
    """Computes the logits of individuals without gradients.

    `bn` chooses the BatchNorm statistics, "batch" or "running". Running statistics are not changed.
    An evaluator keeps tensors that it has made from the network's weights, so make a new evaluator
    after the weights have changed. `triton` allows the kernels of `triton_kernels`, which take
    precedence over `compile`.
    """

    @torch.no_grad()
    def __init__(self, network: Network, bn: str, *, compile: bool = False, triton: bool = True):
        self.network = network
        self.bn = bn
        cells = [cell for cell in network.cells if isinstance(cell, Cell)]
        kernels_of_cells = [outgoing_kernels(cell) for cell in cells]
        self.kernels = [kernels for kernels, _ in kernels_of_cells]
        any_norm = kernels_of_cells[0].norms[0][0][0]
        self.eps = any_norm.eps
        # Searched cells without running statistics use batch statistics, whatever `bn` says.
        self.folding = bn == "running" and any_norm.running_mean is not None
        self.compile = compile
        self.triton = triton
        self.images_per_thread = COMPILED_IMAGES_PER_THREAD if compile else IMAGES_PER_THREAD
        self.stages = []  # the folded cells of each stage; the cells of a stage have the same shape
        if self.folding:
            cells_per_stage = len(cells) // 3
            for first in range(0, len(cells), cells_per_stage):
                self.stages.append(fold(cells[first : first + cells_per_stage]))

    @torch.no_grad()
    def set_batch(self, x: Tensor) -> None:
        """Compute the stem, which all individuals share, on a batch of images (B, 3, H, W)."""
        s = stem(self.network, x, self.apply_norm)  # (B, C, H, W)
        self.by_source = self.triton and self.folding and uses_triton(s)
        if self.folding and on_cpu(s):
            self.parts = s.split(self.images_per_thread * torch.get_num_threads())
        else:
            self.parts = [s]

    @torch.no_grad()
    def logits(self, alphas: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of an individual on the batch.

        `alphas` are (1, E, O) or (E, O), raw or decoded.
        """
        weights = mixing_weights(alphas)
        if self.by_source:
            function = cell_by_source
            arguments = [cell for stage in self.stages for cell in cells_by_source(stage, weights)]
        elif self.folding:
            function = folded_cell
            arguments = [cell for stage in self.stages for cell in folded_cells(stage, weights)]
        else:
            function = mixed_cell
            arguments = [(weights, kernels, self.eps) for kernels in self.kernels]
        cell_of = region_function(function, self.compile and not self.by_source)

        def part_logits(s: Tensor) -> Tensor:
            remaining = iter(arguments)

            def searched_cell(cell: Cell, s: Tensor) -> Tensor:
                out = cell_of(s, *next(remaining))
                return out if self.folding else out[0]

            return after_stem(self.network, s, searched_cell, self.apply_norm)

        return torch.cat([part_logits(part) for part in self.parts])

    def apply_norm(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        """Apply a BatchNorm that is outside of the searched cells."""
        # With a list, `batch_norm` uses batch statistics. The updates in the list are discarded.
        updates: list[NormUpdate] | None = [] if self.bn == "batch" else None
        return batch_norm(x, norm, updates)


# ---- the network around the searched cells


def stem(network: Network, x: Tensor, apply_norm: ApplyNorm) -> Tensor:
    """Apply the stem: images (B, 3, H, W) -> (B, C, H, W)."""
    conv, norm = network.stem
    return apply_norm(norm, conv(x.contiguous(memory_format=memory_format(x.device))))


def after_stem(
    network: Network, s: Tensor, searched_cell: Callable[[Cell, Tensor], Tensor], apply_norm: ApplyNorm
) -> Tensor:
    """Return the logits (B, num_classes) for the stem's output s (B, C, H, W)."""
    for cell in network.cells:
        if isinstance(cell, Cell):
            s = searched_cell(cell, s)
        else:  # a residual block, with half the resolution and twice the channels
            shortcut = cell.downsample(s)
            for relu, conv, norm in (cell.conv_a.op, cell.conv_b.op):
                s = apply_norm(norm, conv(relu(s)))
            s = shortcut + s
    norm, relu = network.lastact
    return network.classifier(network.global_pooling(relu(apply_norm(norm, s))).flatten(1))
