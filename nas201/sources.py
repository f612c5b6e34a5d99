"""Readers of the benchmark's files: compact tables, NATS-Bench records, the official .pth. They execute nothing."""

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

from support.files import UserError, open_regular
from support.numpy_pickles import Dtype, scalar

DATASETS = ("cifar10", "cifar100", "ImageNet16-120")
SPLITS = ("valid", "test")
# (dataset, split) -> the benchmark's own data set and metric. `cifar10-valid` are the networks trained on half the
# training images; the order is that of the table's columns.
METRICS = {
    ("cifar10", "valid"): ("cifar10-valid", "x-valid"),
    ("cifar10", "test"): ("cifar10", "ori-test"),
    ("cifar100", "valid"): ("cifar100", "x-valid"),
    ("cifar100", "test"): ("cifar100", "x-test"),
    ("ImageNet16-120", "valid"): ("ImageNet16-120", "x-valid"),
    ("ImageNet16-120", "test"): ("ImageNet16-120", "x-test"),
}
COLUMNS = tuple(f"{dataset.replace('-', '_')}_{split}_200" for dataset, split in METRICS)
MAX_BYTES = 16 << 20  # of an unpacked table or record; real ones are 3 MB and 0.4 MB
MAX_LINES, MAX_LINE = 100_000, 10_000  # of a table, and characters of one; real ones have 15,626 lines of 200


def percent(value, name, where):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 100:  # NaN fails too
        raise UserError(f"{where}: {name} is {value!r:.80}, not a number from 0 to 100")
    return number


def read_csv(path):
    """Yield the header, then (where, {column: cell}) of each line."""
    try:
        reader = csv.reader(lines_of(path))
        header = next(reader, [])
        yield header
        for cells in filter(None, reader):
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
            yield where, dict(zip(header, cells, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no CSV file: {error}") from error


def lines_of(path):
    """Yield the lines of a table, one at a time: as a list, 16 MB of empty ones would take a gigabyte."""
    with io.TextIOWrapper(io.BytesIO(unpacked(path)), "utf-8-sig", newline="") as text:
        for number in itertools.count(1):
            line = text.readline(MAX_LINE)
            if len(line) == MAX_LINE or number > MAX_LINES:
                raise csv.Error(f"line {number} is longer, or comes later, than any of a table")
            if not line:
                return
            yield line


# All that a file of the benchmark refers to; also what torch is told to accept.
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): Dtype,
    ("numpy.core.multiarray", "scalar"): scalar,
    ("numpy._core.multiarray", "scalar"): scalar,
}


def read_pth(path):
    """Read the official file; the figures are picked at once, which gives the memory back."""
    import torch

    from support.weights import load_torch

    with torch.serialization.safe_globals([(value, ".".join(name)) for name, value in ALLOWED.items()]):
        return official_rows(path, load_torch(path, "benchmark file"))


def official_rows(path, content, records=None):
    """Yield the header, then (where, {column: cell}) of `meta_archs`; `records` stands for the content's own."""
    content = content if isinstance(content, dict) else {}
    archs, records = content.get("meta_archs"), content.get("arch2infos") if records is None else records
    if not isinstance(archs, list) or not isinstance(records, dict):
        raise UserError(f"{path} has no list meta_archs or no dict arch2infos: it is not NAS-Bench-201")
    yield ["index", "arch", *COLUMNS]
    for index, arch in enumerate(archs):
        where = f"{path}, index {index}"
        figures = figures_of(records[index], "full", arch, where) if index in records else {}
        yield where, {"index": index, "arch": arch, **figures}


def figures_of(record, key, arch, where):
    """Return {column: mean over seeds} of a record with the 200-epoch runs at `key`, without what no run measured."""
    try:
        state, figures = record[key], {}
        if state["arch_str"] != arch:
            raise UserError(f"{where} describes {state['arch_str']!r:.80}, not {arch}")
        for column, (dataset, metric) in zip(COLUMNS, METRICS.values(), strict=True):
            last = f"{metric}@199"
            trials = [run["eval_acc1es"] for (name, _seed), run in state["all_results"].items() if name == dataset]
            values = [percent(trial[last], f"{dataset} {last}", where) for trial in trials if last in trial]
            figures |= {column: statistics.fmean(values)} if values else {}
        return figures
    except UserError:
        raise
    except Exception as error:  # an object of any other shape
        raise UserError(f"{where} is not a record of 200 epochs: {error!r:.120}") from error


def unpacked(path):
    """Return the bytes of a file, unpacked where it is an .xz or a .pbz2."""
    opener = {".xz": lzma.open, ".pbz2": bz2.open}.get(os.path.splitext(path)[1], contextlib.nullcontext)
    try:
        with open_regular(path) as packed, opener(packed) as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read or is damaged: {error}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} unpacks to more than {MAX_BYTES >> 20} MB, far more than a file of its kind")
    return data
