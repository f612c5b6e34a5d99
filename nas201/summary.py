"""Three searches and their table: what searchNAS201.sh ends with.

python -m nas201.summary OUTPUT_DIR DATASET     reads OUTPUT_DIR/search-DATASET-seed*, writes OUTPUT_DIR/summary.json
"""

from support.cli import Parser, command

import statistics
import sys
from pathlib import Path

from nas201.benchmark import baselines, load
from nas201.genotypes import NUM_ARCHS
from nas201.published import PUBLISHED, PUBLISHED_SECONDS
from nas201.sources import COLUMNS, DATASETS, METRICS
from reporting.charts import column, finite_values
from run_settings import SETTINGS
from support.files import UserError, emit, read_history, read_json, write_json

SEEDS = (18, 19, 20)


def arguments(run):
    """Return the saved arguments of a run. Raises UserError where they are not those of a search."""
    about = read_json(Path(run) / "args.json")
    args = about.get("args") if isinstance(about, dict) else None
    names = ("epochs", "pop_size", "init_channels", "num_cells", "api_path")
    if not isinstance(args, dict) or not all(name in args for name in names):
        raise UserError(f"{run}/args.json does not hold the arguments of a search ({', '.join(names)})")
    if not isinstance(args["api_path"], (str, type(None))):
        raise UserError(f"{run}/args.json: api_path is no path")
    return args


def finished(run):
    """Return the history of a run that has all its generations, baselines and report, else None. Raises UserError."""
    run = Path(run)
    complete = all((run / name).exists() for name in ("report.html", "baselines.json"))
    history = read_history(run, SETTINGS) if complete else []
    generations = [row.get("generation") for row in history]
    return history if history and generations == list(range(1, arguments(run)["epochs"] + 1)) else None


def read_run(run):
    """Return the figures of a finished run. Raises UserError where it is not finished."""
    history = finished(run)
    if history is None:
        raise UserError(f"{run} is not a finished search: start searchNAS201.sh again to continue it")
    keys = ("best_genotype", "fitness_best", "true_accuracy", "truth", "kendall_tau", "spearman_rho")
    figures = {"run": str(run), **{key: history[-1].get(key) for key in keys}}
    worth = read_json(Path(run) / "baselines.json")
    figures["worth"] = worth if isinstance(worth, dict) else {}
    taus = [entry.get("kendall_tau") for entry in history]
    seconds = sum(finite_values(history, "seconds"))
    return figures | {"kendall_tau_by_generation": taus, "generations": len(history), "seconds": seconds}


def mean_std(values):
    """Return {"mean", "std"} (n - 1 in the denominator), each None where there are too few values."""
    values = [value for value in values if value is not None]
    mean = statistics.fmean(values) if values else None
    return {"mean": mean, "std": statistics.stdev(values) if len(values) > 1 else None}


def summarise(folder, dataset):
    """Return what becomes summary.json. Accuracies are top-1 in percent after 200 epochs. Raises UserError."""
    paths = [Path(folder) / f"search-{dataset}-seed{seed}" for seed in SEEDS]
    runs = [read_run(path) for path in paths]
    args = arguments(paths[0])
    table = load(args["api_path"]) if args["api_path"] else None
    # A source whose rows are read one by one has no figures of the whole space.
    space_figures = {} if table is None or table.table is None else baselines(table)
    accuracy = {}
    for (name, split), label in zip(METRICS, COLUMNS, strict=True):
        label = label.removesuffix("_200")
        row = {"searched": mean_std(column(runs, f"true_accuracy/{name}/{split}")), "published": None}
        if name == dataset:  # the published searches were on this data set
            row["published"] = {"mean": PUBLISHED[name][split].evnas, "std": PUBLISHED[name][split].evnas_std}
        row["optimum"] = PUBLISHED[name][split].best
        if label in space_figures:
            row |= {f"space_{key}": value for key, value in space_figures[label].items()}
            row["optimum"] = row.pop("space_best")
            row["beaten_by"] = column(runs, f"worth/accuracy/{label}/beaten_by")
        accuracy[label] = row
    summary = {"dataset": dataset, "seeds": SEEDS, "arguments": args, "accuracy": accuracy}
    for key in ("fitness_best", "kendall_tau", "spearman_rho", "seconds"):
        summary[key] = mean_std(column(runs, key))
    for of in ("fitness", "parameters"):
        key = f"worth/kendall_tau/random architectures/{of}"
        summary[f"kendall_tau_random_{of}"] = mean_std(column(runs, key))
    return summary | {"published_seconds": PUBLISHED_SECONDS if dataset in DATASETS else None, "runs": runs}


