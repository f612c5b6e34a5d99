"""Compute the supernet of `model_search` faster, with the same modules and parameters.

`forward` computes the supernet in training, and an `Evaluator` measures many individuals on one
batch. Tests check that both agree with the reference. This is what makes them fast:

- The memory layout is channels-last everywhere, on CPU and CUDA. The operation `none` is not
  computed.
- A cell is computed state by state instead of node by node. Each state adds the results of its
  outgoing edges to all later nodes. So ReLU, pools and the pools' BatchNorms run once per state
  instead of once per edge. The results of a state are freed before the next state is computed.
- The mixing weight of a candidate is the scale of its last BatchNorm. Weighted candidates are added
  up in place.
- Where a cell reduces, dilated convolutions and skip_connects need only every second pixel. These
  pixels are copied once per state. The skip_connects on all edges out of a state are computed as
  one convolution each for even and for odd pixels.
- While fitness is measured, both inputs of the first cell are the same for all individuals, and so
  is the first input of the second cell, which is the stem's output. The candidates on the edges out
  of these inputs are computed once per batch. One matrix product per cell then gives the sums of an
  individual (`SharedCandidates`).
- On a CPU, the backward pass of depthwise convolutions consists of kernels that are fast there
  (`fast_ops.Depthwise`). Average pools are computed as depthwise convolutions.
- On a GPU, a dilated depthwise convolution takes about eight times as long as an undilated one. So
  each state is split into its four phases (`operations.split_phases`), on which the dilated
  convolutions are undilated. 1x1 convolutions and BatchNorm work pixel by pixel, so their results
  stay split until the sum of a node is complete.
- On a GPU in bfloat16, fitness uses Triton kernels instead (`fused_search.fused_cell`).

Shapes: B images, C channels of a cell, E = 14 edges of a cell, O = 8 operations of an edge. States
are numbered as in the reference: 0 and 1 are a cell's inputs, and 2, 3, ... are its nodes 0, 1, ...
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cell_tensors import (
    FIRST_CONV,
    MAX_POOL,
    POOLS,
    SKIP,
    CellKernels,
    Edge,
    Outgoing,
    factorized_reduce,
    outgoing_kernels,
    row,
)
from fast_ops import (
    NormUpdate,
    batch_norm,
    batch_norm_stats,
    concatenate,
    depthwise,
    every_second,
    fast_average_pool,
    move_statistics,
    split_update,
    uses_triton,
)
from genotypes import PRIMITIVES
from model_search import Cell, Network
from operations import FactorizedReduce, join_phases, on_cpu, split_phases
from support.devices import memory_format, region_function

# Limit for the shared candidates of a cell. At the paper's sizes and a batch of 1,024 images, those of
# the first cell take 2,432 MB in float32, and those of the second cell 1,216 MB.
SHARED_MB = 3072


def forward(network: Network, x: Tensor, alphas: Tensor, *, compile: bool = False, checkpoint: bool = False) -> Tensor:
    """Compute `network(x, alphas)` in train mode: logits (B, num_classes), with gradients.

    Running statistics are updated as in the reference. `compile` compiles the cells. `checkpoint`
    computes each cell again in the backward pass instead of keeping its activations.
    """
    updates = []
    cell_of = region_function(mixed_cell, compile, checkpoint)

    def searched_cell(cell: Cell, h0: Tensor, h1: Tensor, weights: Tensor) -> Tensor:
        kernels = outgoing_kernels(cell, "batch")
        states = [h0, h1, *[None] * cell._steps]
        s, moments = cell_of(states, weights, kernels.outgoing, cell._multiplier, kernels.eps)
        count = s.numel() // s.shape[1]  # every BatchNorm in a cell sees as many pixels as the cell's output has
        for state, norms_of_state in enumerate(kernels.norms):
            for number, norms in enumerate(norms_of_state):
                mean, inverse_std = moments[state][number]
                updates.extend(split_update(norms, mean, inverse_std, count))
        return s

    inputs = first_cell_inputs(network, x, updates)
    logits = cells_logits(network, inputs, torch.softmax(alphas, dim=-1), searched_cell, updates)
    move_statistics(updates)
    return logits


class Evaluator:
    """Computes the logits of individuals without gradients.

    `bn` says which BatchNorm statistics are used, "batch" or "running". Running statistics are not
    updated. An Evaluator prepares tensors from the network's weights when it is made. So make a new
    one after the weights have changed. `triton` allows the kernels of `triton_kernels`, which take
    precedence over `compile`.
    """

    @torch.no_grad()
    def __init__(self, network: Network, bn: str, *, compile: bool = False, triton: bool = True):
        self.network = network
        self.bn = bn
        self.compile = compile
        self.triton = triton
        self.kernels = {cell: outgoing_kernels(cell, bn) for cell in network.cells}
        self.shared = {}  # by cell
        for cell, inputs in zip(network.cells, (2, 1), strict=False):  # the third cell on share nothing
            self.shared[cell] = SharedCandidates(cell, inputs, bn, self.kernels[cell])

    @torch.no_grad()
    def set_batch(self, x: Tensor) -> None:
        """Take a batch of images (B, 3, H, W), and compute the tensors that are the same for all individuals."""
        self.cell_of = region_function(mixed_cell, self.compile)
        self.inputs = first_cell_inputs(self.network, x, self.new_updates())
        h0, h1, h0_next = self.inputs
        if self.triton and self.bn == "batch" and uses_triton(h0):
            from fused_search import fused_cell

            self.cell_of = fused_cell
        for shared, inputs in zip(self.shared.values(), ([h0, h1], [h0_next]), strict=False):
            shared.set_inputs(inputs)

    @torch.no_grad()
    def logits(self, alphas: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of an individual (2, E, O), raw or decoded, on the batch."""
        weights = torch.softmax(alphas, dim=-1)
        return cells_logits(self.network, self.inputs, weights, self.searched_cell, self.new_updates())

    def searched_cell(self, cell: Cell, h0: Tensor, h1: Tensor, weights: Tensor) -> Tensor:
        """Compute a cell from its preprocessed inputs, or from the shared candidates if the cell has them."""
        outgoing = self.kernels[cell].outgoing
        states = [h0, h1, *[None] * cell._steps]
        shared = self.shared.get(cell)
        if shared is not None and shared.matrix is not None:
            states[: shared.inputs] = [None] * shared.inputs
            states[2:] = shared.sums(weights)
            outgoing = outgoing[shared.inputs :]  # the sums already contain the edges out of the shared inputs
        return self.cell_of(states, weights, outgoing, cell._multiplier, self.kernels[cell].eps)[0]

    def new_updates(self) -> list[NormUpdate] | None:
        """Return the argument `updates` of `batch_norm` that selects the statistics `bn`. Nothing reads the list."""
        return [] if self.bn == "batch" else None


