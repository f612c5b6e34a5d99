"""Cells of the DARTS search space (S1): the Genotype type and the named cells.

A cell is a list of (operation, input) pairs, two for each intermediate node. Input 0 is the output
of the cell before the last one (k-2), input 1 is the output of the last cell (k-1), and inputs 2
and up are the earlier nodes of the same cell. The cell's output concatenates the nodes that
`*_concat` lists. This module does not import torch.
"""

from typing import NamedTuple

from support.files import UserError


class Genotype(NamedTuple):
    """A normal cell, which keeps the resolution, and a reduction cell, which halves it."""

    normal: list[tuple[str, int]]  # (operation, input) pairs, two for each node
    normal_concat: list[int]  # the nodes that make up the output
    reduce: list[tuple[str, int]]
    reduce_concat: list[int]


Cell = Genotype | str  # a Genotype of the DARTS space, or an arch string of NAS-Bench-201

# The order of the operations is part of the method: it is their order on the last axis of the
# alphas.
PRIMITIVES = "none max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5".split()
OPERATIONS = [*PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7"]  # the last two occur only in NASNet and AmoebaNet

# fmt: off
# Found by EvNAS (Sinha & Chen, GECCO 2021).
EvNASA = Genotype(
    normal=[("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_5x5", 2), ("sep_conv_3x3", 1),
            ("skip_connect", 0), ("skip_connect", 2), ("dil_conv_5x5", 3), ("sep_conv_3x3", 1)],
    normal_concat=[2, 3, 4, 5],
    reduce=[("dil_conv_5x5", 1), ("avg_pool_3x3", 0), ("sep_conv_3x3", 0), ("avg_pool_3x3", 2),
            ("skip_connect", 1), ("skip_connect", 2), ("skip_connect", 1), ("sep_conv_5x5", 0)],
    reduce_concat=[2, 3, 4, 5])
EvNASB = Genotype(
    normal=[("sep_conv_5x5", 0), ("sep_conv_3x3", 1), ("sep_conv_5x5", 2), ("max_pool_3x3", 0),
            ("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_5x5", 2)],
    normal_concat=[2, 3, 4, 5],
    reduce=[("skip_connect", 1), ("max_pool_3x3", 0), ("max_pool_3x3", 0), ("avg_pool_3x3", 1),
            ("skip_connect", 2), ("avg_pool_3x3", 3), ("sep_conv_5x5", 2), ("sep_conv_5x5", 0)],
    reduce_concat=[2, 3, 4, 5])
EvNASC = Genotype(
    normal=[("skip_connect", 0), ("sep_conv_3x3", 1), ("skip_connect", 2), ("sep_conv_5x5", 1),
            ("max_pool_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 0), ("sep_conv_5x5", 3)],
    normal_concat=[2, 3, 4, 5],
    reduce=[("sep_conv_5x5", 1), ("dil_conv_3x3", 0), ("sep_conv_5x5", 0), ("skip_connect", 1),
            ("max_pool_3x3", 0), ("max_pool_3x3", 1), ("max_pool_3x3", 0), ("max_pool_3x3", 2)],
    reduce_concat=[2, 3, 4, 5])
# Liu et al., "DARTS: Differentiable Architecture Search" (ICLR 2019), first and second order.
DARTS_V1 = Genotype(
    normal=[("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 0), ("sep_conv_3x3", 1),
            ("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 2)],
    normal_concat=[2, 3, 4, 5],
    reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 0),
            ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("avg_pool_3x3", 0)],
    reduce_concat=[2, 3, 4, 5])
DARTS_V2 = Genotype(
    normal=[("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)],
    normal_concat=[2, 3, 4, 5],
    reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1),
            ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)],
    reduce_concat=[2, 3, 4, 5])
DARTS = DARTS_V2
# Zoph et al., "Learning Transferable Architectures for Scalable Image Recognition" (CVPR 2018).
NASNet = Genotype(
    normal=[("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("sep_conv_5x5", 0), ("sep_conv_3x3", 0),
            ("avg_pool_3x3", 1), ("skip_connect", 0), ("avg_pool_3x3", 0), ("avg_pool_3x3", 0),
            ("sep_conv_3x3", 1), ("skip_connect", 1)],
    normal_concat=[2, 3, 4, 5, 6],
    reduce=[("sep_conv_5x5", 1), ("sep_conv_7x7", 0), ("max_pool_3x3", 1), ("sep_conv_7x7", 0),
            ("avg_pool_3x3", 1), ("sep_conv_5x5", 0), ("skip_connect", 3), ("avg_pool_3x3", 2),
            ("sep_conv_3x3", 2), ("max_pool_3x3", 1)],
    reduce_concat=[4, 5, 6])
# Real et al., "Regularized Evolution for Image Classifier Architecture Search" (AAAI 2019).
AmoebaNet = Genotype(
    normal=[("avg_pool_3x3", 0), ("max_pool_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_5x5", 2),
            ("sep_conv_3x3", 0), ("avg_pool_3x3", 3), ("sep_conv_3x3", 1), ("skip_connect", 1),
            ("skip_connect", 0), ("avg_pool_3x3", 1)],
    normal_concat=[4, 5, 6],
    reduce=[("avg_pool_3x3", 0), ("sep_conv_3x3", 1), ("max_pool_3x3", 0), ("sep_conv_7x7", 2),
            ("sep_conv_7x7", 0), ("avg_pool_3x3", 1), ("max_pool_3x3", 0), ("max_pool_3x3", 1),
            ("conv_7x1_1x7", 0), ("sep_conv_3x3", 5)],
    reduce_concat=[3, 4, 6])
# fmt: on

NAMED = {name: value for name, value in globals().items() if isinstance(value, Genotype)}


def get(name: str) -> Genotype:
    """Return the cell called `name`, such as "EvNASA". Raises UserError, which lists the names."""
    if name not in NAMED:
        raise UserError(f"unknown cell {name!r}; the named cells are {', '.join(NAMED)}")
    return NAMED[name]
