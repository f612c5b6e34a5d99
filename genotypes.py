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


def _show(value):
    """Shorten `value` for a message: a hostile file can hold nested values whose repr never ends."""
    if isinstance(value, str):
        return repr(value[:80])
    short = value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**9)
    return repr(value) if short else f"<{type(value).__name__}>"


def validate(genotype, source="genotype"):
    """Return the cell with plain lists and tuples. Raises UserError saying which entry of `source` is impossible."""
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
    """Return the form that is written as JSON."""
    parts = genotype._asdict().items()
    return {field: [list(v) if isinstance(v, tuple) else v for v in values] for field, values in parts}


def to_json(cell):
    """Return the JSON form of a Genotype, or the arch string (of another space) as it is."""
    return cell if isinstance(cell, str) else to_dict(cell)


def from_json(value, source="genotype"):
    """Return the cell of which `to_json` made `value`; an arch string is not checked here. Raises UserError."""
    return value if isinstance(value, str) else from_dict(value, source)


def from_dict(value, source="genotype"):
    """Return the Genotype of its JSON form. Raises UserError."""
    if not isinstance(value, dict) or set(value) != set(Genotype._fields):
        raise UserError(f"{source}: a genotype is an object with {', '.join(Genotype._fields)}")
    return validate(Genotype(**value), source)


def _reconstruct(cls, base, state):
    """Do what pickles of protocol 0 and 1 call: copyreg._reconstructor, for a Genotype only."""
    if cls is not Genotype or type(state) is not tuple:
        raise TypeError("not a Genotype")
    return Genotype(*state)


def load(path):
    """Read a Genotype from `genotype.json` or from the `genotype.pickle` of the published scripts.

    Of a JSON file of another space: its arch string, unchecked. Raises UserError naming the file.
    """
    if str(path).endswith(".json"):
        value = read_json(path)
        return from_json(value["arch"] if isinstance(value, dict) and set(value) == {"arch"} else value, path)
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


def files_in(run_dir):
    """Return the genotype files of a run, genotype.json before the legacy genotype.pickle."""
    return [path for path in map(Path(run_dir).joinpath, FILES) if path.is_file()]


def file_in(run_dir):
    """Return the first of them. Raises UserError where there is none."""
    for path in files_in(run_dir):
        return path
    raise UserError(f"{run_dir} has neither {' nor '.join(FILES)}: it is no run, or its first step is not over")


def save(cell, path):
    """Write a Genotype or an arch string as JSON, or to a .pickle what the published scripts read (Python 3.6 too)."""
    if str(path).endswith(".json"):
        return write_json(path, {"arch": cell} if isinstance(cell, str) else to_dict(cell))
    with atomic_write(path) as file:
        pickle.dump(cell, file, protocol=3)
