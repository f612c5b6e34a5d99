"""The comparison of runs: a table, summary.csv and compare.html."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import genotype_files
import genotypes
import summary

from helpers import ROOT, reported_run


@pytest.fixture
def runs(tmp_path):
    """Two searches and a retraining with invented figures; the first search has been retrained inside."""
    first = reported_run(tmp_path / "search-a", steps=4)
    second = reported_run(tmp_path / "search-b", steps=3)
    result = {
        "winner": {"fitness": 60.5, "parameters_M": 3.5, "mult_adds_M": 500.0},
        "random_mean": 50,
        "random_best": 59,
    }
    (first / "baselines.json").write_text(json.dumps(result | {"seconds": 10}))
    reported_run(first / "eval-x", kind="eval", steps=3)
    return [first, second, reported_run(tmp_path / "eval-c", kind="eval", steps=5)]


def rows_of(runs):
    return [summary.row_of(run) for run in runs]


def last_line(run):
    return json.loads((run / "history.jsonl").read_text().splitlines()[-1])


def test_row_of_a_search_has_its_figures(runs):
    row = summary.row_of(runs[0])
    assert (row["kind"], row["space"], row["dataset"], row["steps"]) == ("search", "s1", "digits", "4 of 5 generations")
    assert row["fitness"] == last_line(runs[0])["fitness_best"]
    assert (row["final_fitness"], row["random_mean"], row["random_best"]) == (60.5, 50, 59)
    assert (row["parameters_M"], row["mult_adds_M"]) == (3.5, 500)
    assert row["test_top1"] == last_line(runs[0] / "eval-x")["test_top1"]


def test_time_includes_the_last_measurement(runs):
    lines = (runs[0] / "history.jsonl").read_text().splitlines()
    assert summary.row_of(runs[0])["seconds"] == sum(json.loads(line)["seconds"] for line in lines) + 10


def test_unfinished_search_has_the_figures_so_far(runs):
    row = summary.row_of(runs[1])
    assert row["fitness"] == last_line(runs[1])["fitness_best"]
    assert row["final_fitness"] is None
    assert row["test_top1"] is None


def test_row_of_a_retraining_has_its_accuracy(runs):
    row = summary.row_of(runs[2])
    assert row["kind"] == "retraining"
    assert row["test_top1"] == last_line(runs[2])["test_top1"]
    assert row["fitness"] is None


def test_last_line_has_mean_and_std_over_the_runs(runs):
    head, *lines, means = summary.lines_of_table(rows_of(runs[:2]))
    assert len(lines) == 2
    values = [last_line(run)["fitness_best"] for run in runs[:2]]
    assert means[head.index("fitness")] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def test_runs_of_different_kinds_are_not_averaged(runs):
    lines = summary.lines_of_table(rows_of(runs))
    assert [line[0] for line in lines] == ["run", *(run.name for run in runs)]


def test_retraining_of_another_cell_is_not_the_winners(runs):
    """As train.py --pick makes it."""
    genotype_files.save(genotypes.DARTS_V1, runs[0] / "eval-x/genotype.json")
    assert summary.row_of(runs[0])["test_top1"] is None


def test_columns_without_figures_are_left_out(runs):
    head = summary.lines_of_table(rows_of(runs))[0]
    assert "tau" not in head
    assert "fitness" in head


def test_command_prints_and_writes(runs, tmp_path, capsys):
    summary.main([*map(str, runs), "--output", str(tmp_path / "new")])
    out = capsys.readouterr().out
    assert all(run.name in out for run in runs)
    with open(tmp_path / "new/summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [str(run) for run in runs]
    assert [row["fitness"] for row in rows[:2]] == [str(last_line(run)["fitness_best"]) for run in runs[:2]]
    page = (tmp_path / "new/compare.html").read_text()
    assert all(run.name in page for run in runs)
    assert page.count("<svg") == 4  # fitness: best and mean; test accuracy and training loss


def test_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        summary.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
def test_shell_script_searches_with_three_seeds_and_compares_them(tmp_path):
    sizes = "--epochs 1 --pop_size 3 --tsize 2 --init_channels 2 --layers 2 --train_samples 100 --valid_samples 50"
    command = [
        "bash",
        str(ROOT / "searchS1.sh"),
        "digits",
        "cpu",
        str(tmp_path / "out"),
        *sizes.split(),
        "--baselines",
        "0",
    ]
    environment = {**os.environ, "PYTHON": sys.executable}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    with open(tmp_path / "out/summary.csv", newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["18", "19", "20"]
    again = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert again.stdout.count("is finished") == 3
