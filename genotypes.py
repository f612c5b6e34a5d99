"""Discrete cells of the DARTS search space: the Genotype type, the named cells, JSON and legacy files. No torch here.

A cell is a list of (operation, input) pairs, two for each intermediate node. Input 0 is the output of cell k-2, 1 the
output of cell k-1, 2 and up are the earlier nodes. The nodes in `*_concat` make up the cell's output.
"""

import pickle
from collections import namedtuple
from pathlib import Path

from support.files import UserError, atomic_write, read_bytes, read_json, restricted_unpickle, write_json

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

# The order is part of the method: it is the last axis of the architecture parameters.
PRIMITIVES = "none max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5".split()
FILES = ("genotype.json", "genotype.pickle")  # in a run directory; the second is the published scripts'
OPERATIONS = [*PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7"]  # the last two occur in NASNet and AmoebaNet only

_SHORT = dict(zip("max avg skip sep3 sep5 dil3 dil5 sep7 7x1".split(), OPERATIONS[1:], strict=True))
_CELLS = {  # name, kind and concat: (operation, input) of each pair
    # Found by EvNAS (Sinha & Chen, GECCO 2021).
    "EvNASA normal 2345": "sep3 0, sep3 1, sep5 2, sep3 1, skip 0, skip 2, dil5 3, sep3 1",
    "EvNASA reduce 2345": "dil5 1, avg 0, sep3 0, avg 2, skip 1, skip 2, skip 1, sep5 0",
    "EvNASB normal 2345": "sep5 0, sep3 1, sep5 2, max 0, sep3 0, sep3 1, skip 0, sep5 2",
    "EvNASB reduce 2345": "skip 1, max 0, max 0, avg 1, skip 2, avg 3, sep5 2, sep5 0",
    "EvNASC normal 2345": "skip 0, sep3 1, skip 2, sep5 1, max 1, sep3 0, sep3 0, sep5 3",
    "EvNASC reduce 2345": "sep5 1, dil3 0, sep5 0, skip 1, max 0, max 1, max 0, max 2",
    # Liu et al., "DARTS: Differentiable Architecture Search" (ICLR 2019), first and second order.
    "DARTS_V1 normal 2345": "sep3 1, sep3 0, skip 0, sep3 1, skip 0, sep3 1, sep3 0, skip 2",
    "DARTS_V1 reduce 2345": "max 0, max 1, skip 2, max 0, max 0, skip 2, skip 2, avg 0",
    "DARTS_V2 normal 2345": "sep3 0, sep3 1, sep3 0, sep3 1, sep3 1, skip 0, skip 0, dil3 2",
    "DARTS_V2 reduce 2345": "max 0, max 1, skip 2, max 1, max 0, skip 2, skip 2, max 1",
    # Zoph et al., "Learning Transferable Architectures for Scalable Image Recognition" (CVPR 2018).
    "NASNet normal 23456": "sep5 1, sep3 0, sep5 0, sep3 0, avg 1, skip 0, avg 0, avg 0, sep3 1, skip 1",
    "NASNet reduce 456": "sep5 1, sep7 0, max 1, sep7 0, avg 1, sep5 0, skip 3, avg 2, sep3 2, max 1",
    # Real et al., "Regularized Evolution for Image Classifier Architecture Search" (AAAI 2019).
    "AmoebaNet normal 456": "avg 0, max 1, sep3 0, sep5 2, sep3 0, avg 3, sep3 1, skip 1, skip 0, avg 1",
    "AmoebaNet reduce 346": "avg 0, sep3 1, max 0, sep7 2, sep7 0, avg 1, max 0, max 1, 7x1 0, sep3 5",
}


def _cell(name):
    parts = {}
    for head, text in _CELLS.items():
        owner, kind, concat = head.split()
        if owner == name:
            pairs = (pair.split() for pair in text.split(", "))
            parts |= {kind: [(_SHORT[op], int(node)) for op, node in pairs], f"{kind}_concat": list(map(int, concat))}
    return Genotype(**parts)


EvNASA, EvNASB, EvNASC, DARTS_V1, DARTS_V2 = map(_cell, ("EvNASA", "EvNASB", "EvNASC", "DARTS_V1", "DARTS_V2"))
DARTS, NASNet, AmoebaNet = DARTS_V2, _cell("NASNet"), _cell("AmoebaNet")
NAMED = {name: value for name, value in globals().items() if isinstance(value, Genotype)}


def get(name):
    """The named cell. Raises UserError listing the names."""
    if name not in NAMED:
        raise UserError(f"unknown architecture {name!r}; known are {', '.join(NAMED)}")
    return NAMED[name]


def _show(value):
    """`value` for a message, short: a hostile file can hold nested values whose repr never ends."""
    if isinstance(value, str):
        return repr(value[:80])
    short = value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**9)
    return repr(value) if short else f"<{type(value).__name__}>"


