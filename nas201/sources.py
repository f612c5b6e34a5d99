"""Readers of the benchmark's files: compact tables, NATS-Bench records, the official .pth.

The readers execute nothing that a file contains. `read_csv` and `read_pth` return a `RawTable`,
which is unchecked: `benchmark.load` checks it. A reader for a new format only has to return a
`RawTable`.
"""

import bz2
import collections
import contextlib
import csv
import io
import itertools
import lzma
import math
import os
import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from support.files import UserError, open_regular
from support.numpy_pickles import Dtype, scalar

DATASETS = ("cifar10", "cifar100", "ImageNet16-120")
SPLITS = ("valid", "test")
# {(data set, split): (data set, metric) in the benchmark's own names}, in the order of the columns.
# The benchmark's "cifar10-valid" means training on half of CIFAR-10's training images.
METRICS = {
    ("cifar10", "valid"): ("cifar10-valid", "x-valid"),
    ("cifar10", "test"): ("cifar10", "ori-test"),
    ("cifar100", "valid"): ("cifar100", "x-valid"),
    ("cifar100", "test"): ("cifar100", "x-test"),
    ("ImageNet16-120", "valid"): ("ImageNet16-120", "x-valid"),
    ("ImageNet16-120", "test"): ("ImageNet16-120", "x-test"),
}
COLUMNS = tuple(f"{dataset.replace('-', '_')}_{split}_200" for dataset, split in METRICS)

# Limits for untrusted files, far above the sizes of real files.
MAX_BYTES = 16 << 20  # of an unpacked table or record; real tables have 3 MB, real records 0.4 MB
MAX_LINES = 100_000  # lines of a table; real tables have 15,626
MAX_LINE = 10_000  # characters of a line; real lines have 200


class RawRecord(NamedTuple):
    """The unchecked figures of one architecture in a source."""

    where: str  # file and line or index, for messages
    cells: dict  # {column: value}


class RawTable(NamedTuple):
    """The unchecked figures of all architectures in a source."""

    header: list[str]  # names of the columns
    records: Iterable[RawRecord]


def as_percent(value: object, name: str, where: str) -> float:
    """Return `value` as a number from 0 to 100.

    Raises UserError for any other value. The message starts with the place `where` and says which
    value `name` has there.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 100:  # also for NaN
        raise UserError(f"{where}: {name} is {value!r:.80}, not a number from 0 to 100")
    return number


# ---- compact tables


def read_csv(path: str) -> RawTable:
    """Read a compact table, .csv or .csv.xz, line by line.

    Raises UserError, also later while the table's records are read.
    """
    reader = csv.reader(lines_of(path))
    with csv_errors(path):
        header = next(reader, [])
    return RawTable(header, csv_records(path, reader, header))


def csv_records(path: str, reader: Iterator[list[str]], header: list[str]) -> Iterator[RawRecord]:
    """Yield the records in the lines after a table's header. Raises UserError."""
    with csv_errors(path):
        for cells in reader:
            if not cells:  # an empty line
                continue
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
            yield RawRecord(where, dict(zip(header, cells, strict=True)))


@contextlib.contextmanager
def csv_errors(path: str) -> Iterator[None]:
    """Turn errors of reading a CSV file into a UserError."""
    try:
        yield
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from error


def lines_of(path: str) -> Iterator[str]:
    """Yield the lines of a table one by one.

    A hostile file may have 16 MB of empty lines, which would take a gigabyte as a list.
    """
    with io.TextIOWrapper(io.BytesIO(unpacked(path)), "utf-8-sig", newline="") as text:
        for number in itertools.count(1):
            line = text.readline(MAX_LINE)
            if len(line) == MAX_LINE:
                raise csv.Error(f"line {number} is too long for a table")
            if number > MAX_LINES:
                raise csv.Error(f"more than {MAX_LINES:,} lines")
            if not line:
                return
            yield line


# ---- files of the benchmark

# All objects that files of the benchmark refer to. `read_pth` makes torch.load accept them too.
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): Dtype,
    ("numpy.core.multiarray", "scalar"): scalar,
    ("numpy._core.multiarray", "scalar"): scalar,
}


def read_pth(path: str) -> RawTable:
    """Read the official .pth. Raises UserError, also later while the table's records are read."""
    import torch

    from support.weights import load_torch

    with torch.serialization.safe_globals([(value, ".".join(name)) for name, value in ALLOWED.items()]):
        content = load_torch(path, "benchmark file")
    return official_table(path, content)


def official_table(path: str, content: object, records: dict | None = None) -> RawTable:
    """Return the table of a benchmark file whose content has the list `meta_archs`.

    `records` is {index: record}. By default the records are those in `arch2infos` of the content.
    Raises UserError.
    """
    content = content if isinstance(content, dict) else {}
    archs = content.get("meta_archs")
    if records is None:
        records = content.get("arch2infos")
    if not isinstance(archs, list) or not isinstance(records, dict):
        raise UserError(f"{path}: not a file of NAS-Bench-201, because it has no list meta_archs or no dict arch2infos")
    return RawTable(["index", "arch", *COLUMNS], official_records(path, archs, records))


def official_records(path: str, archs: list, records: dict) -> Iterator[RawRecord]:
    """Yield a RawRecord for each architecture, without figures if `records` has no record of it.

    Only the figures are kept, so that the memory of the records can be freed. Raises UserError.
    """
    for index, arch in enumerate(archs):
        where = f"{path}, index {index}"
        figures = figures_of(records[index], "full", arch, where) if index in records else {}
        yield RawRecord(where, {"index": index, "arch": arch, **figures})


def figures_of(record: object, key: str, arch: str, where: str) -> dict[str, float]:
    """Return {column: mean accuracy over the seeds after 200 epochs} for a record.

    `record[key]` holds the runs of 200 epochs. Columns that no run measured are left out. Raises
    UserError if the record is not about `arch`, or if it does not have the form of a record.
    """
    try:
        state = record[key]
        if state["arch_str"] != arch:
            raise UserError(f"{where}: the record describes {state['arch_str']!r:.80}, not {arch}")
        figures = {}
        for column, (dataset, metric) in zip(COLUMNS, METRICS.values(), strict=True):
            last = f"{metric}@199"  # after the 200th epoch
            values = []
            for (name, _seed), run in state["all_results"].items():
                if name == dataset and last in run["eval_acc1es"]:
                    values.append(as_percent(run["eval_acc1es"][last], f"{dataset} {last}", where))
            if values:
                figures[column] = statistics.fmean(values)
        return figures
    except UserError:
        raise
    except Exception as error:  # the record has some other form
        raise UserError(f"{where}: not a record of 200 epochs ({error!r:.120})") from error


def unpacked(path: str) -> bytes:
    """Return the content of a file, unpacked if the file is an .xz or a .pbz2.

    Raises UserError if the file cannot be read or its content is too large.
    """
    opener = {".xz": lzma.open, ".pbz2": bz2.open}.get(os.path.splitext(path)[1], contextlib.nullcontext)
    try:
        with open_regular(path) as packed, opener(packed) as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read, or is damaged ({error})") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES >> 20} MB when unpacked, far more than a file of the benchmark")
    return data
