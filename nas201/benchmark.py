"""NAS-Bench-201 (Dong & Yang, ICLR 2020): look up the true accuracies of its 15,625 architectures.

SRC is a compact table (.csv or .csv.xz), a NATS-Bench directory (NATS-tss-v1_0-3ffb9-simple), or
the official NAS-Bench-201-v1_1-096897.pth.

Accuracies are top-1 in percent after 200 epochs of training, averaged over the seeds that an
architecture was trained with. Accuracies after other numbers of epochs are never used instead.
"""

# Reading a source executes nothing that the source contains. Only the .pth format needs torch.

from support.cli import Parser, command

import functools
import lzma
import math
import os
import re
import sys
from collections.abc import Callable, Sequence

import numpy as np

from nas201.genotypes import EDGES, NUM_ARCHS, PRIMITIVES, from_arch_string, to_arch_string
from nas201.published import PUBLISHED
from nas201.sources import (
    ALLOWED,
    COLUMNS,
    DATASETS,
    METRICS,
    RawTable,
    as_percent,
    figures_of,
    official_table,
    read_csv,
    read_pth,
    unpacked,
)
from support.files import UserError, atomic_write, emit, restricted_unpickle

# Six 3x3 convolutions: the architecture with the most parameters.
MOST_PARAMETERS = to_arch_string([PRIMITIVES.index("nor_conv_3x3")] * len(EDGES))


class Benchmark:
    """The true accuracies of all architectures, as `load` returns them.

    archs: the arch strings in the benchmark's order.
    table: accuracies (15625, 6), float64 in percent, with columns in the order of COLUMNS, and NaN
        for an unknown accuracy. The table is None if the source's records are read one by one.
    read: a function that reads the record of an index and returns the accuracies (6,). `read` is
        used if there is no table.
    absent: the columns that the source does not have.
    missing: the indices without a record.
    """

    def __init__(
        self,
        path: str,
        archs: list[str],
        table: np.ndarray | None = None,
        read: Callable[[int], np.ndarray] | None = None,
        absent: Sequence[str] = (),
        missing: Sequence[int] = (),
    ):
        self.path = path
        self.archs = archs
        self.table = table
        self.absent = tuple(absent)
        self.missing = tuple(missing)
        self._read = read
        self._index = {arch: index for index, arch in enumerate(archs)}

    def __len__(self) -> int:
        return len(self.archs)

    def arch(self, index: int) -> str:
        """Return the arch string of an index. Raises UserError for an index that does not exist."""
        if not 0 <= index < len(self):
            raise UserError(f"index {index} is not in 0..{len(self) - 1}")
        return self.archs[index]

    def index(self, arch_string: str) -> int:
        """Return the index of an arch string.

        Raises UserError if the arch string is not valid, and says what is wrong with it.
        """
        from_arch_string(arch_string)
        return self._index[arch_string]

    def accuracies(self, index: int) -> np.ndarray:
        """Return the accuracies (6,) in the order of COLUMNS, with NaN for an unknown accuracy.

        Raises UserError for an index that does not exist and for a damaged record.
        """
        self.arch(index)
        return self._read(index) if self.table is None else self.table[index]

    def accuracy(self, index: int, dataset: str, split: str) -> float | None:
        """Return an accuracy in percent, or None if the source does not have this accuracy.

        Raises UserError for a data set not in DATASETS, a split not in SPLITS, an index that does
        not exist and a damaged record.
        """
        if (dataset, split) not in METRICS:
            known = ", ".join(DATASETS)
            raise UserError(f"no accuracies of {dataset} {split}; choose one of {known}, and valid or test")
        value = float(self.accuracies(index)[list(METRICS).index((dataset, split))])
        return None if math.isnan(value) else value

    def full_table(self) -> np.ndarray:
        """Return the accuracies (15625, 6) of all architectures, after reading all records if needed.

        Raises UserError if a record is missing or damaged.
        """
        if self.missing:
            raise UserError(
                f"{self.path}: incomplete, {len(self.missing)} of {len(self)} architectures have no record; "
                f"the first missing index is {self.missing[0]}"
            )
        if self.table is None:
            from tqdm import tqdm  # 15,625 files take minutes

            indices = tqdm(range(len(self)), unit="arch", disable=None)
            self.table = np.array([self.accuracies(index) for index in indices])
        return self.table


