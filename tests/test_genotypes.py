"""The named cells; reading and writing genotypes; wrong and hostile files."""

import copy
import json
import os
import pickle
import pickletools
import struct
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genotype_files
import genotypes
from genotypes import Genotype
from support.files import UserError

from helpers import Call, bomb

LEGACY = Path(__file__).parent / "legacy_genotype.pickle"

# The cells as (operation, input), written out a second time.
TABLE = """
EvNASA normal 2345 | sep3 0 sep3 1 | sep5 2 sep3 1 | skip 0 skip 2 | dil5 3 sep3 1
EvNASA reduce 2345 | dil5 1 avg 0 | sep3 0 avg 2 | skip 1 skip 2 | skip 1 sep5 0
EvNASB normal 2345 | sep5 0 sep3 1 | sep5 2 max 0 | sep3 0 sep3 1 | skip 0 sep5 2
EvNASB reduce 2345 | skip 1 max 0 | max 0 avg 1 | skip 2 avg 3 | sep5 2 sep5 0
EvNASC normal 2345 | skip 0 sep3 1 | skip 2 sep5 1 | max 1 sep3 0 | sep3 0 sep5 3
EvNASC reduce 2345 | sep5 1 dil3 0 | sep5 0 skip 1 | max 0 max 1 | max 0 max 2
DARTS_V1 normal 2345 | sep3 1 sep3 0 | skip 0 sep3 1 | skip 0 sep3 1 | sep3 0 skip 2
DARTS_V1 reduce 2345 | max 0 max 1 | skip 2 max 0 | max 0 skip 2 | skip 2 avg 0
DARTS_V2 normal 2345 | sep3 0 sep3 1 | sep3 0 sep3 1 | sep3 1 skip 0 | skip 0 dil3 2
DARTS_V2 reduce 2345 | max 0 max 1 | skip 2 max 1 | max 0 skip 2 | skip 2 max 1
NASNet normal 23456 | sep5 1 sep3 0 | sep5 0 sep3 0 | avg 1 skip 0 | avg 0 avg 0 | sep3 1 skip 1
NASNet reduce 456 | sep5 1 sep7 0 | max 1 sep7 0 | avg 1 sep5 0 | skip 3 avg 2 | sep3 2 max 1
AmoebaNet normal 456 | avg 0 max 1 | sep3 0 sep5 2 | sep3 0 avg 3 | sep3 1 skip 1 | skip 0 avg 1
AmoebaNet reduce 346 | avg 0 sep3 1 | max 0 sep7 2 | sep7 0 avg 1 | max 0 max 1 | conv_7x1_1x7 0 sep3 5
"""
LONG = {"max": "max_pool_3x3", "avg": "avg_pool_3x3", "skip": "skip_connect", "conv_7x1_1x7": "conv_7x1_1x7"}
NAMES = ["EvNASA", "EvNASB", "EvNASC", "DARTS_V1", "DARTS_V2", "DARTS", "NASNet", "AmoebaNet"]


def table_cells():
    cells = {}
    for line in TABLE.strip().splitlines():
        head, *nodes = line.split(" | ")
        name, kind, concat = head.split()
        words = " ".join(nodes).split()
        pairs = []
        for op, node in zip(words[::2], words[1::2], strict=True):
            pairs.append((LONG.get(op) or f"{op[:3]}_conv_{op[3]}x{op[3]}", int(node)))
        cells.setdefault(name, {}).update({kind: pairs, f"{kind}_concat": [int(c) for c in concat]})
    cells["DARTS"] = cells["DARTS_V2"]
    return cells


def one_line(error):
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert len(text) < 1000
    return text


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.fixture
def pickle_file(tmp_path):
    return lambda data: write(tmp_path / "genotype.pickle", data)


# ---- named cells


@pytest.mark.parametrize("name", NAMES)
def test_named_cell_is_the_published_one(name):
    expected = Genotype(**table_cells()[name])
    assert genotypes.get(name) == getattr(genotypes, name) == expected
    assert genotype_files.validate(expected) == expected


def test_names_and_primitives_keep_their_order():
    assert list(genotypes.NAMED) == NAMES
    assert genotypes.PRIMITIVES == (
        "none max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5".split()
    )
    assert Genotype._fields == ("normal", "normal_concat", "reduce", "reduce_concat")


@pytest.mark.parametrize("name", ["EvNASD", "", "evnasa", "__class__", "os", "get"])
def test_unknown_name_is_refused_with_the_list(name):
    with pytest.raises(UserError) as error:
        genotypes.get(name)
    for known in NAMES:
        assert known in one_line(error)


