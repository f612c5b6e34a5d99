"""The supernet of `nas201.model_search` again, several times faster, on the same modules and parameters.

`forward` trains, an `Evaluator` measures a population. What makes them fast:

- channels-last throughout; one ReLU and one average pool a node instead of one an edge; `none` left out;
- with batch statistics, the equal convolutions that leave a node are one convolution with concatenated output channels
  and one BatchNorm, whose scale carries the mixing weights;
- with running statistics BatchNorm is linear, so a node is one 3x3 convolution of the concatenated earlier nodes, whose
  kernel holds both convolutions of every edge, their BatchNorms and the mixing weights, plus `skip` and `avg_pool`.

A cell is a function of tensors alone, so that `compile=True` compiles it once for each stage and batch size.
"""

import torch
from torch.nn import functional as F

from fast_ops import batch_norm, batch_norm_stats, fast_average_pool, move_statistics
from nas201.genotypes import PRIMITIVES
from nas201.model_search import Cell
from operations import on_cpu
from support.devices import memory_format, region_function

SKIP, CONV1, CONV3, POOL = (
    PRIMITIVES.index(name) for name in ("skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
)
CONVS = (CONV1, CONV3)
# With running statistics a CPU takes so many images at a time, so that their activations stay in its cache.
IMAGES_PER_THREAD, COMPILED_IMAGES_PER_THREAD = 16, 64  # a compiled cell keeps fewer of them


def row(target, source):
    """Return the row in the alphas of the edge target<-source: edges are numbered node by node."""
    return target * (target - 1) // 2 + source


def mixing_weights(alphas):
    return torch.softmax(alphas.reshape(alphas.shape[-2:]), dim=-1)  # (E, O)


# ---- batch statistics


def mixed_cell(x, weights, kernels, eps):
    """Compute a cell with batch statistics: x (B, C, H, W), weights (E, O), `kernels` from `outgoing_kernels`.

    Returns the output and the (mean, inverse standard deviation) of each BatchNorm of concatenated channels.
    """
    nodes, statistics = [x] + [None] * len(kernels), []
    for source, of_ops in enumerate(kernels):
        x = nodes[source]
        targets = range(source + 1, len(nodes))
        w = torch.stack([weights[row(target, source)] for target in targets])  # (targets, O)
        active, pooled, out = torch.relu(x), fast_average_pool(x), 0
        for op, kernel in zip(CONVS, of_ops, strict=True):
            y = F.conv2d(active, kernel, padding=kernel.shape[-1] // 2)  # (B, targets * C, H, W)
            y, *moments = batch_norm_stats(y, w[:, op].repeat_interleave(x.shape[1]), None, eps)
            out = out + y
            statistics.append(moments)
        w = w.to(out.dtype)
        for target, of_edge, edge in zip(targets, w, out.chunk(len(targets), dim=1), strict=True):
            edge = torch.addcmul(torch.addcmul(edge, x, of_edge[SKIP]), pooled, of_edge[POOL])
            nodes[target] = edge if nodes[target] is None else nodes[target] + edge
    return nodes[-1], statistics


def outgoing_kernels(cell):
    """Return, for each node but the last, the 1x1 and the 3x3 kernels of the edges out of it, concatenated.

    Also, for each of these concatenations, the BatchNorms behind it.
    """
    kernels, norms = [], []
    for source in range(cell.max_nodes - 1):
        edges = [cell.edges[f"{target}<-{source}"] for target in range(source + 1, cell.max_nodes)]
        kernels.append([torch.cat([edge[op].op[1].weight for edge in edges]) for op in CONVS])
        norms += [[edge[op].op[2] for edge in edges] for op in CONVS]
    return kernels, norms


def forward(network, x, alphas, **settings):
    """Compute what `network(x, alphas)` does in train mode: logits, with gradients; BatchNorm buffers move likewise.

    `settings` are those of `region_function`.
    """
    cell_of = region_function(mixed_cell, **settings)
    weights, bn_updates = mixing_weights(alphas), []

    def searched_cell(cell, s):
        kernels, norms = outgoing_kernels(cell)
        out, statistics = cell_of(s, weights, kernels, norms[0][0].eps)
        count = s.numel() // s.shape[1]
        for behind, moments in zip(norms, statistics, strict=True):
            chunks = (moment.chunk(len(behind)) for moment in moments)
            bn_updates.extend((norm, *chunk, count) for norm, *chunk in zip(behind, *chunks, strict=True))
        return out

    def norm_of(norm, x):
        return batch_norm(x, norm, bn_updates)

    logits = after_stem(network, stem(network, x, norm_of), searched_cell, norm_of)
    move_statistics(bn_updates)
    return logits


# ---- running statistics


def folded_cell(x, weights, kernels, biases):
    """Compute a cell as one convolution a node: of node k, `kernels[k - 1]` (C, k * C, 3, 3), `biases[k - 1]` (C,)."""
    nodes, active, pooled = [x], [], []
    for target, (kernel, bias) in enumerate(zip(kernels, biases, strict=True), start=1):
        active.append(torch.relu(nodes[-1]))
        pooled.append(fast_average_pool(nodes[-1]))
        out = F.conv2d(torch.cat(active, dim=1), kernel, bias, padding=1)
        for source in range(target):
            w = weights[row(target, source)].to(out.dtype)
            out = out.addcmul_(nodes[source], w[SKIP]).addcmul_(pooled[source], w[POOL])
        nodes.append(out)
    return nodes[-1]


def fold_conv(relu, conv, norm):
    """Return kernel (C, C, 3, 3) and bias (C,) of a convolution with its BatchNorm; a 1x1 kernel goes to the centre."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    margin = 1 - conv.padding[0]
    return F.pad(conv.weight * scale.view(-1, 1, 1, 1), (margin,) * 4), -norm.running_mean * scale


def fold(cells):
    """Return for each node k of equal cells kernels (cells, 2, C, k, C, 3, 3) and biases (cells, 2, C, k), unmixed."""
    nodes = []
    for target in range(1, cells[0].max_nodes):
        edges = [[cell.edges[f"{target}<-{source}"] for source in range(target)] for cell in cells]
        convs = [fold_conv(*edge[op].op) for of_cell in edges for op in CONVS for edge in of_cell]
        shape = (len(cells), len(CONVS), target)
        nodes.append([torch.stack(v).unflatten(0, shape).transpose(2, 3) for v in zip(*convs, strict=True)])
    return nodes


def mix(nodes, weights):
    """Return, for each of the cells that `fold` had, the (kernels, biases) that `folded_cell` takes."""
    kernels, biases = [], []
    for target, (kernel, bias) in enumerate(nodes, start=1):
        w = weights[row(target, 0) : row(target + 1, 0), CONV1 : CONV3 + 1].t()  # (2, k)
        kernels.append((kernel * w.view(1, 2, 1, target, 1, 1, 1)).sum(1).flatten(2, 3).unbind())
        biases.append((bias * w.view(1, 2, 1, target)).sum((1, 3)).unbind())
    return zip(zip(*kernels, strict=True), zip(*biases, strict=True), strict=True)


class Evaluator:
    """Measures individuals with "batch" or "running" BatchNorm statistics, without gradients, buffers untouched.

    What depends on the weights alone is computed here, once: make a new one when they have moved.
    """

    @torch.no_grad()
    def __init__(self, network, bn, *, compile=False):
        self.network, self.bn = network, bn
        cells = [cell for cell in network.cells if isinstance(cell, Cell)]
        self.kernels, norms = zip(*(outgoing_kernels(cell) for cell in cells), strict=True)
        self.eps, tracked = norms[0][0][0].eps, norms[0][0][0].running_mean is not None
        self.folding = bn == "running" and tracked  # without running statistics the searched cells use the batch's
        cell_of = folded_cell if self.folding else mixed_cell
        self.cell_of = region_function(cell_of, compile)
        self.images_per_thread = COMPILED_IMAGES_PER_THREAD if compile else IMAGES_PER_THREAD
        cells_per_stage = len(cells) // 3  # one `mix` serves the equal cells of a stage
        firsts = range(0, len(cells), cells_per_stage) if self.folding else ()
        self.stages = [fold(cells[i : i + cells_per_stage]) for i in firsts]

    @torch.no_grad()
    def set_batch(self, x):
        """Do what all individuals share on a batch of images (B, 3, H, W)."""
        s = stem(self.network, x, self.norm_of)
        cut = self.folding and on_cpu(s)
        self.parts = s.split(self.images_per_thread * torch.get_num_threads()) if cut else [s]

    @torch.no_grad()
    def logits(self, alphas):
        """Return the logits (B, num_classes) of one individual, (1, 6, 5) or (6, 5), raw or decoded, on the batch."""
        weights = mixing_weights(alphas)
        if self.folding:
            arguments = [cell for stage in self.stages for cell in mix(stage, weights)]
        else:
            arguments = [(kernels, self.eps) for kernels in self.kernels]

        def part_logits(s):
            of_cell = iter(arguments)

            def searched_cell(cell, s):
                out = self.cell_of(s, weights, *next(of_cell))
                return out if self.folding else out[0]

            return after_stem(self.network, s, searched_cell, self.norm_of)

        return torch.cat([part_logits(part) for part in self.parts])

    def norm_of(self, norm, x):
        return batch_norm(x, norm, [] if self.bn == "batch" else None)


# ---- the network around the searched cells; `norm_of(norm, x)` stands for calling the BatchNorm module


def stem(network, x, norm_of):
    conv, norm = network.stem
    return norm_of(norm, conv(x.contiguous(memory_format=memory_format(x.device))))


def after_stem(network, s, searched_cell, norm_of):
    for cell in network.cells:
        if isinstance(cell, Cell):
            s = searched_cell(cell, s)
        else:
            shortcut = cell.downsample(s)
            for relu, conv, norm in (cell.conv_a.op, cell.conv_b.op):
                s = norm_of(norm, conv(relu(s)))
            s = shortcut + s
    norm, relu = network.lastact
    return network.classifier(network.global_pooling(relu(norm_of(norm, s))).flatten(1))