# ---- reading and writing


def load(path: str | os.PathLike) -> Benchmark:
    """Open a source: a compact table, a NATS-Bench directory or the official .pth.

    Loading the .pth is reported to need 28 GB of memory, so export it once to a compact table.
    Raises UserError, which names the file and, if possible, the line or index at fault.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return load_directory(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: No such file or directory")
    if path.endswith((".csv", ".csv.xz")):
        return checked(path, read_csv(path))
    if path.endswith(".pth"):
        return checked(path, read_pth(path))
    raise UserError(f"{path}: not a benchmark; give a .csv, a .csv.xz, a .pth or a NATS-Bench directory")


def checked(path: str, raw: RawTable) -> Benchmark:
    """Check a table that a reader returned, and return it as a Benchmark. Raises UserError.

    Every source goes through this check. A table must have all architectures, one index for each
    architecture, and accuracies from 0 to 100.
    """
    check_header(path, raw.header)
    archs = [None] * NUM_ARCHS
    index_of_arch = {}
    table = np.full((NUM_ARCHS, len(COLUMNS)), np.nan)
    for where, cells in raw.records:
        index = checked_index(cells["index"], where)
        arch = cells["arch"]
        if archs[index] is not None:
            raise UserError(f"{where}: second line of index {index}")
        try:
            from_arch_string(str(arch))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if arch in index_of_arch:
            raise UserError(f"{where}: indices {index_of_arch[arch]} and {index} have the same architecture {arch}")
        archs[index] = arch
        index_of_arch[arch] = index
        for k, name in enumerate(COLUMNS):
            if name in cells:
                table[index, k] = as_percent(cells[name], name, where)
    if None in archs:
        first = archs.index(None)
        raise UserError(
            f"{path}: {len(index_of_arch)} architectures instead of {NUM_ARCHS}; the first missing index is {first}"
        )
    absent = [name for name in COLUMNS if name not in raw.header]
    without_figures = np.isnan(table).all(axis=1)
    return Benchmark(path, archs, table, absent=absent, missing=np.flatnonzero(without_figures).tolist())


def check_header(path: str, header: list[str]) -> None:
    """Raise UserError if a table repeats a column, or lacks index, arch or all accuracies."""
    for name in ("index", "arch"):
        if name not in header:
            raise UserError(f"{path}: no column {name}; a table has index, arch and some of {', '.join(COLUMNS)}")
    if len(set(header)) < len(header):
        raise UserError(f"{path}: two columns have the same name")
    if not set(COLUMNS) & set(header):
        raise UserError(f"{path}: no column of accuracies after 200 epochs, such as {COLUMNS[1]}")


def checked_index(value: object, where: str) -> int:
    """Return the index that a table's cell holds. Raises UserError."""
    index = int(value) if re.fullmatch(r"\d{1,9}", str(value)) else -1
    if not 0 <= index < NUM_ARCHS:
        raise UserError(f"{where}: index {value!r:.80} is not a number in 0..{NUM_ARCHS - 1}")
    return index


def load_directory(folder: str) -> Benchmark:
    """Open a NATS-Bench directory, whose one file per architecture is only read when needed."""

    def unpickle(name: str) -> object:
        path = os.path.join(folder, name)
        return restricted_unpickle(unpacked(path), ALLOWED, path)

    meta = "meta.pickle.pbz2"
    archs = checked(folder, official_table(os.path.join(folder, meta), unpickle(meta), records={})).archs
    names = [f"{index:06d}.pickle.pbz2" for index in range(NUM_ARCHS)]
    present = set(os.listdir(folder))
    missing = [index for index, name in enumerate(names) if name not in present]

    @functools.cache
    def read(index: int) -> np.ndarray:
        figures = {}
        if names[index] in present:
            path = os.path.join(folder, names[index])
            figures = figures_of(unpickle(names[index]), "200", archs[index], path)
        return np.array([figures.get(name, math.nan) for name in COLUMNS])

    return Benchmark(folder, archs, read=read, missing=missing)


