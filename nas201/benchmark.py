"""NAS-Bench-201 (Dong & Yang, ICLR 2020): the true accuracy of each of the 15,625 architectures.

    python -m nas201.benchmark export SRC DST    write the compact table (.csv, .csv.xz or .npz)
    python -m nas201.benchmark query PATH ARCH   accuracies and ranks of an arch string or index
    python -m nas201.benchmark best PATH         the best architecture per data set

Sources: a compact table, a NATS-Bench directory (NATS-tss-v1_0-3ffb9-simple), and the official
NAS-Bench-201-v1_1-096897.pth. Figures are top-1 accuracies in percent after 200 epochs, averaged over the seeds an
architecture was trained with; other training lengths never stand in for them. Reading executes nothing that a file
contains. torch is imported for the .pth alone.
"""

import argparse
import bz2
import collections
import csv
import functools
import io
import lzma
import math
import operator
import os
import re
import sys
import zipfile

import numpy as np

from nas201.genotypes import NUM_ARCHS, from_arch_string
from safeio import UserError, atomic_write, read_bytes, restricted_unpickle

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
LAST_EPOCH = 199
MAX_BYTES = 64 << 20  # of a decompressed table or record; real ones are 2 MB and 0.4 MB


class Benchmark:
    """What `load` returns. `absent` lists the columns that the source has not, `missing` the indices without a record.

    archs: the arch strings in the benchmark's order. row: index -> its six figures in the order of COLUMNS, NaN where
    there is none. table: all rows (15625, 6), or None where they are read one by one.
    """

    def __init__(self, path, archs, row, table=None, absent=(), missing=()):
        self.path, self.table, self.absent, self.missing = path, table, tuple(absent), tuple(missing)
        self._archs, self._row = archs, row
        self._index = {arch: index for index, arch in enumerate(archs)}

    def __len__(self):
        return len(self._archs)

    def arch(self, index):
        """The arch string at `index`. Raises UserError when there is no such index."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise UserError(f"index {index} is not in 0..{len(self) - 1}")
        return self._archs[index]

    def index(self, arch_string):
        """The benchmark's index of an arch string. Raises UserError saying what is wrong with the string."""
        from_arch_string(arch_string)
        return self._index[arch_string]

    def row(self, index):
        """Six accuracies in the order of COLUMNS, NaN where there is none. Raises UserError as `accuracy`."""
        self.arch(index)
        return self._row(index)

    def accuracy(self, index, dataset, split):
        """Accuracy in percent, or None where the source has no such figure (see `absent` and `missing`).

        dataset: cifar10, cifar100 or ImageNet16-120; split: valid or test. Raises UserError for other names, an
        impossible index, or a damaged record.
        """
        if (dataset, split) not in METRICS:
            raise UserError(f"no figures for {dataset} {split}; there are {', '.join(DATASETS)}, each valid and test")
        value = float(self.row(index)[list(METRICS).index((dataset, split))])
        return None if math.isnan(value) else value

    def full_table(self):
        """All rows (15625, 6), read now if need be. Raises UserError when a record is missing."""
        if self.missing:
            raise UserError(
                f"{self.path} is incomplete: {len(self.missing)} of {len(self)} architectures have no record, "
                f"the first is index {self.missing[0]}"
            )
        if self.table is None:
            from tqdm import tqdm  # 15,625 files take minutes

            self.table = np.array([self.row(index) for index in tqdm(range(len(self)), unit="arch", disable=None)])
        return self.table


