"""NAS-Bench-201 (Dong & Yang, ICLR 2020): the true accuracy of each of the 15,625 architectures.

    python -m nas201.benchmark export SRC DST    write the compact table (.csv or .csv.xz)
    python -m nas201.benchmark query SRC ARCH    accuracies and ranks of an arch string or index
    python -m nas201.benchmark best SRC          the best architecture per data set

Sources: a compact table, a NATS-Bench directory (NATS-tss-v1_0-3ffb9-simple), and the official
NAS-Bench-201-v1_1-096897.pth. Figures are top-1 accuracies in percent after 200 epochs, averaged over the seeds an
architecture was trained with; other training lengths never stand in for them. Reading executes nothing that a file
contains. torch is imported for the .pth alone.
"""

import bz2
import collections
import csv
import functools
import lzma
import math
import os
import re
import statistics
import sys

import numpy as np

from nas201.genotypes import NUM_ARCHS, from_arch_string
from safeio import UserError, atomic_write, command, restricted_unpickle

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
MAX_BYTES = 64 << 20  # of an unpacked table or record; real ones are 2 MB and 0.4 MB


class Benchmark:
    """What `load` returns. `absent` lists the columns that the source has not, `missing` the indices without a record.

    archs: the arch strings in the benchmark's order. table: all rows (15625, 6) in the order of COLUMNS, NaN where
    there is no figure; None where `read` (index -> row) reads them one by one.
    """

    def __init__(self, path, archs, table=None, read=None, absent=(), missing=()):
        self.path, self.archs, self.table, self.absent, self.missing = path, archs, table, tuple(absent), tuple(missing)
        self._read, self._index = read, {arch: index for index, arch in enumerate(archs)}

    def __len__(self):
        return len(self.archs)

    def arch(self, index):
        if not 0 <= index < len(self):
            raise UserError(f"index {index} is not in 0..{len(self) - 1}")
        return self.archs[index]

    def index(self, arch_string):
        from_arch_string(arch_string)  # says what is wrong with it
        return self._index[arch_string]

    def row(self, index):
        """Six accuracies in the order of COLUMNS, NaN where there is none. Raises UserError as `accuracy`."""
        self.arch(index)
        return self._read(index) if self.table is None else self.table[index]

    def accuracy(self, index, dataset, split):
        """Accuracy in percent, or None where the source has no such figure (see `absent` and `missing`).

        Raises UserError for a dataset not in DATASETS, a split not in SPLITS, an impossible index, a damaged record.
        """
        if (dataset, split) not in METRICS:
            raise UserError(f"no figures for {dataset} {split}; there are {', '.join(DATASETS)}, each valid and test")
        value = float(self.row(index)[list(METRICS).index((dataset, split))])
        return None if math.isnan(value) else value

    def full_table(self):
        """All rows (15625, 6), read now if need be. Raises UserError when a record is missing."""
        if self.missing:
            count = f"{len(self.missing)} of {len(self)} architectures"
            raise UserError(f"{self.path} is incomplete: {count} have no record, the first is index {self.missing[0]}")
        if self.table is None:
            from tqdm import tqdm  # 15,625 files take minutes

            self.table = np.array([self.row(index) for index in tqdm(range(len(self)), unit="arch", disable=None)])
        return self.table