def save(source: Benchmark, path: str | os.PathLike) -> None:
    """Write a source as a compact table, .csv or .csv.xz.

    Columns that the source does not have are left out. Raises UserError for another suffix, for a
    missing record or figure, and if `path` cannot be written.
    """
    path = os.fspath(path)
    if not path.endswith((".csv", ".csv.xz")):
        raise UserError(f"{path}: a table is written as .csv or .csv.xz")
    with atomic_write(path) as file:  # fails at once if `path` is not writable; reading a source can take an hour
        columns = {"index": range(len(source)), "arch": source.archs}
        for name, values in zip(COLUMNS, source.full_table().T, strict=True):
            if name not in source.absent:
                if np.isnan(values).any():
                    raise UserError(f"{source.path}, index {np.isnan(values).argmax()}: no figure for {name}")
                columns[name] = values.tolist()
        lines = [columns.keys(), *zip(*columns.values(), strict=True)]
        data = "".join(",".join(map(str, cells)) + "\n" for cells in lines).encode()
        file.write(lzma.compress(data) if path.endswith(".xz") else data)


# ---- comparison with random architectures


def best_of(values: np.ndarray, n: int) -> float:
    """Return the exact expectation of the largest of `n` draws from `values` (N,), all different.

    Let p(i) be the probability that all n draws are among the i smallest values. p(i) is the
    product i/N * (i-1)/(N-1) * ... of n factors. The largest draw is the i-th smallest value with
    probability p(i) - p(i-1).
    """
    places = np.arange(1, len(values) + 1)[:, None]  # i, (N, 1)
    drawn = np.arange(n)  # number of values drawn before, (n,)
    factors = np.clip((places - drawn) / (len(values) - drawn), 0, None)  # (N, n); 0 where n exceeds i
    at_most = np.prod(factors, axis=1)  # p, (N,)
    return float(np.sort(values) @ np.diff(at_most, prepend=0))


def baselines(source: Benchmark, index: int | None = None) -> dict[str, dict[str, float]]:
    """Return {column without "_200": figures to compare a result with} for each complete column.

    The figures are accuracies in percent after 200 epochs, and numbers of architectures:
    mean, median, std, best: over the whole space. A random architecture has `mean` on average.
    best_of_10, best_of_50: the expected best of 10 or 50 random architectures, see `best_of`.
    most_parameters: the accuracy of the architecture MOST_PARAMETERS.
    most_parameters_beaten_by: the number of architectures better than MOST_PARAMETERS.
    accuracy: the accuracy of the architecture `index`, if given.
    beaten_by: the number of architectures better than the architecture `index`, if given.
    Raises UserError if a record is missing or damaged.
    """
    figures = {}
    most = source.index(MOST_PARAMETERS)
    for name, values in zip(COLUMNS, source.full_table().T, strict=True):
        if np.isnan(values).any():
            continue
        row = {"mean": values.mean(), "median": np.median(values), "std": values.std(ddof=1), "best": values.max()}
        for n in (10, 50):
            row[f"best_of_{n}"] = best_of(values, n)
        row["most_parameters"] = values[most]
        row["most_parameters_beaten_by"] = (values > values[most]).sum()
        if index is not None:
            row["accuracy"] = values[index]
            row["beaten_by"] = (values > values[index]).sum()
        figures[name.removesuffix("_200")] = {key: np.asarray(value).item() for key, value in row.items()}
    return figures


# ---- command line


def index_of(source: Benchmark, text: str) -> int:
    """Return the index for an arch string or a number on the command line. Raises UserError."""
    index = int(text) if re.fullmatch(r"-?\d{1,9}", text) else source.index(text)
    source.arch(index)
    return index


def print_architecture(source: Benchmark, text: str) -> None:
    """Print an architecture's accuracies and, if the source is a complete table, its ranks."""
    index = index_of(source, text)
    print(f"index {index}  {source.arch(index)}")
    print(f"{'data set':15} {'split':6} {'accuracy':>8} {'rank':>6}")
    for k, (dataset, split) in enumerate(METRICS):
        accuracy = source.accuracy(index, dataset, split)
        rank = "-"
        if accuracy is not None and source.table is not None and not source.missing:
            rank = 1 + int((source.table[:, k] > accuracy).sum())
        print(f"{dataset:15} {split:6} {'absent' if accuracy is None else f'{accuracy:.2f}':>8} {rank:>6}")