class SharedCandidates:
    """The candidates on the edges out of a cell's first inputs, for individuals that share these inputs.

    `inputs` is how many of the cell's two inputs are shared: two in the first cell, one in the second.

    `matrix` has one candidate in each row, flattened to B * C * H * W values. `matrix` is None if
    it would take more than SHARED_MB.

    Some operations give the same result on all edges out of an input, because they have no weights.
    These operations have one row per input. All other operations have one row per edge.
    `first_per_edge` is the first operation with one row per edge. It depends on the cell and on the
    BatchNorm statistics:

        statistics    cell            first_per_edge    operations with one row per input
        batch         not reducing    FIRST_CONV        max_pool, avg_pool, skip_connect
        batch         reducing        SKIP              max_pool, avg_pool
        running       any             MAX_POOL          no operation

    With running statistics the pools differ from edge to edge, because a BatchNorm follows each
    pool.

    The next drawing shows the rows of the matrix from left to right, for two shared inputs, batch
    statistics and two nodes instead of four. "in 0" and "in 1" are the inputs. c3, c5, d3 and d5
    are the convolutions: sep_conv and dil_conv with 3x3 and 5x5 kernels.

        per input                        | per edge: node 0            | per edge: node 1
        in 0           | in 1            | in 0         | in 1         | in 0         | in 1
        max  avg  skip | max  avg  skip  | c3 c5 d3 d5  | c3 c5 d3 d5  | c3 c5 d3 d5  | c3 c5 d3 d5

    The sums of an individual are `mixing @ matrix`. `mixing` has a row for each node. The row holds
    the mixing weights w of the node's own edges, and 0 for the edges of other nodes:

        node 0:  w w w   w w w           | w w w w   w w w w           | 0 0 0 0   0 0 0 0
        node 1:  w w w   w w w           | 0 0 0 0   0 0 0 0           | w w w w   w w w w
    """

    def __init__(self, cell: Cell, inputs: int, bn: str, kernels: CellKernels):
        self.cell = cell
        self.inputs = inputs
        self.outgoing = kernels.outgoing
        self.eps = kernels.eps
        if bn == "running":
            self.first_per_edge = MAX_POOL
        elif cell.reduction:
            self.first_per_edge = SKIP
        else:
            self.first_per_edge = FIRST_CONV
        self.ops_per_input = self.first_per_edge - 1  # `none`, operation 0, has no row
        self.ops_per_edge = len(PRIMITIVES) - self.first_per_edge
        self.rows = inputs * self.ops_per_input + inputs * cell._steps * self.ops_per_edge

    def row_of(self, node: int, state: int, op: int) -> int:
        """Return the row in `matrix` of an operation on the edge from input `state` to `node`."""
        if op < self.first_per_edge:
            return state * self.ops_per_input + op - 1
        edge = self.inputs * node + state
        return self.inputs * self.ops_per_input + edge * self.ops_per_edge + op - self.first_per_edge

    def set_inputs(self, inputs: list[Tensor]) -> None:
        """Compute the candidates for the shared preprocessed inputs, each (B, C, H, W)."""
        self.matrix = None
        like = inputs[0]
        B, C, H, W = like.shape
        stride = 2 if self.cell.reduction else 1
        shape = (self.rows * B, C, H // stride, W // stride)
        if math.prod(shape) * like.element_size() > SHARED_MB * 2**20:
            return
        maps = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like.device))
        maps = maps.chunk(self.rows)  # each (B, C, H, W)
        edges = row(self.cell._steps, 0)
        ones = next(self.cell.parameters()).new_ones(edges, len(PRIMITIVES), C)
        for state, h in enumerate(inputs):
            for candidate in candidates(h, self.outgoing[state], ones, self.eps, moments={}):
                # A candidate with one row per input is yielded once per edge, each time with the
                # same values. So writing its row again does no harm.
                y = join_phases(candidate.y) if candidate.is_split else candidate.y
                maps[self.row_of(candidate.edge.node, state, candidate.op)].copy_(y)
        # A row holds the values of a feature map in memory order. In channels-last, this is not the
        # order of the map's dimensions, so `view` would refuse. `as_strided` makes the rows from
        # the maps here, and the maps from the rows in `sums`.
        self.one_map = maps[0]
        values = maps[0].numel()
        self.matrix = maps[0].as_strided((self.rows, values), (values, 1))

    def sums(self, weights: Tensor) -> list[Tensor]:
        """Return, for each node, the weighted sum (B, C, H, W) of its edges from the shared inputs.

        `weights` are the mixing weights (E, O).
        """
        first = self.first_per_edge
        # fmt: off
        nodes = range(self.cell._steps)
        from_inputs = [weights[row(node, 0) : row(node, self.inputs)] for node in nodes]
        weights = torch.stack(from_inputs)                       # (nodes, inputs, O)
        per_input = weights[..., 1:first].flatten(1)             # (nodes, inputs * ops_per_input)
        per_edge = weights[..., first:].flatten(1)               # (nodes, inputs * ops_per_edge)
        mixing = torch.cat([per_input, torch.block_diag(*per_edge)], dim=1)
        sums = mixing.to(self.matrix.dtype) @ self.matrix        # (nodes, B * C * H * W)
        return [node_sum.as_strided(self.one_map.shape, self.one_map.stride()) for node_sum in sums]
        # fmt: on


