"""Compute a searched cell of the DARTS space for fitness on a GPU, with the kernels of `triton_kernels`.

`fused_cell` replaces `fast_search.mixed_cell` where an individual is measured in bfloat16 with
batch statistics. It reads and writes memory less often. A separable convolution is one kernel,
which also normalises its input and sums up the statistics of its output. The candidates of an edge
are normalised, weighted and added up by one kernel.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import triton_kernels
from cell_tensors import AVG_POOL, FIRST_CONV, MAX_POOL, SKIP, Edge, Outgoing, Separable, factorized_reduce
from fast_ops import batch_norm_stats, every_second


def fused_cell(
    states: list[Tensor | None], weights: Tensor, outgoing: list[Outgoing], multiplier: int, eps: float
) -> tuple[Tensor, list]:
    """Compute what `fast_search.mixed_cell` computes, without gradients. The list of batch statistics is empty."""
    states = list(states)
    for of_state in outgoing:
        h = states[of_state.state]
        for edge, maps, affine in edges_out_of(h, of_state, weights, eps):
            node = 2 + edge.node
            states[node] = triton_kernels.weighted_sum(states[node], maps, affine)
    return torch.cat(states[-multiplier:], dim=1), []


def edges_out_of(
    h: Tensor, outgoing: Outgoing, weights: Tensor, eps: float
) -> Iterator[tuple[Edge, list[Tensor], Tensor]]:
    """Yield each edge out of a state h (B, C, H, W), with the arguments of `triton_kernels.weighted_sum`.

    These are the outputs of the edge's operations: four convolutions, skip_connect, two pools. With
    them come the factors and offsets (7, 2, C), which normalise each output and apply its mixing
    weight.
    """
    C = h.shape[1]
    edges = outgoing.edges
    reducing = outgoing.skips is not None
    stride = 2 if reducing else 1
    pools = [F.max_pool2d(h, 3, stride, 1), F.avg_pool2d(h, 3, stride, 1, count_include_pad=False)]
    pools = [batch_norm_stats(pool, None, None, eps)[0] for pool in pools]
    skips = [h] * len(edges)
    if reducing:
        relu = torch.relu(h)
        kernels = (outgoing.skips.kernels_1, outgoing.skips.kernels_2)
        y = factorized_reduce(every_second(relu, 0), every_second(relu, 1), *kernels, len(edges))
        skips = batch_norm_stats(y, None, None, eps)[0].chunk(len(edges), dim=1)
    one = weights.new_ones(())
    no_offset = weights.new_zeros(3, C)
    for edge, skip in zip(edges, skips, strict=True):
        w = weights[edge.row]  # (O,)
        maps = []
        affines = []
        for op, separables in enumerate(edge.convolutions, start=FIRST_CONV):
            y, affine = convolve(h, separables, stride, one, w[op], eps)
            maps.append(y)
            affines.append(affine)
        # The other three outputs are normalised already, so they only have a factor.
        factors = torch.stack([w[SKIP], w[MAX_POOL], w[AVG_POOL]]).view(3, 1).expand(3, C)
        others = torch.stack([factors, no_offset], dim=1)  # (3, 2, C)
        yield edge, [*maps, skip, *pools], torch.cat([torch.stack(affines), others])


def convolve(
    h: Tensor, separables: list[Separable], stride: int, one: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Apply one dilated or two undilated separable convolutions to a state.

    Returns the output before its BatchNorm, and the BatchNorm times the mixing weight as factors and
    offsets (2, C).
    """
    dilation = 2 if len(separables) == 1 else 1
    y = h
    affine = None
    for number, separable in enumerate(separables, start=1):
        y, moments = triton_kernels.separable(y, separable.depthwise, separable.pointwise, stride, dilation, affine)
        is_last = number == len(separables)
        affine = triton_kernels.normalisation(moments, weight if is_last else one, y.numel() // y.shape[1], eps)
        stride = 1  # of the second convolution
    return y, affine