def show(figures, digits=2):
    """Return mean ± std, a number, or a dash."""
    mean, std = (figures["mean"], figures["std"]) if isinstance(figures, dict) else (figures, None)
    return "-" if mean is None else f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def print_table(summary):
    args, seeds = summary["arguments"], ", ".join(map(str, SEEDS))
    size = f"C {args['init_channels']}, N {args['num_cells']}, {args['pop_size']} individuals"
    print()
    emit(f"{summary['dataset']}: seeds {seeds}; {size}, {args['epochs']} generations", sys.stdout)
    for run in summary["runs"]:
        emit(f"  {run['best_genotype']}", sys.stdout)
    heads = {"searched": "these searches", "published": "published", "optimum": "optimum"}
    heads |= {"space_mean": "mean", "space_median": "median", "space_std": "std", "space_best_of_10": "of 10"}
    heads |= {"space_best_of_50": "of 50", "space_most_parameters": "largest"}
    line = "{:22} {:>16} {:>16}" + " {:>8}" * (len(heads) - 2)
    print(line.format("accuracy, %", *heads.values()))
    for name, row in summary["accuracy"].items():
        print(line.format(name, *(show(row.get(key)) for key in heads)))
    for name, row in summary["accuracy"].items():
        if "beaten_by" in row:
            beaten = ", ".join(show(count, 0) for count in row["beaten_by"])
            print(f"{name}: {beaten} of {NUM_ARCHS:,} architectures beat these searches")
    seconds = [show(summary["seconds"], 1), show(summary["published_seconds"], 1)]
    print(line.format("seconds", *seconds, *[""] * (len(heads) - 2)))
    truth = summary["runs"][0]["truth"]
    if truth:
        tau, rho = show(summary["kendall_tau"], 3), show(summary["spearman_rho"], 3)
        text = f"fitness of the last population and {truth} accuracy: Kendall's tau {tau}, Spearman's rho {rho}"
        emit(text, sys.stdout)
        tau, other = (show(summary[f"kendall_tau_random_{of}"], 3) for of in ("fitness", "parameters"))
        print(f"Kendall's tau on random architectures: of fitness on the final weights {tau}, of parameters {other}")
    for run in summary["runs"]:
        emit(f"{run['run']}: {run['worth'].get('sentence')}", sys.stdout)
    absent = "not in the benchmark's table, or not read" if args["api_path"] else "no benchmark was given (--api_path)"
    print("mean ± standard deviation over the seeds (n - 1); published: by searches on the same data set")
    print("mean, median, std: a random architecture; of 10, of 50: the expected best of so many of them")
    print("largest: six 3x3 convolutions, with the most parameters")
    print(f"a dash elsewhere: {absent}")


@command
def main(argv=None):
    parser = Parser(prog="python -m nas201.summary", description="The table of three finished searches.")
    parser.add_argument("output_dir", help="where search-DATASET-seed18 and so on are")
    parser.add_argument("dataset", help="their data set")
    args = parser.parse_args(argv)
    summary = summarise(args.output_dir, args.dataset)
    write_json(Path(args.output_dir) / "summary.json", summary)
    print_table(summary)


if __name__ == "__main__":
    main()