def load(path):
    """Open a source: .csv, .csv.xz or .npz (a compact table), a NATS-Bench directory or the official .pth.

    The .pth is reported to need 28 GB of memory while it loads: export it once. Raises UserError naming the file, and
    the row where there is one, when something is wrong with it.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return _load_nats(path)
    if path.endswith((".csv", ".csv.xz")):
        return _from_rows(path, *_read_csv(path))
    if path.endswith(".npz"):
        return _from_rows(path, *_read_npz(path))
    if path.endswith(".pth"):
        return _load_pth(path)
    raise UserError(f"{path} is no .csv, .csv.xz, .npz, .pth or NATS-Bench directory")


# Compact tables -------------------------------------------------------------------------------------------------------


def _read_csv(path):
    """Header and an iterator of (where, cells)."""
    data = read_bytes(path)
    if path.endswith(".xz"):
        data = _decompress(lzma.open, lzma.LZMAError, data, path)
    # Read as a stream: a StringIO would hold four bytes a character.
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline=""))

    def rows():
        try:
            for cells in reader:
                if cells:
                    yield f"{path}, line {reader.line_num}", cells
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from error

    lines = rows()
    return next(lines, (path, []))[1], lines


def _read_npz(path):
    """Header and an iterator of (where, cells)."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise UserError(f"{path} is far larger than a table of {NUM_ARCHS} rows")
        with np.load(path, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in arrays.files if name in ("index", "arch", *COLUMNS)}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged archives raise nearly anything
        raise UserError(f"{path} is not a valid NPZ file: {_one_line(error)}") from error
    for name, column in columns.items():
        if column.shape != (NUM_ARCHS,):
            raise UserError(f"{path}: array {name} has shape {column.shape}, not ({NUM_ARCHS},)")
        if name == "index" and column.dtype.kind not in "iu":
            raise UserError(f"{path}: array index holds {column.dtype}, not integers")
        if column.dtype.kind == "S":
            columns[name] = np.char.decode(column, "latin-1")
    cells = zip(*(column.tolist() for column in columns.values()), strict=True)
    return list(columns), ((f"{path}, row {row}", values) for row, values in enumerate(cells))


def _from_rows(path, header, rows):
    """Benchmark of a compact table, every cell that is used checked. Rows may come in any order."""
    for name in ("index", "arch"):
        if name not in header:
            raise UserError(f"{path} has no column {name}; a table has index, arch and some of {', '.join(COLUMNS)}")
    if len(set(header)) < len(header):
        raise UserError(f"{path} has two columns of one name")
    absent = [name for name in COLUMNS if name not in header]
    if len(absent) == len(COLUMNS):
        raise UserError(f"{path} has no column of accuracies after 200 epochs, such as {COLUMNS[1]}")
    index_at, arch_at = header.index("index"), header.index("arch")
    used = [(k, header.index(name)) for k, name in enumerate(COLUMNS) if name in header]

    table = np.full((NUM_ARCHS, len(COLUMNS)), np.nan)
    archs, seen = [None] * NUM_ARCHS, {}
    for where, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
        try:
            index = int(cells[index_at])
        except (TypeError, ValueError, OverflowError):
            index = -1
        if not 0 <= index < NUM_ARCHS:
            raise UserError(f"{where}: index {_short(cells[index_at])} is not a number in 0..{NUM_ARCHS - 1}")
        if archs[index] is not None:
            raise UserError(f"{where}: second row of index {index}")
        archs[index] = arch = _check_arch(cells[arch_at], seen, index, where)
        seen[arch] = index
        for k, at in used:
            table[index, k] = _percent(cells[at], COLUMNS[k], where)
    if None in archs:
        raise UserError(f"{path} has {len(seen)} rows instead of {NUM_ARCHS}: index {archs.index(None)} is missing")
    return Benchmark(path, archs, table.__getitem__, table, absent)


def _check_arch(arch, seen, index, where):
    """`arch`, once it is known to be a valid string that is not yet in `seen`: {arch: index}."""
    try:
        from_arch_string(str(arch))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if arch in seen:
        raise UserError(f"{where}: indices {seen[arch]} and {index} have the same architecture {arch}")
    return arch


def _percent(value, name, where):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 100:  # NaN fails too
        raise UserError(f"{where}: {name} is {_short(value)}, not a number from 0 to 100")
    return number


