"""Arch strings, which describe the cells of NAS-Bench-201. This module does not import torch.

A cell has four nodes and one operation on each of its six edges. The arch string groups the edges
by their target node: `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`. In the group of node k, `op~j` is the
operation from node j to node k. Node 0 is the cell's input and node 3 is its output.
"""

import re
from collections.abc import Sequence

from support.files import UserError

# The order is part of the method: it is the last axis of the architecture parameters.
PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = tuple((node, source) for node in range(1, 4) for source in range(node))  # 1<-0, 2<-0, 2<-1, 3<-0, 3<-1, 3<-2
NUM_ARCHS = len(PRIMITIVES) ** len(EDGES)  # 15,625

_TEMPLATE = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"
_PATTERN = re.compile(re.escape(_TEMPLATE).replace(r"\{\}", r"([^~|+]*)"))
_MOST_SHOWN = 150  # messages show at most this many characters of an arch string


def to_arch_string(operations: Sequence[int]) -> str:
    """Return the arch string of six indices into PRIMITIVES, in the order of EDGES."""
    return _TEMPLATE.format(*(PRIMITIVES[index] for index in operations))


def from_arch_string(text: str) -> tuple[int, ...]:
    """Return six indices into PRIMITIVES, in the order of EDGES. Raises UserError, which says what is wrong."""
    shown = repr(text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "...")
    match = _PATTERN.fullmatch(text)
    if match is None:
        groups = text.split("+")
        for node, source in EDGES:
            if node > len(groups) or f"~{source}|" not in groups[node - 1]:
                raise UserError(f"arch string {shown} lacks the edge {node}<-{source}")
        raise UserError(f"arch string {shown} does not have the form {_TEMPLATE.replace('{}', 'OP')}")
    names = match.groups()
    for (node, source), name in zip(EDGES, names, strict=True):
        if name not in PRIMITIVES:
            known = ", ".join(PRIMITIVES)
            raise UserError(
                f"arch string {shown}: unknown operation {name!r} on edge {node}<-{source}; known are {known}"
            )
    return tuple(PRIMITIVES.index(name) for name in names)
