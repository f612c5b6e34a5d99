"""NAS-Bench-201 (Dong & Yang, ICLR 2020): the true accuracy of each of the 15,625 architectures.

    python -m nas201.benchmark export SRC DST    write the compact table (.csv or .csv.xz)
    python -m nas201.benchmark query SRC ARCH    accuracies and ranks of an arch string or index
    python -m nas201.benchmark best SRC          the best architecture per data set
    python -m nas201.benchmark baselines SRC [ARCH]   what chance and counting parameters reach, and ARCH beside it

Sources: a compact table, a NATS-Bench directory (NATS-tss-v1_0-3ffb9-simple), and the official
NAS-Bench-201-v1_1-096897.pth. Figures are top-1 accuracies in percent after 200 epochs, averaged over the seeds an
architecture was trained with; other training lengths never stand in for them. Reading executes nothing that a file
contains. torch is imported for the .pth alone.
"""

from support.cli import command

import functools
import lzma
import math
import os
import re
import sys

import numpy as np

from nas201.genotypes import EDGES, NUM_ARCHS, PRIMITIVES, from_arch_string, to_arch_string
from nas201.published import PUBLISHED
from nas201.sources import (
    ALLOWED,
    COLUMNS,
    DATASETS,
    METRICS,
    figures_of,
    official_rows,
    percent,
    read_csv,
    read_pth,
    unpacked,
)
from support.files import UserError, atomic_write, emit, restricted_unpickle

MOST_PARAMETERS = to_arch_string([PRIMITIVES.index("nor_conv_3x3")] * len(EDGES))


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
        """Return six accuracies in the order of COLUMNS, NaN where there is none. Raises UserError as `accuracy`."""
        self.arch(index)
        return self._read(index) if self.table is None else self.table[index]

    def accuracy(self, index, dataset, split):
        """Return the accuracy in percent, or None where the source has no such figure (see `absent` and `missing`).

        Raises UserError for a dataset not in DATASETS, a split not in SPLITS, an impossible index, a damaged record.
        """
        if (dataset, split) not in METRICS:
            raise UserError(f"no figures for {dataset} {split}; there are {', '.join(DATASETS)}, each valid and test")
        value = float(self.row(index)[list(METRICS).index((dataset, split))])
        return None if math.isnan(value) else value

    def full_table(self):
        """Return all rows (15625, 6), read now if need be. Raises UserError when a record is missing."""
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
        return _from_rows(path, read_csv(path))
    if path.endswith(".pth"):
        return _from_rows(path, read_pth(path))
    raise UserError(f"{path} is no .csv, .csv.xz, .pth or NATS-Bench directory")


def _from_rows(path, lines):
    """Make the Benchmark of a reader's header and (where, {column: cell}) of each architecture.

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
                table[index, k] = percent(cells[name], name, where)
    if None in archs:
        raise UserError(f"{path} has {len(seen)} rows instead of {NUM_ARCHS}: index {archs.index(None)} is missing")
    return Benchmark(path, archs, table, absent=absent, missing=np.flatnonzero(np.isnan(table).all(1)).tolist())


def _load_nats(folder):
    """Open a NATS-Bench directory: `meta.pickle.pbz2`, and a record an architecture, read when it is asked for."""

    def unpickle(name):
        path = os.path.join(folder, name)
        return path, restricted_unpickle(unpacked(path), ALLOWED, path)

    archs = _from_rows(folder, official_rows(*unpickle("meta.pickle.pbz2"), records={})).archs
    names, present = [f"{index:06d}.pickle.pbz2" for index in range(NUM_ARCHS)], set(os.listdir(folder))
    missing = [index for index, name in enumerate(names) if name not in present]

    @functools.cache
    def read(index):
        figures = {}
        if names[index] in present:
            path, record = unpickle(names[index])
            figures = figures_of(record, "200", archs[index], path)
        return np.array([figures.get(name, math.nan) for name in COLUMNS])

    return Benchmark(folder, archs, read=read, missing=missing)


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


def index_of(source, arch):
    """Return the index of an arch string, or of an index as text. Raises UserError."""
    index = int(arch) if re.fullmatch(r"-?\d{1,9}", arch) else source.index(arch)
    source.arch(index)
    return index


def query(source, arch):
    """Print an architecture's accuracies, and its rank among all 15,625 where the source is one table."""
    index = index_of(source, arch)
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


