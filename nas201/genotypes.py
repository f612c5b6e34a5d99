"""Arch strings, the discrete cells of NAS-Bench-201. No torch here.

A cell has four nodes and an operation on each of its six edges: `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`, where `op~j` in
the k-th group is the operation from node j to node k. Node 0 is the cell's input, node 3 its output.
"""

import re

from support.files import UserError

# The order is part of the method: it is the last axis of the architecture parameters.
PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = tuple((node, source) for node in range(1, 4) for source in range(node))  # 1<-0, 2<-0, 2<-1, 3<-0, 3<-1, 3<-2
NUM_ARCHS = len(PRIMITIVES) ** len(EDGES)  # 15,625

_TEMPLATE = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"
_PATTERN = re.compile(re.escape(_TEMPLATE).replace(r"\{\}", r"([^~|+]*)"))


def to_arch_string(ops):
    """Return the arch string of six operation indices in edge order."""
    return _TEMPLATE.format(*(PRIMITIVES[op] for op in ops))


def from_arch_string(text):
    """Return six operation indices in edge order. Raises UserError saying what is wrong with `text`."""
    shown = repr(text if len(text) <= 150 else text[:150] + "...")
    match = _PATTERN.fullmatch(text)
    if match is None:
        groups = text.split("+")
        for node, source in EDGES:
            if node > len(groups) or f"~{source}|" not in groups[node - 1]:
                raise UserError(f"arch string {shown} lacks the edge {node}<-{source}")
        raise UserError(f"arch string {shown} does not have the form {_TEMPLATE.replace('{}', 'OP')}")
    for (node, source), op in zip(EDGES, match.groups(), strict=True):
        if op not in PRIMITIVES:
            known = ", ".join(PRIMITIVES)
            raise UserError(
                f"arch string {shown}: unknown operation {op!r} on edge {node}<-{source}; known are {known}"
            )
    return tuple(map(PRIMITIVES.index, match.groups()))
