"""Discrete cells of the DARTS search space: the Genotype type, the named cells, JSON and legacy files. No torch here.

A cell is a list of (operation, input) pairs, two for each intermediate node. Input 0 is the output of cell k-2, 1 the
output of cell k-1, 2 and up are the earlier nodes. The nodes in `*_concat` make up the cell's output.
"""

from collections import namedtuple

from support.files import UserError

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

# The order is part of the method: it is the last axis of the architecture parameters.
PRIMITIVES = "none max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5".split()
OPERATIONS = [*PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7"]  # the last two occur in NASNet and AmoebaNet only

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


def get(name):
    """Return the named cell. Raises UserError listing the names."""
    if name not in NAMED:
        raise UserError(f"unknown architecture {name!r}; known are {', '.join(NAMED)}")
    return NAMED[name]