def save(benchmark, path):
    """Write all of a source as a compact table: .csv, .csv.xz or .npz, without the columns it has not.

    Raises UserError when the source is incomplete or `path` cannot be written.
    """
    path = os.fspath(path)
    if not path.endswith((".csv", ".csv.xz", ".npz")):
        raise UserError(f"{path}: a table is written as .csv, .csv.xz or .npz")
    with atomic_write(path) as file:  # opened first: reading a source can take an hour
        table = benchmark.full_table()
        kept = [k for k, name in enumerate(COLUMNS) if name not in benchmark.absent]
        holes = np.argwhere(np.isnan(table[:, kept]))
        if len(holes):
            index, k = holes[0]
            raise UserError(f"{benchmark.path}, index {index}: no figure for {COLUMNS[kept[k]]}")
        archs = [benchmark.arch(index) for index in range(len(benchmark))]
        if path.endswith(".npz"):
            columns = {COLUMNS[k]: table[:, k] for k in kept}
            np.savez_compressed(file, index=np.arange(len(archs)), arch=np.array(archs, dtype="S"), **columns)
        else:
            text = io.StringIO(newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["index", "arch", *(COLUMNS[k] for k in kept)])
            writer.writerows([i, archs[i], *map(float, table[i, kept])] for i in range(len(archs)))
            data = text.getvalue().encode()
            file.write(lzma.compress(data) if path.endswith(".xz") else data)


# The benchmark's own files --------------------------------------------------------------------------------------------


class _Dtype:
    """Stands in for numpy.dtype in the benchmark's pickles: of a number's type, only code and byte order are taken.

    The real one accepts states that crash numpy or ask for gigabytes.
    """

    def __init__(self, code, align=False, copy=False):
        if code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
            raise ValueError(f"{_short(code)} is no number's type")
        self.code = code

    def __setstate__(self, state):
        if state[1] not in ("<", ">", "=", "|"):
            raise ValueError(f"{_short(state[1])} is no byte order")
        self.code = state[1] + self.code


def _scalar(dtype, data):
    """Stands in for numpy.core.multiarray.scalar: a Python number."""
    return np.frombuffer(data, dtype.code)[0].item()


# All that a file of the benchmark refers to; also what torch is told to accept.
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


def _load_nats(folder):
    """A NATS-Bench directory: `meta.pickle.pbz2`, and a record an architecture that is read when it is asked for."""
    meta_path = os.path.join(folder, "meta.pickle.pbz2")
    archs = _meta_archs(_read_pbz2(meta_path), meta_path)
    names = [f"{index:06d}.pickle.pbz2" for index in range(len(archs))]
    present = set(os.listdir(folder))
    missing = [index for index, name in enumerate(names) if name not in present]

    @functools.cache
    def row(index):
        path = os.path.join(folder, names[index])
        if names[index] not in present:
            return (math.nan,) * len(COLUMNS)
        record = _read_pbz2(path)
        return _figures(record.get("200") if isinstance(record, dict) else None, archs[index], path)

    return Benchmark(folder, archs, row, missing=missing)


def _read_pbz2(path):
    return restricted_unpickle(_decompress(bz2.open, OSError, read_bytes(path), path), ALLOWED, path)


def _load_pth(path):
    """The official file. It is reduced to a table at once, which gives its memory back."""
    import torch

    try:
        with torch.serialization.safe_globals([(value, ".".join(name)) for name, value in ALLOWED.items()]):
            # Only the zip format can be mapped; the official file of 2020 is older than that.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises nearly anything on damaged data
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            what = f"{path} refers to {forbidden[1]}, which a file of its kind never holds: refused"
            raise UserError(what) from error
        raise UserError(f"{path} is not a valid .pth file: {_one_line(error)}") from error
    archs = _meta_archs(content, path)
    records = content.get("arch2infos")
    if not isinstance(records, dict):
        raise UserError(f"{path} has no arch2infos: it is not NAS-Bench-201")
    table = np.full((len(archs), len(COLUMNS)), np.nan)
    missing = []
    for index, arch in enumerate(archs):
        if index in records:
            record = records[index]
            state = record.get("full") if isinstance(record, dict) else None
            table[index] = _figures(state, arch, f"{path}, index {index}")
        else:
            missing.append(index)
    return Benchmark(path, archs, table.__getitem__, table, missing=missing)


