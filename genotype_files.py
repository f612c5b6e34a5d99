"""Read and write genotype files safely: genotype.json, and the genotype.pickle of the published scripts. No torch."""

import pickle
from pathlib import Path

from genotypes import OPERATIONS, Genotype
from support.files import UserError, atomic_write, read_bytes, read_json, restricted_unpickle, write_json

FILES = ("genotype.json", "genotype.pickle")  # in a run directory; the second is the published scripts'


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