# ---- files


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["json", "pickle"])
def test_saved_cell_is_loaded_unchanged(tmp_path, name, suffix):
    path = tmp_path / f"genotype.{suffix}"
    genotype_files.save(genotypes.get(name), path)
    loaded = genotype_files.load(path)
    assert type(loaded) is Genotype
    assert loaded == genotypes.get(name)
    assert {type(pair) for pair in loaded.normal + loaded.reduce} == {tuple}
    assert os.listdir(tmp_path) == [path.name]


def test_json_file_holds_four_lists(tmp_path):
    genotype_files.save(genotypes.EvNASA, tmp_path / "genotype.json")
    value = json.loads((tmp_path / "genotype.json").read_text())
    assert list(value) == ["normal", "normal_concat", "reduce", "reduce_concat"]
    assert value["normal"][2] == ["sep_conv_5x5", 2]
    assert value["reduce_concat"] == [2, 3, 4, 5]


def test_published_file_is_read():
    assert genotype_files.load(LEGACY) == genotypes.EvNASA


@pytest.mark.parametrize("protocol", range(3, 6))
@pytest.mark.parametrize("concat", [[2, 3, 4, 5], range(2, 6), (2, 3, 4, 5)])
def test_pickle_of_python3_is_read(pickle_file, protocol, concat):
    cell = genotypes.EvNASC._replace(normal_concat=concat, reduce_concat=concat)
    assert genotype_files.load(pickle_file(pickle.dumps(cell, protocol))) == genotypes.EvNASC


def test_published_scripts_read_our_pickle(tmp_path, monkeypatch):
    """They call plain pickle.load, under Python 3.6, with their own `genotypes`."""
    path = tmp_path / "genotype.pickle"
    genotype_files.save(genotypes.EvNASB, path)
    published = types.ModuleType("genotypes")
    published.Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")
    monkeypatch.setitem(sys.modules, "genotypes", published)
    with open(path, "rb") as file:
        cell = pickle.load(file)
    assert type(cell) is published.Genotype
    assert cell == genotypes.EvNASB
    assert max(opcode.proto for opcode, _, _ in pickletools.genops(path.read_bytes())) <= 3


@pytest.mark.parametrize("suffix", ["json", "pickle"])
def test_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(UserError) as error:
        genotype_files.load(tmp_path / f"absent.{suffix}")
    assert f"absent.{suffix}" in one_line(error)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "genotype.json"
    genotype_files.save(genotypes.EvNASA, path)
    with pytest.raises(TypeError):
        genotype_files.save(genotypes.EvNASB._replace(reduce_concat=object()), path)
    assert genotype_files.load(path) == genotypes.EvNASA
    assert os.listdir(tmp_path) == ["genotype.json"]