def load(path):
    """Open a source: .csv or .csv.xz (a compact table), a NATS-Bench directory or the official .pth.

    The .pth is reported to need 28 GB of memory while it loads: export it once. Raises UserError naming the file, and
    the row where there is one, when something is wrong with it.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return _load_nats(path)
    if not os.path.exists(path):
        raise UserError(f"cannot read {path}: No such file or directory")
    if path.endswith((".csv", ".csv.xz")):
        return _from_rows(path, _read_csv(path))
    if path.endswith(".pth"):
        return _from_rows(path, _read_pth(path))
    raise UserError(f"{path} is no .csv, .csv.xz, .pth or NATS-Bench directory")


def _from_rows(path, lines):
    """The Benchmark of a reader's header and (where, {column: cell}) of each architecture; figures can be left out.

    Every source goes through this check: all architectures, each under one index, figures from 0 to 100.
    """
    header = next(lines)
    absent = [name for name in COLUMNS if name not in header]
    for name in ("index", "arch"):
        if name not in header:
            raise UserError(f"{path} has no column {name}; a table has index, arch and some of {', '.join(COLUMNS)}")
    if len(set(header)) < len(header):
        raise UserError(f"{path} has two columns of one name")
    if len(absent) == len(COLUMNS):
        raise UserError(f"{path} has no column of accuracies after 200 epochs, such as {COLUMNS[1]}")
    archs, seen, table = [None] * NUM_ARCHS, {}, np.full((NUM_ARCHS, len(COLUMNS)), np.nan)
    for where, cells in lines:
        number, arch = cells["index"], cells["arch"]
        index = int(number) if re.fullmatch(r"\d{1,9}", str(number)) else -1
        if not 0 <= index < NUM_ARCHS:
            raise UserError(f"{where}: index {number!r:.80} is not a number in 0..{NUM_ARCHS - 1}")
        if archs[index] is not None:
            raise UserError(f"{where}: second row of index {index}")
        try:
            from_arch_string(str(arch))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if arch in seen:
            raise UserError(f"{where}: indices {seen[arch]} and {index} have the same architecture {arch}")
        archs[index], seen[arch] = arch, index
        for k, name in enumerate(COLUMNS):
            if name in cells:
                table[index, k] = _percent(cells[name], name, where)
    if None in archs:
        raise UserError(f"{path} has {len(seen)} rows instead of {NUM_ARCHS}: index {archs.index(None)} is missing")
    return Benchmark(path, archs, table, absent=absent, missing=np.flatnonzero(np.isnan(table).all(1)).tolist())


def _percent(value, name, where):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 100:  # NaN fails too
        raise UserError(f"{where}: {name} is {value!r:.80}, not a number from 0 to 100")
    return number


def _read_csv(path):
    """Yields the header, then (where, {column: cell}) of each line."""
    try:
        reader = csv.reader(_unpacked(path).decode("utf-8-sig").splitlines())
        header = next(reader, [])
        yield header
        for cells in filter(None, reader):
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
            yield where, dict(zip(header, cells, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no CSV file: {error}") from error


def save(benchmark, path):
    """Write all of a source as .csv or .csv.xz, without the columns it has not. Raises UserError."""
    path = os.fspath(path)
    if not path.endswith((".csv", ".csv.xz")):
        raise UserError(f"{path}: a table is written as .csv or .csv.xz")
    with atomic_write(path) as file:  # opened first: reading a source can take an hour
        columns = {"index": range(len(benchmark)), "arch": benchmark.archs}
        for name, column in zip(COLUMNS, benchmark.full_table().T, strict=True):
            if name not in benchmark.absent:
                if np.isnan(column).any():
                    raise UserError(f"{benchmark.path}, index {np.isnan(column).argmax()}: no figure for {name}")
                columns[name] = column.tolist()
        rows = zip(*columns.values(), strict=True)
        data = "".join(",".join(map(str, cells)) + "\n" for cells in (columns, *rows)).encode()
        file.write(lzma.compress(data) if path.endswith(".xz") else data)


class Dtype:
    """Stands in for numpy.dtype in pickles: of a number's type, only code and byte order are taken.

    The real one accepts states that crash numpy or ask for gigabytes.
    """

    def __init__(self, code, *_):
        if code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
            raise ValueError(f"{code!r:.80} is no number's type")
        self.code = code

    def __setstate__(self, state):
        if state[1] not in ("<", ">", "=", "|"):
            raise ValueError(f"{state[1]!r:.80} is no byte order")
        self.code = state[1] + self.code


def _scalar(dtype, data):
    """Stands in for numpy.core.multiarray.scalar: a Python number."""
    return np.frombuffer(data, dtype.code)[0].item()


# All that a file of the benchmark refers to; also what torch is told to accept.
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


def _load_nats(folder):
    """A NATS-Bench directory: `meta.pickle.pbz2`, and a record an architecture that is read when it is asked for."""

    def unpickle(name):
        path = os.path.join(folder, name)
        return path, restricted_unpickle(_unpacked(path), ALLOWED, path)

    archs = _from_rows(folder, _official_rows(*unpickle("meta.pickle.pbz2"), records={})).archs
    names, present = [f"{index:06d}.pickle.pbz2" for index in range(NUM_ARCHS)], set(os.listdir(folder))
    missing = [index for index, name in enumerate(names) if name not in present]

    @functools.cache
    def read(index):
        figures = {}
        if names[index] in present:
            path, record = unpickle(names[index])
            figures = _figures(record, "200", archs[index], path)
        return np.array([figures.get(name, math.nan) for name in COLUMNS])

    return Benchmark(folder, archs, read=read, missing=missing)


def _read_pth(path):
    """As the other readers; the figures are picked at once, which gives the memory back."""
    import torch

    from utils import load_torch

    with torch.serialization.safe_globals([(value, ".".join(name)) for name, value in ALLOWED.items()]):
        return _official_rows(path, load_torch(path, "benchmark file"))


def _official_rows(path, content, records=None):
    """Yields the header, then (where, {column: cell}) of `meta_archs`; `records` stands for the content's own."""
    content = content if isinstance(content, dict) else {}
    archs, records = content.get("meta_archs"), content.get("arch2infos") if records is None else records
    if not isinstance(archs, list) or not isinstance(records, dict):
        raise UserError(f"{path} has no list meta_archs or no dict arch2infos: it is not NAS-Bench-201")
    yield ["index", "arch", *COLUMNS]
    for index, arch in enumerate(archs):
        where = f"{path}, index {index}"
        figures = _figures(records[index], "full", arch, where) if index in records else {}
        yield where, {"index": index, "arch": arch, **figures}


