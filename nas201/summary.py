"""Summarise three finished searches. This is the last step of searchNAS201.sh.

This script reads OUTPUT_DIR/search-DATASET-seed18, -seed19 and -seed20, prints a table, and writes
the same figures to OUTPUT_DIR/summary.json. OUTPUT_DIR/summary.csv has a row for each run, as
`summary.py` writes it.
"""

from support.cli import Parser, command

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from nas201.benchmark import baselines, load
from nas201.genotypes import NUM_ARCHS
from nas201.published import PUBLISHED, PUBLISHED_SECONDS
from nas201.sources import COLUMNS, DATASETS, METRICS
from reporting.charts import column, finite_values
from run_settings import SETTINGS
from summary import row_of, save_csv
from support.files import UserError, emit, read_history, read_json, write_json

SEEDS = (18, 19, 20)
ARGUMENTS = ("epochs", "pop_size", "init_channels", "num_cells", "api_path")  # arguments that the summary needs


# ---- reading the runs


def read_arguments(run_dir: Path) -> dict:
    """Return the saved arguments of a run. Raises UserError if the run is not a search."""
    about = read_json(run_dir / "args.json")
    args = about.get("args") if isinstance(about, dict) else None
    if not isinstance(args, dict) or not all(name in args for name in ARGUMENTS):
        raise UserError(f"{run_dir}/args.json: not the arguments of a search ({', '.join(ARGUMENTS)})")
    if not isinstance(args["api_path"], (str, type(None))):
        raise UserError(f"{run_dir}/args.json: api_path is not a path")
    return args


def read_finished_history(run_dir: Path) -> list[dict]:
    """Return the history of a run that has all its generations, baselines and report.

    Raises UserError if the run is not finished.
    """
    complete = all((run_dir / name).exists() for name in ("report.html", "baselines.json"))
    history = read_history(run_dir, SETTINGS) if complete else []
    generations = [row.get("generation") for row in history]
    if not history or generations != list(range(1, read_arguments(run_dir)["epochs"] + 1)):
        raise UserError(f"{run_dir} is not a finished search: start searchNAS201.sh again to continue it")
    return history


def read_run(run_dir: Path) -> dict:
    """Return the figures of a finished run, as summary.json has them.

    Raises UserError if the run is not finished.
    """
    history = read_finished_history(run_dir)
    figures = {"run": str(run_dir)}
    for key in ("best_genotype", "fitness_best", "true_accuracy", "truth", "kendall_tau", "spearman_rho"):
        figures[key] = history[-1].get(key)
    result = read_json(run_dir / "baselines.json")
    figures["worth"] = result if isinstance(result, dict) else {}
    figures["kendall_tau_by_generation"] = [row.get("kendall_tau") for row in history]
    figures["generations"] = len(history)
    figures["seconds"] = sum(finite_values(history, "seconds"))
    return figures


# ---- the summary


def mean_std(values: Iterable[float | None]) -> dict[str, float | None]:
    """Return the mean and the standard deviation (n - 1) of the values that are not None.

    The mean of no value is None, and so is the standard deviation of fewer than two values.
    """
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return {"mean": mean, "std": statistics.stdev(known) if len(known) > 1 else None}


def summarise(folder: str | Path, dataset: str) -> dict:
    """Return the content of summary.json.

    Accuracies are top-1 in percent after 200 epochs. Raises UserError.
    """
    run_dirs = [Path(folder) / f"search-{dataset}-seed{seed}" for seed in SEEDS]
    runs = [read_run(run_dir) for run_dir in run_dirs]
    args = read_arguments(run_dirs[0])
    table = load(args["api_path"]) if args["api_path"] else None
    space = {}
    # The records of a NATS-Bench directory are read one by one, which takes too long here.
    if table is not None and table.table is not None:
        space = baselines(table)
    summary = {"dataset": dataset, "seeds": SEEDS, "arguments": args}
    summary["accuracy"] = accuracy_figures(runs, dataset, space)
    for key in ("fitness_best", "kendall_tau", "spearman_rho", "seconds"):
        summary[key] = mean_std(column(runs, key))
    for quantity in ("fitness", "parameters"):
        taus = column(runs, f"worth/kendall_tau/random architectures/{quantity}")
        summary[f"kendall_tau_random_{quantity}"] = mean_std(taus)
    summary["published_seconds"] = PUBLISHED_SECONDS if dataset in DATASETS else None
    summary["runs"] = runs
    return summary