# ---- a searched cell


class Candidate(NamedTuple):
    """A candidate operation's normalised output y (B, C, H, W) on an edge."""

    edge: Edge
    op: int
    y: Tensor
    is_scaled: bool  # whether y has already been multiplied by its mixing weight
    is_split: bool = False  # whether y is split into phases, (4 B, C, H / 2, W / 2)


Moments = dict[int, tuple[Tensor, Tensor]]  # by BatchNorm: (mean, inverse standard deviation) of the batch


def mixed_cell(
    states: list[Tensor | None], weights: Tensor, outgoing: list[Outgoing], multiplier: int, eps: float
) -> tuple[Tensor, list[Moments]]:
    """Compute a cell. Returns its output (B, multiplier * C, H, W) and the batch statistics by state.

    `weights` are the mixing weights (E, O). There are two ways to call `mixed_cell`:
    - From the inputs: `states` holds the two preprocessed inputs (B, C, H, W), and then None for
      each node. `outgoing` has all states.
    - From sums: `states` holds None for the shared inputs (see `SharedCandidates`), and for each
      node the sum of its edges from these inputs. `outgoing` has all states but the shared inputs.
    """
    states = list(states)
    all_moments = []
    any_state = next(h for h in states if h is not None)
    C = any_state.shape[1]
    scales = weights.unsqueeze(-1).repeat(1, 1, C)  # (E, O, C), since a BatchNorm's scale is (C,)
    weights = weights.to(any_state.dtype)
    split_sums = [None] * len(states)  # for each node, the sum of its candidates that are split into phases
    for of_state in outgoing:
        moments = {}
        h = joined(states[of_state.state], split_sums[of_state.state])
        states[of_state.state] = h
        for candidate in candidates(h, of_state, scales, eps, moments):
            node = 2 + candidate.edge.node
            if candidate.is_split:
                split_sum = split_sums[node]
                split_sums[node] = candidate.y if split_sum is None else split_sum.add_(candidate.y)
                continue
            total = states[node]
            if total is None:
                total = candidate.y  # the first candidate on an edge is already scaled, see `candidates`
            elif candidate.is_scaled:
                total = total.add_(candidate.y)
            else:
                total = total.addcmul_(candidate.y, weights[candidate.edge.row, candidate.op])
            states[node] = total
        all_moments.append(moments)
    states[-1] = joined(states[-1], split_sums[-1])  # no edge leads out of the last node
    return concatenate(states[-multiplier:]), all_moments


