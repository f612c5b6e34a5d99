"""Compare runs: a table of searches and retrainings, with means over them, and a page of charts.

  python summary.py runs/search-*                    prints a table
  python summary.py runs/search-* --output runs      also writes runs/summary.csv and runs/compare.html

A run can be unfinished: then the table has its figures so far. `python -m nas201.summary` compares
three NAS-Bench-201 searches with the published ones.
"""

from support.cli import Parser, command

import csv
import io
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import genotype_files
from reporting.cells import load_cell
from reporting.charts import Line, chart, column, finite_values, section, table
from reporting.report import page_of
from reporting.reported_run import ReportedRun, read_run
from support.files import UserError, atomic_write, emit, make_folder, read_json
from views import VIEWS

# The columns of summary.csv. Accuracies and fitness are in percent.
TEXTS = ("run", "kind", "space", "dataset", "seed", "variant", "steps")
FIGURES = {  # column: head of the printed table
    "fitness": "fitness",
    "final_fitness": "final",
    "random_mean": "random",
    "random_best": "of random",
    "true_accuracy": "true",
    "tau_random": "tau",
    "parameters_M": "params, M",
    "mult_adds_M": "madds, M",
    "test_top1": "test",
    "seconds": "seconds",
}
MEAN = "mean ± std"  # the name of the last line
MEANING = {
    "fitness": "of the winner in the last generation, %",
    "final": "fitness of the winner again, on the final weights, as that of the random architectures",
    "random, of random": "mean and best fitness of the random architectures",
    "true": "the winner's true accuracy in the benchmark, %",
    "tau": "Kendall's tau of fitness and true accuracy over the random architectures; 0 is chance",
    "test": "test accuracy after retraining, %; of a search, that of the newest retraining of its winner",
    MEAN: "over these runs; std is the standard deviation of a sample (n - 1)",
}
CHARTS = {  # {step: {field of the history: title}}
    "generation": {
        "fitness_best": "Best fitness, %",
        "fitness_mean": "Mean fitness, %",
        "kendall_tau": "Kendall's tau",
    },
    "epoch": {"test_top1": "Test accuracy, %", "train_loss": "Training loss"},
}
COLOURS = ("blue", "orange", "green", "red", "purple", "sky", "yellow", "pink", "grey")


def row_of(run_dir: str | os.PathLike) -> dict:
    """Return the row of a run: the columns TEXTS and FIGURES, and "cell". None where unknown.

    Raises UserError for what is not a run directory.
    """
    run = read_run(run_dir, VIEWS)
    last = run.rows[-1] if run.rows else {}
    result = result_of(run)
    winner = result.get("winner", {})
    row = dict.fromkeys([*TEXTS, *FIGURES, "cell"])
    row["run"] = os.fspath(run_dir)
    row["kind"] = "search" if run.is_search else "retraining"
    row["space"] = run.view.name if run.is_search else None
    for name in ("dataset", "seed", "variant"):
        row[name] = run.arguments.get(name)
    row["steps"] = f"{len(run.rows)} of {run.arguments.get('epochs', '?')} {run.step}s"
    row["fitness"] = number(last, "fitness_best")
    row["final_fitness"] = number(winner, "fitness")
    for name in ("random_mean", "random_best"):
        row[name] = number(result, name)
    row["tau_random"] = number(result, "kendall_tau/random architectures/fitness")
    if isinstance(result.get("truth"), str):
        row["true_accuracy"] = number(last, f"true_accuracy/{result['truth'].replace(' ', '/')}")
    for name in ("parameters_M", "mult_adds_M"):
        row[name] = number(winner, name)
    tested = last if not run.is_search else last_row_of_the_winner(run)
    row["test_top1"] = number(tested, "test_top1")
    row["seconds"] = sum(finite_values([*run.rows, result], "seconds"))
    row["cell"] = cell_text(run)
    return row


def number(values: dict, key: str) -> float | None:
    """Return the finite number under a key such as "true_accuracy/cifar10/test", None without one."""
    return column([values], key)[0]


def result_of(run: ReportedRun) -> dict:
    """Return the content of a search's baselines.json, {} if it cannot be read."""
    try:
        result = read_json(run.file("baselines.json"))
    except UserError:
        return {}
    return result if isinstance(result, dict) and isinstance(result.get("winner"), dict) else {}