def validate(genotype, source="genotype"):
    """The same cell with plain lists and tuples. Raises UserError saying which entry of `source` is impossible."""
    if not (isinstance(genotype, tuple) and len(genotype) == 4):
        raise UserError(f"{source}: a genotype has the four parts {', '.join(Genotype._fields)}")
    parts = []
    for kind, pairs, concat in (("normal", *genotype[:2]), ("reduce", *genotype[2:])):
        if not isinstance(pairs, (list, tuple)) or len(pairs) < 2 or len(pairs) % 2 or len(pairs) > 40:
            raise UserError(f"{source}: {kind} must be a list of (operation, input) pairs, two a node")
        for i, pair in enumerate(pairs):
            where = f"{source}: {kind}[{i}]"
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise UserError(f"{where} is {_show(pair)}, not an (operation, input) pair")
            op, node = pair
            last = i // 2 + 1
            if op not in OPERATIONS:
                raise UserError(f"{where} has the unknown operation {_show(op)}; known are {', '.join(OPERATIONS)}")
            if type(node) is not int or not 0 <= node <= last:
                raise UserError(f"{where} has the impossible input {_show(node)}; node {last - 1} can use 0 to {last}")
        nodes = range(2, len(pairs) // 2 + 2)
        if isinstance(concat, range):
            concat = list(concat[: len(nodes) + 1])  # len() fails on the largest ranges
        if not isinstance(concat, (list, tuple)) or not 0 < len(concat) <= len(nodes):
            raise UserError(f"{source}: {kind}_concat must list some of the nodes 2 to {nodes[-1]}")
        if any(type(node) is not int or node not in nodes for node in concat) or len(set(concat)) < len(concat):
            found = ", ".join(map(_show, concat))
            raise UserError(f"{source}: {kind}_concat must list distinct nodes from 2 to {nodes[-1]}, not {found}")
        parts += [[(op, node) for op, node in pairs], list(concat)]
    return Genotype(*parts)


def to_dict(genotype):
    """The form written as JSON."""
    parts = genotype._asdict().items()
    return {field: [list(v) if isinstance(v, tuple) else v for v in values] for field, values in parts}


def from_dict(value, source="genotype"):
    """Genotype from its JSON form. Raises UserError."""
    if not isinstance(value, dict) or set(value) != set(Genotype._fields):
        raise UserError(f"{source}: a genotype is an object with {', '.join(Genotype._fields)}")
    return validate(Genotype(**value), source)


def _reconstruct(cls, base, state):
    """What pickles of protocol 0 and 1 call: copyreg._reconstructor, for a Genotype only."""
    if cls is not Genotype or type(state) is not tuple:
        raise TypeError("not a Genotype")
    return Genotype(*state)


def load(path):
    """Read `genotype.json`, or the `genotype.pickle` of the published scripts. Raises UserError naming the file."""
    if str(path).endswith(".json"):
        return from_dict(read_json(path), path)
    allowed = {
        ("genotypes", "Genotype"): Genotype,
        ("builtins", "range"): range,
        ("__builtin__", "xrange"): range,  # protocols below 3
        ("copy_reg", "_reconstructor"): _reconstruct,  # protocols 0 and 1
        ("__builtin__", "tuple"): None,  # its second argument; never called
    }
    # BUILD could set attributes of the class Genotype; hashing the keys of dictionaries and sets can take for ever.
    refused = ("BUILD", "DICT", "EMPTY_DICT", "EMPTY_SET", "FROZENSET")
    return validate(restricted_unpickle(read_bytes(path), allowed, path, refused), path)


def file_in(run_dir):
    """The genotype file of a run: genotype.json, else the legacy genotype.pickle. Raises UserError."""
    path = next((path for path in map(Path(run_dir).joinpath, FILES) if path.is_file()), None)
    if path is None:
        raise UserError(f"{run_dir} has neither {' nor '.join(FILES)}: it is no run, or its first step is not over")
    return path


def save(genotype, path):
    """Write JSON, or to a path ending in .pickle what the published scripts read (protocol 3: Python 3.6 knows it)."""
    if str(path).endswith(".json"):
        return write_json(path, to_dict(genotype))
    with atomic_write(path) as file:
        pickle.dump(genotype, file, protocol=3)