def accuracy_figures(runs: list[dict], dataset: str, space: dict[str, dict]) -> dict[str, dict]:
    """Return {column without "_200": figures} for these searches, published searches and the space.

    `dataset` is the data set of these searches. Published searches are only included for the same
    data set. `space` is the result of `baselines`, or {} without a benchmark table. If `space` is
    {}, the optimum is the published one.
    """
    accuracy = {}
    for (name, split), label in zip(METRICS, COLUMNS, strict=True):
        label = label.removesuffix("_200")
        published = PUBLISHED[name][split]
        figures = {"searched": mean_std(column(runs, f"true_accuracy/{name}/{split}")), "published": None}
        if name == dataset:
            figures["published"] = {"mean": published.evnas, "std": published.evnas_std}
        figures["optimum"] = published.best
        if label in space:
            figures |= {f"space_{key}": value for key, value in space[label].items()}
            figures["optimum"] = figures.pop("space_best")
            figures["beaten_by"] = column(runs, f"worth/accuracy/{label}/beaten_by")
        accuracy[label] = figures
    return accuracy


# ---- the printed table


def format_figures(figures: dict | float | None, digits: int = 2) -> str:
    """Return a mean ± standard deviation, or a single number, as text. None becomes a dash."""
    if isinstance(figures, dict):
        mean = figures["mean"]
        std = figures["std"]
    else:
        mean = figures
        std = None
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def print_summary(summary: dict) -> None:
    """Print the summary as text."""
    args = summary["arguments"]
    size = f"C {args['init_channels']}, N {args['num_cells']}, {args['pop_size']} individuals"
    print()
    seeds = ", ".join(map(str, SEEDS))
    emit(f"{summary['dataset']}: seeds {seeds}; {size}, {args['epochs']} generations", sys.stdout)
    for run in summary["runs"]:
        emit(f"  {run['best_genotype']}", sys.stdout)
    print_accuracies(summary)
    print_correlations(summary)
    for run in summary["runs"]:
        emit(f"{run['run']}: {run['worth'].get('sentence')}", sys.stdout)
    print("mean ± standard deviation over the seeds (n - 1)")
    print("published: EvNAS searches on the same data set")
    print("mean, median, std: over all architectures; mean is the average of a random architecture")
    print("of 10, of 50: the expected best of 10 or 50 random architectures")
    print("largest: the architecture with the most parameters, six 3x3 convolutions")
    if args["api_path"]:
        print("-: not in the benchmark's table, or not published for this data set")
    else:
        print("-: not known, because these searches had no benchmark (--api_path)")


def print_accuracies(summary: dict) -> None:
    """Print accuracies and seconds, with a column for each kind of search or architecture."""
    heads = {
        "searched": "these searches",
        "published": "published",
        "optimum": "optimum",
        "space_mean": "mean",
        "space_median": "median",
        "space_std": "std",
        "space_best_of_10": "of 10",
        "space_best_of_50": "of 50",
        "space_most_parameters": "largest",
    }
    line = "{:22} {:>16} {:>16}" + " {:>8}" * (len(heads) - 2)
    print(line.format("accuracy, %", *heads.values()))
    for name, figures in summary["accuracy"].items():
        print(line.format(name, *(format_figures(figures.get(key)) for key in heads)))
    for name, figures in summary["accuracy"].items():
        if "beaten_by" in figures:
            beaten = ", ".join(format_figures(count, 0) for count in figures["beaten_by"])
            print(f"{name}: {beaten} of {NUM_ARCHS:,} architectures beat these searches")
    seconds = [format_figures(summary["seconds"], 1), format_figures(summary["published_seconds"], 1)]
    print(line.format("seconds", *seconds, *[""] * (len(heads) - 2)))


def print_correlations(summary: dict) -> None:
    """Print the rank correlations of fitness and true accuracy, if the searches had a benchmark."""
    truth = summary["runs"][0]["truth"]
    if not truth:
        return
    tau = format_figures(summary["kendall_tau"], 3)
    rho = format_figures(summary["spearman_rho"], 3)
    text = f"last population, fitness against {truth} accuracy: Kendall's tau {tau}, Spearman's rho {rho}"
    emit(text, sys.stdout)
    by_fitness = format_figures(summary["kendall_tau_random_fitness"], 3)
    by_parameters = format_figures(summary["kendall_tau_random_parameters"], 3)
    text = f"random architectures, Kendall's tau with {truth} accuracy: {by_fitness} for fitness on the final weights"
    emit(f"{text}, {by_parameters} for the number of parameters", sys.stdout)


# ---- command line


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m nas201.summary", description=__doc__)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder with the three run directories")
    parser.add_argument("dataset", metavar="DATASET", help="data set that was searched, such as cifar10")
    args = parser.parse_args(argv)
    summary = summarise(args.output_dir, args.dataset)
    write_json(Path(args.output_dir) / "summary.json", summary)
    save_csv([row_of(run["run"]) for run in summary["runs"]], Path(args.output_dir) / "summary.csv")
    print_summary(summary)


if __name__ == "__main__":
    main()