@pytest.mark.parametrize("text", ["", "{", "[1", "nan", "\xff", "[" * 100_000, '{"normal": 1' + "0" * 5000 + "}"])
def test_damaged_json_is_refused(tmp_path, text):
    path = write(tmp_path / "genotype.json", text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        genotype_files.load(path)
    assert "genotype.json" in one_line(error)


# ---- malformed genotypes


def valid_dict():
    return copy.deepcopy(genotype_files.to_dict(genotypes.EvNASA))


def put(value, path, new):
    """A copy of `value` in which the entry at `path` is `new`."""
    if not path:
        return new
    value = value.copy()
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


@pytest.mark.parametrize(
    "path, new, named",
    [
        ((), [1, 2, 3, 4], "normal_concat"),
        (("normal",), [], "normal"),
        (("normal",), "sep_conv_3x3", "normal"),
        (("reduce",), [["skip_connect", 0]] * 3, "reduce"),
        (("reduce",), [["skip_connect", 0]] * 42, "reduce"),
        (("normal", 3), ["skip_connect"], "normal[3]"),
        (("normal", 3), "ab", "normal[3]"),
        (("normal", 3), {"skip_connect": 0, "none": 1}, "normal[3]"),
        (("reduce", 1, 0), "sep_conv_9x9", "reduce[1]"),
        (("reduce", 1, 0), "os.system", "reduce[1]"),
        (("reduce", 1, 0), ["none"], "reduce[1]"),
        (("reduce", 1, 0), None, "reduce[1]"),
        (("normal", 0, 1), 2, "normal[0]"),
        (("normal", 1, 1), -1, "normal[1]"),
        (("reduce", 7, 1), 5, "reduce[7]"),
        (("reduce", 7, 1), True, "reduce[7]"),
        (("reduce", 7, 1), 1.0, "reduce[7]"),
        (("reduce", 7, 1), "1", "reduce[7]"),
        (("normal_concat",), [], "normal_concat"),
        (("normal_concat",), [2, 3, 4, 6], "normal_concat"),
        (("normal_concat",), [1, 2, 3, 4], "normal_concat"),
        (("reduce_concat",), [2, 2, 3], "reduce_concat"),
        (("reduce_concat",), [2, 3, 4, 5, 5], "reduce_concat"),
        (("reduce_concat",), 5, "reduce_concat"),
        (("reduce_concat",), "2345", "reduce_concat"),
        (("reduce_concat", 0), [2], "reduce_concat"),
        (("reduce_concat", 0), True, "reduce_concat"),
    ],
)
def test_malformed_genotype_is_refused_by_entry(tmp_path, path, new, named):
    file = write(tmp_path / "g.json", json.dumps(put(valid_dict(), path, new)).encode())
    with pytest.raises(UserError) as error:
        genotype_files.load(file)
    line = one_line(error)
    assert "g.json" in line
    assert named in line


def test_missing_part_is_refused():
    value = valid_dict()
    del value["reduce"]
    with pytest.raises(UserError) as error:
        genotype_files.from_dict(value)
    assert "reduce" in one_line(error)


def test_additional_part_is_refused():
    with pytest.raises(UserError) as error:
        genotype_files.from_dict({**valid_dict(), "extra": 1})
    one_line(error)


def is_cell(value):
    """Independent statement of what a JSON genotype is."""
    if type(value) is not dict or sorted(value) != ["normal", "normal_concat", "reduce", "reduce_concat"]:
        return False
    for kind in ("normal", "reduce"):
        pairs, concat = value[kind], value[f"{kind}_concat"]
        if type(pairs) is not list or len(pairs) not in range(2, 41, 2) or type(concat) is not list or not concat:
            return False
        for i, pair in enumerate(pairs):
            if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not int:
                return False
            if pair[0] not in genotypes.OPERATIONS or pair[1] not in range(2 + i // 2):
                return False
        if any(type(c) is not int for c in concat) or len(set(concat)) != len(concat):
            return False
        if not set(concat) <= set(range(2, 2 + len(pairs) // 2)):
            return False
    return True


SCALARS = st.none() | st.booleans() | st.integers(-2, 8) | st.floats() | st.text(max_size=3)
OPS = st.sampled_from(genotypes.OPERATIONS)
VALUES = st.recursive(
    SCALARS | OPS, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=3), x, max_size=2), max_leaves=6
)
PATHS = (
    st.tuples(st.sampled_from(["normal", "reduce"]), st.integers(0, 7), st.integers(0, 1))
    | st.tuples(st.sampled_from(["normal", "reduce"]), st.integers(0, 7))
    | st.tuples(st.sampled_from(["normal_concat", "reduce_concat"]), st.integers(0, 3))
    | st.tuples(st.sampled_from(Genotype._fields))
    | st.just(())
)


@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(PATHS, VALUES | st.integers(-1, 6) | OPS | st.tuples(OPS, st.integers(-1, 6)).map(list))
def test_validation_accepts_exactly_the_possible_cells(path, new):
    value = put(valid_dict(), path, new)
    if is_cell(value):
        assert genotype_files.to_dict(genotype_files.from_dict(value)) == value
    else:
        with pytest.raises(UserError) as error:
            genotype_files.from_dict(value)
        one_line(error)


# ---- hostile pickles


def refused(path):
    """The line in which a pickle is refused; it names the file."""
    with pytest.raises(UserError) as error:
        genotype_files.load(path)
    assert "genotype.pickle" in one_line(error)
    return one_line(error)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["system", "eval", "exec", "open"])
@pytest.mark.parametrize("nested", [False, True])
def test_pickled_call_is_refused_and_not_executed(tmp_path, pickle_file, protocol, kind, nested):
    marker = tmp_path / "executed"
    value = {
        "system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"open({str(marker)!r}, 'w').close()"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w').close()"),
        "open": Call(open, str(marker), "w"),
    }[kind]
    if nested:
        value = genotypes.EvNASA._replace(normal=[("skip_connect", value)] * 2)
    path = pickle_file(pickle.dumps(value, protocol))
    message = refused(path)
    if protocol >= 2 or not nested:  # in protocols 0 and 1 the cell itself is refused first
        assert kind in message
    assert not marker.exists()


