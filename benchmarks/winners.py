"""Compare the winners of three small searches with ten random cells, after equal retraining.

    OMP_NUM_THREADS=1 python benchmarks/winners.py ../data runs/winners --jobs 2

DATA is a folder with train/CLASS/ and test/CLASS/, for instance CIFAR-10 as JPEG files. The
searches run in the DARTS space with seeds 18, 19 and 20. The script then retrains each winner and
the ten random cells that every search measures with its final weights. If you interrupt the script,
call it again: it continues where it was, and repeats nothing that is finished.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (18, 19, 20)
SEARCH = "--image_size 16 --epochs 8 --pop_size 10 --tsize 3 --init_channels 8 --layers 5 --baselines 10"
SEARCH += " --train_samples 3000 --valid_samples 500"
RETRAINING = "--image_size 16 --epochs 8 --init_channels 16 --layers 5 --train_samples 5000"


class Result(NamedTuple):
    """A retrained cell."""

    name: str
    parameters: float  # in millions, as the search counts them: of the paper's network
    accuracy: float  # test accuracy after retraining, in percent


def call(script: str, *words: str | Path) -> None:
    """Run a script of this project. What it prints is in the log.txt of its run."""
    subprocess.run([sys.executable, ROOT / script, *words], stdout=subprocess.DEVNULL, check=True)


def search(data: Path, output: Path, seed: int, flags: list[str]) -> Path:
    """Search, or continue a search that was interrupted. Returns the run directory."""
    run = output / f"search-{seed}"
    if (run / "checkpoint.pt").exists():
        if not (run / "report.html").exists():
            call("train_search.py", "--resume", run)
    else:
        source = ["--dataset", "folder", "--data", data, "--dir", output, "--run_name", run.name]
        call("train_search.py", *source, "--seed", str(seed), *SEARCH.split(), *flags)
    return run


def retrain(data: Path, output: Path, name: str, cell: str, flags: list[str]) -> float:
    """Retrain a cell, given as JSON, or continue. Returns the test accuracy in percent."""
    runs = [run for run in output.glob(f"eval-{name}-*") if (run / "checkpoint.pt").exists()]
    if not runs:
        file = output / f"{name}.json"
        file.write_text(cell)
        source = ["--dataset", "folder", "--data", data, "--genotype", file, "--dir", output, "--save", name]
        call("train.py", *source, *RETRAINING.split(), *flags)
        runs = list(output.glob(f"eval-{name}-*"))
    result = runs[0] / "test.json"
    if not result.exists():
        call("train.py", "--resume", runs[0])
    return json.loads(result.read_text())["top1"]


def rows_with_final_weights(run: Path, group: str) -> list[dict[str, str]]:
    """Return the rows of individuals.csv of a group that was measured with the final weights."""
    with open(run / "individuals.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["weights"] == "final" and row["group"] == group]


def winner_of(run: Path) -> dict[str, str]:
    """Return the row of individuals.csv of a search's winner, the best of the last generation."""
    with open(run / "individuals.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["group"] == "population" and row["rank"] == "1"]
    return rows[-1]


def summarise(kind: str, results: list[Result]) -> str:
    """Return a line with the mean and standard deviation of accuracies."""
    accuracies = [result.accuracy for result in results]
    mean = statistics.mean(accuracies)
    return f"{kind}: {mean:.2f} ± {statistics.stdev(accuracies):.2f} %, best {max(accuracies):.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    parser.add_argument("output", type=Path, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1); set OMP_NUM_THREADS with it")
    parser.add_argument("--flags", default="", help='flags for all commands, for instance "--amp"')
    args = parser.parse_args()
    flags = args.flags.split()
    args.output.mkdir(parents=True, exist_ok=True)

    with ThreadPoolExecutor(args.jobs) as pool:

        def retrained(name: str, row: dict[str, str]) -> tuple[str, dict[str, str], Future]:
            return name, row, pool.submit(retrain, args.data, args.output, name, row["cell"], flags)

        searches = {seed: pool.submit(search, args.data, args.output, seed, flags) for seed in SEEDS}
        random_rows = rows_with_final_weights(searches[SEEDS[0]].result(), "random architectures")
        random = [retrained(f"random-{number}", row) for number, row in enumerate(random_rows, start=1)]
        winners = [retrained(f"winner-{seed}", winner_of(run.result())) for seed, run in searches.items()]
    random, winners = (
        [Result(name, float(row["parameters_M"]), accuracy.result()) for name, row, accuracy in cells]
        for cells in (random, winners)
    )

    for result in sorted(winners + random, key=lambda result: -result.accuracy):
        print(f"{result.name:20} {result.parameters:6.2f} M parameters  {result.accuracy:6.2f} %")
    print(summarise("three winners", winners))
    print(summarise("ten random cells", random))
    accuracies = [result.accuracy for result in random]
    for seed, run in searches.items():
        fitness_of = {
            row["cell"]: float(row["fitness"]) for row in rows_with_final_weights(run.result(), "random architectures")
        }
        fitness = [fitness_of[row["cell"]] for row in random_rows]
        tau = stats.kendalltau(fitness, accuracies).statistic
        print(f"seed {seed}: Kendall's tau of fitness and retrained accuracy over the random cells {tau:.2f}")
    tau = stats.kendalltau([result.parameters for result in random], accuracies).statistic
    print(f"Kendall's tau of parameters and retrained accuracy over the random cells {tau:.2f}")


if __name__ == "__main__":
    main()
