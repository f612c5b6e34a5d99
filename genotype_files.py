"""Read and write cells: genotype.json, and the genotype.pickle of the published scripts.

Files can come from strangers. Nothing in a file is executed, and every entry of a cell is checked
before anything is built from the cell. This module does not import torch.
"""

import pickle
from pathlib import Path

from genotypes import OPERATIONS, Cell, Genotype
from support.files import UserError, atomic_write, read_bytes, read_json, restricted_unpickle, write_json

FILES = ("genotype.json", "genotype.pickle")  # in a run directory; the published scripts read the pickle
MOST_PAIRS = 40  # (operation, input) pairs of a cell; the largest named cell has ten


# ---- files


def load(path: str | Path) -> Cell:
    """Read a cell from a genotype.json, or from a genotype.pickle of the published scripts.

    A JSON file can also hold an arch string of NAS-Bench-201, which is returned unchecked.
    Raises UserError, which names the file.
    """
    if str(path).endswith(".json"):
        value = read_json(path)
        is_arch = isinstance(value, dict) and set(value) == {"arch"}
        return from_json(value["arch"] if is_arch else value, path)
    allowed = {("genotypes", "Genotype"): Genotype, ("builtins", "range"): range}
    # The opcode BUILD could set attributes of the class Genotype. Dictionaries and sets hash their
    # keys, and hashing nested tuples can take forever.
    refused = ("BUILD", "DICT", "EMPTY_DICT", "EMPTY_SET", "FROZENSET")
    return validate(restricted_unpickle(read_bytes(path), allowed, path, refused), path)


def save(cell: Cell, path: str | Path) -> None:
    """Write a cell as JSON if `path` ends in .json, else as a pickle for the published scripts."""
    if str(path).endswith(".json"):
        write_json(path, {"arch": cell} if isinstance(cell, str) else to_dict(cell))
        return
    with atomic_write(path) as file:
        pickle.dump(cell, file, protocol=3)  # Python 3.6 can read this protocol


def files_in(run_dir: str | Path) -> list[Path]:
    """Return the genotype files of a run, genotype.json before genotype.pickle."""
    paths = [Path(run_dir) / name for name in FILES]
    return [path for path in paths if path.is_file()]


def file_in(run_dir: str | Path) -> Path:
    """Return the genotype file of a run, preferably the JSON file. Raises UserError if there is none."""
    paths = files_in(run_dir)
    if not Path(run_dir).is_dir():
        raise UserError(f"{run_dir}: there is no such run directory")
    if not paths:
        raise UserError(
            f"{run_dir} has neither {' nor '.join(FILES)}: it is not a run directory, "
            "or its first generation or epoch is not finished"
        )
    return paths[0]


# ---- the JSON form


def to_json(cell: Cell) -> dict | str:
    """Return the JSON form of a cell. For an arch string, this is the string itself."""
    return cell if isinstance(cell, str) else to_dict(cell)


def from_json(value: object, source: str | Path = "genotype") -> Cell:
    """Return the cell whose JSON form is `value`. Arch strings are not checked here. Raises UserError."""
    return value if isinstance(value, str) else from_dict(value, source)


def to_dict(genotype: Genotype) -> dict:
    """Return the JSON form of a Genotype, a dictionary of its four parts."""
    return {
        "normal": [list(pair) for pair in genotype.normal],
        "normal_concat": list(genotype.normal_concat),
        "reduce": [list(pair) for pair in genotype.reduce],
        "reduce_concat": list(genotype.reduce_concat),
    }


def from_dict(value: object, source: str | Path = "genotype") -> Genotype:
    """Return the Genotype whose JSON form is `value`. Raises UserError, which names `source`."""
    if not isinstance(value, dict) or set(value) != set(Genotype._fields):
        raise UserError(f"{source}: a genotype is an object with the keys {', '.join(Genotype._fields)}")
    return validate(Genotype(**value), source)


# ---- checks


def validate(genotype: object, source: str | Path = "genotype") -> Genotype:
    """Check a genotype, and return it as plain lists and tuples.

    Raises UserError, which names the impossible entry of `source`.
    """
    if not (isinstance(genotype, tuple) and len(genotype) == 4):
        raise UserError(f"{source}: a genotype has the four parts {', '.join(Genotype._fields)}")
    normal, normal_concat, reduce, reduce_concat = genotype
    normal = validate_pairs(normal, f"{source}: normal")
    normal_concat = validate_concat(normal_concat, len(normal) // 2, f"{source}: normal_concat")
    reduce = validate_pairs(reduce, f"{source}: reduce")
    reduce_concat = validate_concat(reduce_concat, len(reduce) // 2, f"{source}: reduce_concat")
    return Genotype(normal, normal_concat, reduce, reduce_concat)


def validate_pairs(pairs: object, where: str) -> list[tuple[str, int]]:
    """Check the (operation, input) pairs of a cell, and return them as a list of tuples. Raises UserError."""
    if not isinstance(pairs, (list, tuple)) or not 2 <= len(pairs) <= MOST_PAIRS or len(pairs) % 2:
        raise UserError(f"{where} must be a list of (operation, input) pairs, two for each node")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"{where}[{i}] is {shortened(pair)}, not an (operation, input) pair")
        operation, source = pair
        node = i // 2  # the node that the pair belongs to; its inputs are 0, 1 and the nodes before it
        if operation not in OPERATIONS:
            known = ", ".join(OPERATIONS)
            raise UserError(f"{where}[{i}] has the unknown operation {shortened(operation)}; known are {known}")
        if type(source) is not int or not 0 <= source <= node + 1:
            raise UserError(
                f"{where}[{i}] has the impossible input {shortened(source)}; node {node} can use 0 to {node + 1}"
            )
    return [(operation, source) for operation, source in pairs]


def validate_concat(concat: object, nodes: int, where: str) -> list[int]:
    """Check which nodes make up the output of a cell with `nodes` nodes, and return their list. Raises UserError."""
    possible = range(2, nodes + 2)
    if isinstance(concat, range):
        concat = list(concat[: nodes + 1])  # a range can be huge; one entry too many is enough to refuse it
    if not isinstance(concat, (list, tuple)) or not 0 < len(concat) <= nodes:
        raise UserError(f"{where} must list some of the nodes 2 to {possible[-1]}")
    if any(type(node) is not int or node not in possible for node in concat) or len(set(concat)) < len(concat):
        found = ", ".join(shortened(node) for node in concat)
        raise UserError(f"{where} must list distinct nodes from 2 to {possible[-1]}, not {found}")
    return list(concat)


def shortened(value: object) -> str:
    """Return `value` as a short text for a message. A hostile file can hold nested values whose repr never ends."""
    if isinstance(value, str):
        return repr(value[:80])
    if value is None or isinstance(value, float):
        return repr(value)
    if isinstance(value, int) and abs(value) < 10**9:
        return repr(value)
    return f"<{type(value).__name__}>"