def test_ordinary_unpickler_would_execute_the_call(tmp_path):
    """Guards the test above: an ordinary unpickler does run them."""
    pickle.loads(pickle.dumps(Call(os.system, f"touch {tmp_path / 'executed'}")))
    assert (tmp_path / "executed").exists()


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    "module, name",
    [
        ("genotypes", "pickle.loads"),
        ("genotypes", "Genotype._make"),
        ("genotypes", "Genotype.__init__.__globals__"),
        ("genotypes", "load"),
        ("genotypes", "get"),
        ("builtins", "getattr"),
        ("builtins", "list"),
        ("builtins", "range.__class__"),
        ("support.files", "UserError"),
        ("os\nsystem", "\x1b[31m"),
    ],
)
def test_pickled_reference_is_refused(pickle_file, module, name):
    refused(pickle_file(b"\x80\x04" + text(module) + text(name) + b"\x93."))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x04",
        b"\x80\x09.",
        b"not a pickle",
        b"\x80\x04N.",
        b"]p-1\n.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of a terabyte
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x02\x82\x01.",  # extension registry
        b"Pid\n.",  # persistent id
        b"\x80\x05\x97.",  # out-of-band buffer
        b"\x80\x02cgenotypes\nGenotype\n.",  # the class itself
        b"\x80\x02cgenotypes\nGenotype\n)R.",  # called without parts
        b"\x80\x02}X\x06\x00\x00\x00normalNs.",
    ],
)
def test_damaged_pickle_is_refused(pickle_file, data):
    refused(pickle_file(data))


@pytest.mark.parametrize("put_index", [b"p999999999999\n", b"p5000000\n", b"r\xff\xff\xff\x7f", b"q\xff"])
def test_large_memo_index_is_refused(pickle_file, put_index):
    refused(pickle_file(b"\x80\x02]" + put_index + b"."))


def test_truncated_pickle_is_refused(pickle_file):
    data = LEGACY.read_bytes()
    for length in range(len(data)):
        refused(pickle_file(data[:length]))


def test_flipped_bit_gives_a_valid_cell_or_an_error(pickle_file):
    """Some bits of the names and numbers can be flipped without harm; other files are refused."""
    data = LEGACY.read_bytes()
    kinds = set()
    for i in range(len(data)):
        for bit in range(8):
            path = pickle_file(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :])
            try:
                kinds.add(is_cell(genotype_files.to_dict(genotype_files.load(path))))
            except UserError:
                kinds.add("refused")
    assert kinds == {True, "refused"}


SELF = []
SELF.append(SELF)


HUGE = {"bomb": bomb(), "self": SELF, "int": 10**6000, "range": range(10**30), "str": "x" * 10**6}


@pytest.mark.parametrize("path", [("normal",), ("normal", 0), ("normal", 0, 0), ("normal", 0, 1), ("reduce_concat", 1)])
@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_huge_value_is_refused(pickle_file, path, value):
    cell = put(put(valid_dict(), ("normal", 0), ["skip_connect", 0]), path, value)
    refused(pickle_file(pickle.dumps(Genotype(**cell), 3)))


@pytest.mark.parametrize("concat", [range(2, 10**30), range(10**30), range(2, 2), range(2, -(10**30), -1)])
def test_impossible_range_is_refused(pickle_file, concat):
    refused(pickle_file(pickle.dumps(genotypes.EvNASA._replace(normal_concat=concat), 3)))


@pytest.mark.parametrize("container", [lambda x: {x: 1}, lambda x: {x}, lambda x: frozenset([x])])
def test_dictionary_or_set_is_refused(pickle_file, container):
    """Dictionaries and sets hash their content: on nested pairs that takes for ever."""
    data = pickle.dumps(container("key"), 4)
    key = pickle.dumps("key", 4)[11:-1]  # without header and stop
    assert data.count(key) == 1
    nested = pickle.dumps(bomb(), 4)[11:-1]
    refused(pickle_file(b"\x80\x04" + data[11:].replace(key, nested)))


def test_pickle_cannot_set_attributes(pickle_file):
    """Opcode BUILD with a slot state sets attributes, of the class too."""
    state = pickle.dumps((None, {"_fields": ("a",), "__len__": None}), 2)[2:-1]
    fields = Genotype._fields
    refused(pickle_file(b"\x80\x02cgenotypes\nGenotype\n" + state + b"b0" + pickle.dumps(genotypes.EvNASA, 2)[2:]))
    assert "BUILD" in refused(pickle_file(LEGACY.read_bytes()[:-1] + b"Nb."))  # without any attribute
    assert Genotype._fields is fields
    assert len(genotypes.EvNASA) == 4