def joined(total: Tensor, split_sum: Tensor | None) -> Tensor:
    """Add to a node's sum (B, C, H, W) the sum of the candidates that are split into phases, if there are any."""
    return total if split_sum is None else total.add_(join_phases(split_sum))


def candidates(h: Tensor, outgoing: Outgoing, scales: Tensor, eps: float, moments: Moments) -> Iterator[Candidate]:
    """Yield all candidates, except `none`, on the edges out of a state h (B, C, H, W).

    `scales` (E, O, C) are the mixing weights. The first candidate on each edge is a convolution,
    which is already scaled and not split. The batch statistics are added to `moments`.
    """

    def normalise(x: Tensor, norm: int, scale: Tensor | None = None) -> Tensor:
        if outgoing.running is not None:
            mean, variance = outgoing.running[norm]
            return F.batch_norm(x, mean, variance, scale, None, False, 0.0, eps)
        y, mean, inverse_std = batch_norm_stats(x, scale, None, eps)
        moments[norm] = (mean, inverse_std)
        return y

    edges = outgoing.edges
    edge_scales = [scales[edge.row] for edge in edges]  # each (O, C)
    reducing = outgoing.skips is not None
    stride = 2 if reducing else 1

    # Once per state: pools, ReLU and reducing skip_connects.
    pools = [F.max_pool2d(h, 3, stride, 1), fast_average_pool(h, stride)]  # each (B, C, H / stride, W / stride)
    if outgoing.pool_norms is not None:
        pools = [normalise(pool, norm) for pool, norm in zip(pools, outgoing.pool_norms, strict=True)]
    relu = torch.relu(h)  # (B, C, H, W)
    even = None
    phases = None
    if reducing:
        even = every_second(relu, 0)  # (B, C, H / 2, W / 2)
        odd = every_second(relu, 1)  # (B, C, H / 2, W / 2)
        y = factorized_reduce(even, odd, outgoing.skips.kernels_1, outgoing.skips.kernels_2, len(edges))
        skip_scales = torch.cat([scale[SKIP] for scale in edge_scales])  # (edges * C,)
        skips = normalise(y, outgoing.skips.norm, skip_scales).chunk(len(edges), dim=1)
        del odd, y
    elif dilates_in_phases(h):
        phases = split_phases(relu)  # (4 B, C, H / 2, W / 2)

    for i, (edge, scale) in enumerate(zip(edges, edge_scales, strict=True)):
        for op, separables in enumerate(edge.convolutions, start=FIRST_CONV):
            first = separables[0]
            dilated = len(separables) == 1
            is_split = dilated and phases is not None
            if is_split:
                y = depthwise(phases, first.depthwise)
            else:
                y = depthwise(relu, first.depthwise, 2 if dilated else 1, even)
            y = F.conv2d(y, first.pointwise)
            last = first
            if len(separables) == 2:  # the second convolution has stride 1
                last = separables[1]
                y = normalise(y, first.norm).relu_()
                y = F.conv2d(depthwise(y, last.depthwise), last.pointwise)
            yield Candidate(edge, op, normalise(y, last.norm, scale[op]), is_scaled=True, is_split=is_split)
        if reducing:
            yield Candidate(edge, SKIP, skips[i], is_scaled=True)
        else:
            yield Candidate(edge, SKIP, h, is_scaled=False)
        for k, op in enumerate(POOLS):
            if edge.pool_norms is None:  # the pools have been normalised above, for all edges
                yield Candidate(edge, op, pools[k], is_scaled=False)
            else:
                yield Candidate(edge, op, normalise(pools[k], edge.pool_norms[k], scale[op]), is_scaled=True)