def _figures(record, key, arch, where):
    """{column: mean over seeds} of a record that has the 200-epoch runs at `key`, without what no run has measured."""
    try:
        state, figures = record[key], {}
        if state["arch_str"] != arch:
            raise UserError(f"{where} describes {state['arch_str']!r:.80}, not {arch}")
        for column, (dataset, metric) in zip(COLUMNS, METRICS.values(), strict=True):
            last = f"{metric}@199"
            trials = [run["eval_acc1es"] for (name, _seed), run in state["all_results"].items() if name == dataset]
            values = [_percent(trial[last], f"{dataset} {last}", where) for trial in trials if last in trial]
            figures |= {column: statistics.fmean(values)} if values else {}
        return figures
    except UserError:
        raise
    except Exception as error:  # an object of any other shape
        raise UserError(f"{where} is not a record of 200 epochs: {error!r:.120}") from error


def _unpacked(path):
    """The bytes of a file, unpacked where it is an .xz or a .pbz2."""
    opener = {".xz": lzma.open, ".pbz2": bz2.open}.get(os.path.splitext(path)[1], open)
    try:
        with opener(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read or is damaged: {error}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} unpacks to more than {MAX_BYTES >> 20} MB, far more than a file of its kind")
    return data


def query(source, arch):
    """Print an architecture's accuracies, and its rank among all 15,625 where the source is one table."""
    index = int(arch) if re.fullmatch(r"-?\d{1,9}", arch) else source.index(arch)
    print(f"index {index}  {source.arch(index)}")
    print(f"{'data set':15} {'split':6} {'accuracy':>8} {'rank':>6}")
    for k, (dataset, split) in enumerate(METRICS):
        accuracy, rank = source.accuracy(index, dataset, split), "-"
        if accuracy is not None and source.table is not None and not source.missing:
            rank = 1 + int((source.table[:, k] > accuracy).sum())
        print(f"{dataset:15} {split:6} {'absent' if accuracy is None else f'{accuracy:.2f}':>8} {rank:>6}")


def best(source):
    """Print the best architecture of each data set and split."""
    for (dataset, split), column in zip(METRICS, source.full_table().T, strict=True):
        if np.isnan(column).all():
            print(f"{dataset:15} {split:6}   absent")
        else:
            index = int(np.nanargmax(column))
            print(f"{dataset:15} {split:6} {column[index]:8.2f}  index {index:5}  {source.arch(index)}")


@command
def main(argv=None):
    match sys.argv[1:] if argv is None else argv:
        case ["-h" | "--help", *_]:
            print(__doc__)
            return
        case ["export", path, destination]:
            save(source := load(path), destination)
            print(f"{destination}: {len(source)} architectures")
        case ["query", path, arch]:
            query(source := load(path), arch)
        case ["best", path]:
            best(source := load(path))
        case _:
            raise UserError("give export SRC DST, query SRC ARCH or best SRC (see --help)")
    if source.absent:
        print(f"note: {source.path} has no {', '.join(source.absent)}", file=sys.stderr)
    if source.missing:
        print(f"note: {source.path} has no record of {len(source.missing)} architectures", file=sys.stderr)


if __name__ == "__main__":
    main()