def best_of(values, n):
    """Return the expected best of `n` distinct ones drawn at random from `values` (N,), exactly."""
    places, drawn = np.arange(1, len(values) + 1)[:, None], np.arange(n)
    none_better = np.prod(np.clip((places - drawn) / (len(values) - drawn), 0, None), axis=1)  # than the i-th worst
    return float(np.sort(values) @ np.diff(none_better, prepend=0))


def baselines(source, index=None):
    """Return {column: figures} for each of COLUMNS that is complete: accuracies in percent, after 200 epochs.

    mean, median, std, best: of the whole space, a random architecture. best_of_10, best_of_50: `best_of`.
    most_parameters: of MOST_PARAMETERS, six 3x3 convolutions. With an index also its `accuracy`, and `beaten_by`: how
    many architectures are better.
    """
    rows, most = {}, source.index(MOST_PARAMETERS)
    for name, values in zip(COLUMNS, source.full_table().T, strict=True):
        if not np.isnan(values).any():
            row = {"mean": values.mean(), "median": np.median(values), "std": values.std(ddof=1), "best": values.max()}
            row |= {f"best_of_{n}": best_of(values, n) for n in (10, 50)}
            row |= {"most_parameters": values[most], "most_parameters_beaten_by": (values > values[most]).sum()}
            if index is not None:
                row |= {"accuracy": values[index], "beaten_by": (values > values[index]).sum()}
            rows[name.removesuffix("_200")] = {key: np.asarray(value).item() for key, value in row.items()}
    return rows


def print_baselines(source, arch=None):
    """Print `baselines` as a table, beside what EvNAS published."""
    index = None if arch is None else index_of(source, arch)
    heads = {"mean": "mean", "median": "median", "std": "std", "best_of_10": "of 10", "best_of_50": "of 50"}
    heads |= {"most_parameters": "largest", "best": "best", "published": "EvNAS"}
    heads |= {} if index is None else {"accuracy": "ARCH", "beaten_by": "beaten by"}
    print(f"{'accuracy, %':22}" + "".join(f" {head:>9}" for head in heads.values()))
    published = [PUBLISHED[name][split].evnas for name, split in METRICS]
    published = dict(zip((column.removesuffix("_200") for column in COLUMNS), published, strict=True))
    for name, row in baselines(source, index).items():
        row |= {"published": published[name]}
        print(f"{name:22}" + "".join(f" {row[key]:9.{0 if key == 'beaten_by' else 2}f}" for key in heads))
    print(
        "mean, median, std: a random architecture; of 10, of 50: the expected best of so many distinct ones\n"
        f"largest: six 3x3 convolutions, with the most parameters; best: of all {len(source):,}; EvNAS: as published"
    )


@command
def main(argv=None):
    match sys.argv[1:] if argv is None else argv:
        case ["-h" | "--help", *_]:
            print(__doc__)
            return
        case ["export", path, destination]:
            save(source := load(path), destination)
            emit(f"{destination}: {len(source)} architectures", sys.stdout)
        case ["query", path, arch]:
            query(source := load(path), arch)
        case ["best", path]:
            best(source := load(path))
        case ["baselines", path, *arch] if len(arch) < 2:
            print_baselines(source := load(path), *arch)
        case _:
            raise UserError("give export SRC DST, query SRC ARCH, best SRC or baselines SRC [ARCH] (see --help)")
    if source.absent:
        emit(f"note: {source.path} has no {', '.join(source.absent)}", sys.stderr)
    if source.missing:
        emit(f"note: {source.path} has no record of {len(source.missing)} architectures", sys.stderr)


if __name__ == "__main__":
    main()