def dilates_in_phases(h: Tensor) -> bool:
    """Return whether dilated convolutions of a state h (B, C, H, W) are computed on its phases."""
    channels_last = memory_format(h.device) == torch.channels_last
    return channels_last and not on_cpu(h) and h.shape[2] % 2 == h.shape[3] % 2 == 0


# ---- the network around the searched cells; for `updates` see `fast_ops.batch_norm`


class FirstInputs(NamedTuple):
    """The preprocessed inputs of the first two cells that do not depend on the alphas."""

    h0: Tensor  # (B, C, H, W), of the first cell
    h1: Tensor  # (B, C, H, W), of the first cell
    h0_next: Tensor | None  # of the second cell, which also reads the stem; None in a network of one cell


def first_cell_inputs(network: Network, x: Tensor, updates: list[NormUpdate] | None) -> FirstInputs:
    """Apply the stem to images x (B, 3, H, W), and preprocess its output for the cells that read it."""
    conv, norm = network.stem
    cells = network.cells
    x = x.contiguous(memory_format=memory_format(x.device))
    s = batch_norm(conv(x), norm, updates).relu_()  # (B, C_stem, H, W), after the ReLU of `preprocess`
    h0_next = preprocess(cells[1].preprocess0, s, updates) if len(cells) > 1 else None
    h0 = preprocess(cells[0].preprocess0, s, updates)
    h1 = preprocess(cells[0].preprocess1, s, updates)
    return FirstInputs(h0, h1, h0_next)


def cells_logits(
    network: Network,
    inputs: FirstInputs,
    weights: Tensor,
    searched_cell: Callable[[Cell, Tensor, Tensor, Tensor], Tensor],
    updates: list[NormUpdate] | None,
) -> Tensor:
    """Return the logits (B, num_classes) for the mixing weights (2, E, O).

    searched_cell(cell, h0, h1, weights (E, O)) computes a cell from its preprocessed inputs.
    """
    cells = network.cells
    h0, h1, h0_next = inputs
    for i, cell in enumerate(cells):
        s = searched_cell(cell, h0, h1, weights[int(cell.reduction)])  # (B, multiplier * C, H, W)
        if i + 1 < len(cells):
            # The next two cells read s. Preprocess s for both cells now, so that this wide tensor
            # can be freed.
            s = s.relu_()
            h0 = h0_next
            h1 = preprocess(cells[i + 1].preprocess1, s, updates)
            h0_next = preprocess(cells[i + 2].preprocess0, s, updates) if i + 2 < len(cells) else None
            del s
    return network.classifier(s.mean((2, 3)))


def preprocess(module: nn.Module, s: Tensor, updates: list[NormUpdate] | None) -> Tensor:
    """Apply a cell's preprocess0 or preprocess1 without its ReLU, which has already been applied to s."""
    if isinstance(module, FactorizedReduce):
        even = every_second(s, 0)
        odd = every_second(s, 1)
        y = factorized_reduce(even, odd, module.conv_1.weight, module.conv_2.weight)
        return batch_norm(y, module.bn, updates)
    _, conv, norm = module.op
    return batch_norm(conv(s), norm, updates)