def last_row_of_the_winner(run: ReportedRun) -> dict:
    """Return the last row of the newest retraining of a search's winner in its directory, {} without one.

    Other cells of the search can be retrained there too, with `train.py --pick`.
    """
    winner = cell_text(run)
    for folder in sorted(Path(run.path).glob("eval-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            retraining = read_run(folder, VIEWS)
        except UserError:
            continue
        if retraining.rows and cell_text(retraining) == winner:
            return retraining.rows[-1]
    return {}


def cell_text(run: ReportedRun) -> str | None:
    """Return a run's cell as text, None if it cannot be read: the arch string, or the genotype as JSON."""
    try:
        cell = load_cell(run.file("genotype.json"), run.views)
    except UserError:
        return None
    return cell if isinstance(cell, str) else json.dumps(genotype_files.to_dict(cell))


def mean_std_text(values: Iterable[float | None], digits: int) -> str:
    """Return mean ± std (n - 1) of the values that are known as text, and a dash without values."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{deviation}"


# ---- output


def are_alike(rows: Sequence[dict]) -> bool:
    """Return whether runs may be averaged: all are searches of one space or retrainings, on the same data set."""
    return len({(row["kind"], row["space"], row["dataset"]) for row in rows}) == 1


def lines_of_table(rows: Sequence[dict]) -> list[list[str]]:
    """Return the printed table as cells: a head, a line for each run, and the means over runs of the same kind.

    Columns in which no run has a figure are left out.
    """
    known = [name for name in FIGURES if any(row[name] is not None for row in rows)]
    lines = [["run", "data", "seed", *(FIGURES[name] for name in known)]]
    digits = {name: 0 if name == "seconds" else 2 for name in known}
    for row in rows:
        figures = [mean_std_text([row[name]], digits[name]) for name in known]
        lines.append([Path(row["run"]).name, str(row["dataset"]), str(row["seed"]), *figures])
    if len(rows) > 1 and are_alike(rows):
        figures = [mean_std_text([row[name] for row in rows], digits[name]) for name in known]
        lines.append([MEAN, "", "", *figures])
    return lines


def print_table(rows: Sequence[dict]) -> None:
    """Print the rows as a table with explanations."""
    lines = lines_of_table(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        texts = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        texts[0] = line[0].ljust(widths[0])
        emit("  ".join(texts), sys.stdout)
    if len(rows) > 1 and not are_alike(rows):
        print("no means, because not all of these runs have the same kind, search space and data set")
    for head, text in MEANING.items():
        if set(head.split(", ")) & {*lines[0], lines[-1][0]}:
            emit(f"{head}: {text}", sys.stdout)


def save_csv(rows: Sequence[dict], path: str | os.PathLike) -> None:
    """Write the rows as a CSV file with a head. Raises UserError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))


def comparison_page(rows: Sequence[dict]) -> str:
    """Return the HTML page: the table, and charts with a line for each run."""
    head, *lines = [[escape(cell) for cell in line] for line in lines_of_table(rows)]
    runs = [read_run(row["run"], VIEWS) for row in rows]
    parts = [section("Runs", card=table("Runs", head, lines))]
    for step, quantities in CHARTS.items():
        charts = [comparison_chart(runs, step, key, title) for key, title in quantities.items()]
        parts.append(section(f"By {step}", *charts))
    return page_of("Comparison of EvNAS runs", f"{len(rows)} runs", parts)


def comparison_chart(runs: Sequence[ReportedRun], step: str, key: str, title: str) -> str:
    """Return a chart with a line for each run that counts in this step; "" without values."""
    values = {}  # {step: {number of a run, as text: value}}
    lines = []
    for i, run in enumerate(runs):
        if run.step == step:
            lines.append(Line(Path(run.path).name, COLOURS[i % len(COLOURS)], str(i)))
            for row in run.rows:
                values.setdefault(row[step], {step: row[step]})[str(i)] = row.get(key)
    if not values:
        return ""
    return chart([values[number] for number in sorted(values)], title, f"by {step}", lines)


# ---- command line


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="summary.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of a search or a retraining")
    text = "folder for summary.csv and compare.html (default: they are not written)"
    parser.add_argument("--output", metavar="DIR", help=text)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Compare runs."""
    args = make_parser().parse_args(argv)
    rows = [row_of(run) for run in args.runs]
    print_table(rows)
    if args.output:
        folder = Path(args.output)
        make_folder(folder)
        save_csv(rows, folder / "summary.csv")
        with atomic_write(folder / "compare.html") as file:
            file.write(comparison_page(rows).encode())
        emit(f"{folder / 'summary.csv'}, {folder / 'compare.html'}", sys.stdout)


if __name__ == "__main__":
    main()