def print_best(source: Benchmark) -> None:
    """Print the best architecture of each data set and split."""
    for (dataset, split), values in zip(METRICS, source.full_table().T, strict=True):
        if np.isnan(values).all():
            print(f"{dataset:15} {split:6}   absent")
        else:
            index = int(np.nanargmax(values))
            print(f"{dataset:15} {split:6} {values[index]:8.2f}  index {index:5}  {source.arch(index)}")


def print_baselines(source: Benchmark, text: str | None = None) -> None:
    """Print the table of `baselines`, with EvNAS's published accuracies.

    `text` names an architecture that the table also shows.
    """
    index = None if text is None else index_of(source, text)
    heads = {
        "mean": "mean",
        "median": "median",
        "std": "std",
        "best_of_10": "of 10",
        "best_of_50": "of 50",
        "most_parameters": "largest",
        "best": "best",
        "published": "EvNAS",
    }
    if index is not None:
        heads |= {"accuracy": "ARCH", "beaten_by": "beaten by"}
    published = {}
    for column, (dataset, split) in zip(COLUMNS, METRICS, strict=True):
        published[column.removesuffix("_200")] = PUBLISHED[dataset][split].evnas
    print(f"{'accuracy, %':22}" + "".join(f" {head:>9}" for head in heads.values()))
    for name, figures in baselines(source, index).items():
        line = f"{name:22}"
        for key in heads:
            value = published[name] if key == "published" else figures[key]
            line += f" {value:9.{0 if key == 'beaten_by' else 2}f}"
        print(line)
    print("mean, median, std: over all architectures; mean is the average of a random architecture")
    print("of 10, of 50: the expected best of 10 or 50 random architectures")
    print("largest: the architecture with the most parameters, six 3x3 convolutions")
    print(f"best: the best of all {len(source):,} architectures")
    print("EvNAS: the published search")
    if index is not None:
        print("ARCH, beaten by: the architecture you named, and the number of better architectures")


def make_parser(argv: Sequence[str]) -> Parser:
    """Return the parser with its commands. `argv` is the command line that it will parse."""
    parser = Parser(prog="python -m nas201.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    def add(name: str, text: str) -> Parser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        text = "compact table (.csv or .csv.xz), NATS-Bench directory or official .pth"
        added.add_argument("source", metavar="SRC", help=text)
        return added

    arch = "an arch string in quotes, or an index from 0 to 15624"
    export = add("export", "write a source as a compact table, which loads in a second")
    export.add_argument("destination", metavar="DST", help="table to write, .csv or .csv.xz")
    query = add("query", "show an architecture's accuracies and ranks")
    query.add_argument("arch", metavar="ARCH", help=f"architecture to look up: {arch}")
    add("best", "show the best architecture of each data set")
    compare = add("baselines", "show the accuracies of random architectures and of the largest architecture")
    compare.add_argument("arch", metavar="ARCH", nargs="?", help=f"another architecture to show: {arch}")
    simulation = add("simulate", "simulate searches: how good are winners if fitness ranks architectures this well")
    if "simulate" in argv:
        from nas201 import simulate  # needs torch, which the other commands do without

        simulate.add_flags(simulation)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser(argv).parse_args(argv)
    source = load(args.source)
    if args.command == "export":
        save(source, args.destination)
        emit(f"{args.destination}: {len(source)} architectures", sys.stdout)
    elif args.command == "query":
        print_architecture(source, args.arch)
    elif args.command == "best":
        print_best(source)
    elif args.command == "simulate":
        from nas201 import simulate

        simulate.run(source, baselines(source), args)
    else:
        print_baselines(source, args.arch)
    if source.absent:
        emit(f"note: {source.path} does not have {', '.join(source.absent)}", sys.stderr)
    if source.missing:
        emit(f"note: {source.path} has no record of {len(source.missing)} architectures", sys.stderr)


if __name__ == "__main__":
    main()