def _meta_archs(content, path):
    """The list of arch strings in the benchmark's order, checked: all of them, each once."""
    archs = content.get("meta_archs") if isinstance(content, dict) else None
    if not isinstance(archs, list):
        raise UserError(f"{path} has no list meta_archs: it is not NAS-Bench-201")
    seen = {}
    for index, arch in enumerate(archs):
        seen[_check_arch(arch, seen, index, f"{path}, index {index}")] = index
    if len(archs) != NUM_ARCHS:
        raise UserError(f"{path} lists {len(archs)} architectures instead of {NUM_ARCHS}")
    return archs


def _figures(state, arch, where):
    """Six figures in the order of COLUMNS from a record of the 200-epoch runs, each the mean over its seeds, or NaN."""
    try:
        if state["arch_str"] != arch:
            raise UserError(f"{where} describes {_short(state['arch_str'])}, not {arch}")
        figures = []
        for dataset, metric in METRICS.values():
            key = f"{metric}@{LAST_EPOCH}"
            trials = [run["eval_acc1es"] for (name, _seed), run in state["all_results"].items() if name == dataset]
            values = [_percent(trial[key], f"{dataset} {key}", where) for trial in trials if key in trial]
            figures.append(sum(values) / len(values) if values else math.nan)
    except UserError:
        raise
    except Exception as error:  # an object of any other shape
        raise UserError(f"{where} is not a record of 200 epochs: {type(error).__name__}: {_one_line(error)}") from error
    return tuple(figures)


# Helpers and the command line -----------------------------------------------------------------------------------------


def _decompress(opener, error_type, data, path):
    try:
        with opener(io.BytesIO(data)) as file:
            data = file.read(MAX_BYTES + 1)
    except (error_type, EOFError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} unpacks to more than {MAX_BYTES >> 20} MB, far more than a file of its kind")
    return data


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _one_line(error):
    return " ".join(str(error).split())[:120]


def query(path, arch):
    """Print an architecture's accuracies, and its rank among all 15,625 where the source is one table."""
    benchmark = load(path)
    index = int(arch) if re.fullmatch(r"-?\d{1,9}", arch) else benchmark.index(arch)
    print(f"index {index}  {benchmark.arch(index)}")
    print(f"{'data set':15} {'split':6} {'accuracy':>8} {'rank':>6}")
    for k, (dataset, split) in enumerate(METRICS):
        accuracy, rank = benchmark.accuracy(index, dataset, split), "-"
        if accuracy is not None and benchmark.table is not None and not benchmark.missing:
            rank = 1 + int((benchmark.table[:, k] > accuracy).sum())
        print(f"{dataset:15} {split:6} {'absent' if accuracy is None else f'{accuracy:.2f}':>8} {rank:>6}")
    return benchmark


def best(path):
    """Print the best architecture of each data set and split."""
    benchmark = load(path)
    table = benchmark.full_table()
    for k, (dataset, split) in enumerate(METRICS):
        if np.isnan(table[:, k]).all():
            print(f"{dataset:15} {split:6}   absent")
        else:
            index = int(np.nanargmax(table[:, k]))
            print(f"{dataset:15} {split:6} {table[index, k]:8.2f}  index {index:5}  {benchmark.arch(index)}")
    return benchmark


def export(source, destination):
    """Write all of `source` as the compact table `destination`."""
    benchmark = load(source)
    save(benchmark, destination)
    print(f"{destination}: {len(benchmark)} architectures")
    return benchmark


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m nas201.benchmark", description="NAS-Bench-201 accuracies after 200 epochs", allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for function, arguments in ((export, ("source", "destination")), (query, ("path", "arch")), (best, ("path",))):
        command = commands.add_parser(function.__name__, help=function.__doc__, allow_abbrev=False)
        command.set_defaults(function=function)
        for argument in arguments:
            command.add_argument(argument)
    args = vars(parser.parse_args(argv))
    try:
        benchmark = args.pop("function")(**args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if benchmark.absent:
        print(f"note: {benchmark.path} has no {', '.join(benchmark.absent)}", file=sys.stderr)
    if benchmark.missing:
        print(f"note: {benchmark.path} has no record of {len(benchmark.missing)} architectures", file=sys.stderr)


if __name__ == "__main__":
    main()
