"""Searches of NAS-Bench-201 end to end: true accuracies, resume, flags, searchNAS201.sh, bad input."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import datasets
import search_cli
import search_space
import splits
from nas201 import encoding, summary
from nas201.train_search import S2, main, make_parser
from reporting.cells import load_cell
from support import runs
from views import VIEWS

from helpers import S2_ARCHS, S2_SEARCH_LINE, S2_TRUTH, populations, read_history, s2_search, write_table

ROOT = Path(__file__).resolve().parents[1]
# One generation, where nothing has to be learnt.
SHORT = "--epochs 1 --train_samples 64 --valid_samples 50 --pop_size 3 --tsize 2 --baselines 1".split()


@pytest.fixture(autouse=True)
def quick(monkeypatch, quick_report):
    """One thread, and no TensorBoard: writing its files takes longer than these searches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(runs, "open_board", lambda run: False)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """`table(absent=())`: the path of a table, see `helpers.write_table`. It is not to be changed."""
    return functools.cache(lambda absent=(): write_table(tmp_path_factory.mktemp("table"), absent))


# ---- the run and its files


class Board:
    """Stands in for TensorBoard's writer: it only notes the names of the curves."""

    def __init__(self):
        self.names = set()

    def add_scalar(self, name, value, step):
        self.names.add(name)

    flush = close = lambda self: None


@pytest.fixture(scope="module")
def board():
    return Board()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, table, board, quick_reports):
    """A finished search of three generations with a benchmark table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "open_board", lambda run: board)
        return s2_search(tmp_path_factory.mktemp("finished"), "--api_path", table())


def test_history_describes_the_saved_populations(finished):
    rows = read_history(finished)
    assert [row["generation"] for row in rows] == [1, 2, 3]
    for row, (alphas, fitness) in zip(rows, populations(finished), strict=True):
        assert alphas.shape == (6, 1, 6, 5)
        assert (fitness.diff() <= 0).all()
        assert len(set(fitness.tolist())) > 1
        assert row["best_genotype"] == encoding.arch_string(alphas[0])
        assert row["fitness_best"] == fitness[0]


def test_history_has_the_true_accuracies_of_the_best(finished):
    for row in read_history(finished):
        best = S2_TRUTH[S2_ARCHS.index(row["best_genotype"])]
        assert list(row["true_accuracy"]) == ["cifar10", "cifar100", "ImageNet16-120"]
        assert [v for pair in row["true_accuracy"].values() for v in (pair["valid"], pair["test"])] == list(best)


def test_history_has_the_rank_correlations_of_the_population(finished):
    for row, (alphas, fitness) in zip(read_history(finished), populations(finished), strict=True):
        archs = [encoding.arch_string(individual) for individual in alphas]
        fitness_of = dict(zip(archs, fitness.tolist(), strict=True))  # equal cells have equal fitness and count once
        truth = [S2_TRUTH[S2_ARCHS.index(arch), 0] for arch in fitness_of]  # CIFAR-10 validation, column 0
        values = list(fitness_of.values())
        assert row["truth"] == "cifar10 valid"
        assert row["kendall_tau"] == pytest.approx(stats.kendalltau(values, truth).statistic)
        assert row["spearman_rho"] == pytest.approx(stats.spearmanr(values, truth).statistic)


def test_genotype_file_holds_the_best_of_the_last_generation(finished):
    best = read_history(finished)[-1]["best_genotype"]
    assert json.loads((finished / "genotype.json").read_text()) == {"arch": best}
    assert load_cell(finished / "genotype.json", VIEWS) == best


def test_finished_search_has_its_files(finished):
    for name in ("cell.svg", "weights/weights.pt", "report.html"):
        assert (finished / name).is_file()
    assert "cifar10 valid accuracy of the best" in (finished / "log.txt").read_text()


def test_resume_of_a_finished_search_changes_nothing(finished, capsys):
    before = (finished / "history.jsonl").read_bytes()
    main(["--resume", str(finished)])
    assert capsys.readouterr().out == f"{finished} is finished\n"
    assert (finished / "history.jsonl").read_bytes() == before


def test_tensorboard_has_the_true_accuracies(finished, board):
    assert {"kendall_tau", "spearman_rho", "fitness_best", "true_accuracy/ImageNet16-120/test"} <= board.names


# ---- what a table tells of a population


def space_of(*flags):
    """The search space of a search of digits with these flags."""
    return S2(make_parser().parse_args(["--dataset", "digits", *map(str, flags)]))


def fields_of(space, fitness=(30, 20, 10)):
    """The history's fields on a population with this fitness."""
    alphas = encoding.random_alphas(len(fitness), generator=torch.Generator().manual_seed(0))
    return space.remarks_on_population(alphas, torch.tensor(fitness, dtype=torch.float64)).fields


def test_table_without_validation_is_compared_by_test(table, capsys):
    space = space_of("--api_path", table(absent=("valid",)), "--api_dataset", "cifar100")
    out = capsys.readouterr().out
    assert "cifar100 test accuracy" in out
    assert "cifar10_valid_200" in out
    fields = fields_of(space)
    assert fields["truth"] == "cifar100 test"
    assert fields["true_accuracy"]["cifar100"]["valid"] is None
    assert -1 <= fields["kendall_tau"] <= 1


def test_table_without_the_data_set_has_no_rank_correlation(table):
    fields = fields_of(space_of("--api_path", table(absent=("cifar10_",))))
    assert fields["truth"] is None
    assert fields["kendall_tau"] is None
    assert fields["spearman_rho"] is None
    assert fields["true_accuracy"]["cifar10"] == {"valid": None, "test": None}
    assert fields["true_accuracy"]["cifar100"]["test"] is not None


def test_table_of_test_accuracies_is_compared_by_test(shared_data):
    fields = fields_of(space_of("--api_path", shared_data("nb201_accuracy.csv.xz")))
    assert fields["truth"] == "cifar10 test"
    assert fields["true_accuracy"]["cifar10"]["test"] > 9


def test_equal_fitness_has_no_correlation(table):
    fields = fields_of(space_of("--api_path", table()), fitness=(10, 10, 10))
    assert fields["kendall_tau"] is None
    assert fields["spearman_rho"] is None


# ---- without a table, and where it is looked for


@pytest.fixture(scope="module")
def without_table(tmp_path_factory, quick_reports):
    """A finished search without a table, and what it printed."""
    folder, out = tmp_path_factory.mktemp("without_table"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)  # no table is where the published script looks
        patch.setattr(runs, "open_board", lambda run: False)
        return s2_search(folder, *SHORT), out.getvalue()


def test_search_without_a_table_reports_only_the_arch_string(without_table):
    run, _ = without_table
    (row,) = read_history(run)
    assert row["best_genotype"] in S2_ARCHS
    assert not {"true_accuracy", "truth", "kendall_tau", "spearman_rho"} & set(row)


def test_search_without_the_published_table_names_the_flag_once(without_table):
    _, out = without_table
    assert out.count("--api_path") == 1


@pytest.fixture
def published_table(tmp_path, table, monkeypatch):
    """A table where the published script has it, seen from tmp_path, which is the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas201.train_search.PUBLISHED_TABLE", os.path.relpath(table()))


def test_resumed_search_keeps_to_having_no_table(without_table, published_table, capsys):
    run, _ = without_table
    (run / "report.html").unlink()
    main(["--resume", str(run)])
    assert (run / "report.html").exists()
    assert "--api_path" not in capsys.readouterr().out
    assert "truth" not in read_history(run)[0]


def test_table_is_found_where_the_published_script_has_it(setup_of, published_table):
    assert setup_of().space.truth == ("cifar10", "valid")


def test_empty_api_path_uses_no_table(setup_of, published_table):
    assert setup_of("--api_path", "").space.table is None


# ---- resume; see also test_resume.py


@pytest.mark.parametrize("flags", [["--bn", "batch"], ["--epochs", "4"], ["--track_running_stats"]], ids=str)
def test_resume_with_another_argument_is_refused(finished, fails, flags):
    assert flags[0] in fails(main, ["--resume", finished, *flags])


@pytest.mark.slow
def test_run_is_bound_to_its_table_wherever_it_is(finished, tmp_path, table, monkeypatch, fails):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    report = Path("run/report.html")
    report.unlink()
    shutil.copy(table(), "moved.csv")
    main(["--resume", "run", "--api_path", "moved.csv"])
    assert report.exists()

    report.unlink()
    figures = [line.split(",") for line in table().read_text().splitlines()]
    figures[7][3] = "1.5"
    Path("moved.csv").write_text("\n".join(map(",".join, figures)))
    assert "run: table is" in fails(main, ["--resume", "run", "--api_path", "moved.csv"])
    assert "nowhere.csv" in fails(main, ["--resume", "run", "--api_path", "nowhere.csv"])


@pytest.mark.slow
def test_run_is_bound_to_its_split_file_wherever_it_is(tmp_path, monkeypatch, fails):
    """The data set is called CIFAR-10, but its images are random ones of 8x8 pixels."""

    def load(root, split, workers):
        images = torch.randint(256, (50_000, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return splits.Images(images, torch.arange(50_000) % 10, list("0123456789"), "cifar10")

    def write_split(name, **lists):
        content = {key: ["int", list(map(str, indices))] for key, indices in lists.items()}
        (tmp_path / name).write_text(json.dumps(content))
        return ["--split_file", name]

    cifar10 = dataclasses.replace(datasets.DATASETS["cifar10"], load=load)
    monkeypatch.setitem(datasets.DATASETS, "cifar10", cifar10)
    monkeypatch.chdir(tmp_path)
    lists = {"train": range(0, 200, 2), "valid": range(1, 200, 2)}
    run = s2_search(tmp_path, *SHORT, "--dataset", "cifar10", *write_split("first.txt", **lists))
    (run / "report.html").unlink()
    main(["--resume", "run", *write_split("moved.txt", **lists)])
    (run / "report.html").unlink()
    lists["valid"] = [49_991, *range(3, 200, 2)]  # of the same class
    assert "run: split is" in fails(main, ["--resume", "run", *write_split("other.txt", **lists)])
    assert not (run / "report.html").exists()


def test_resume_keeps_arguments_that_differ_from_the_defaults(tmp_path):
    run = s2_search(tmp_path, *SHORT, "--bn", "batch", "--valid_transform", "train")
    (run / "report.html").unlink()
    main(["--resume", str(run)])
    assert json.loads((run / "args.json").read_text())["args"]["bn"] == "batch"
    assert (run / "report.html").exists()


# ---- flags


@pytest.fixture
def setup_of(monkeypatch):
    """`setup_of(*flags)` returns the SearchSetup of a search of digits that is not run."""
    setups = []
    monkeypatch.setattr(search_cli, "run_search", lambda search, setup, *_: setups.append(setup))

    def make(*flags):
        main(["--dataset", "digits", "--device", "cpu", "--init_channels", "4", *flags])
        return setups.pop()

    return make


def batch_norms(network):
    """Return {name: whether it keeps running statistics} of the BatchNorms of a network."""
    modules = network.named_modules()
    return {name: module.track_running_stats for name, module in modules if isinstance(module, nn.BatchNorm2d)}


def test_defaults_are_the_papers(setup_of):
    expected = dict(
        batch_size=64, valid_batch_size=1024, epochs=50, pop_size=50, tsize=10, num_elites=1, mutate_rate=0.1, seed=18,
        learning_rate=0.025, learning_rate_min=0.001, momentum=0.9, weight_decay=3e-4, grad_clip=5, num_cells=5,
        max_nodes=4, track_running_stats=False, bn="running", valid_transform="test", cutout=False, workers=2,
    )  # fmt: skip
    setup = setup_of()
    assert expected.items() <= vars(setup.args).items()
    assert setup.space.nesterov
    assert len(setup.network.cells) == 17
    assert setup.train_loader.cutout == 0
    assert not setup.valid_loader.augment


def test_searched_cells_keep_no_running_statistics_by_default(setup_of):
    assert all(tracked is ("edges" not in name) for name, tracked in batch_norms(setup_of().network).items())


def test_track_running_stats_keeps_those_of_every_batch_norm(setup_of):
    norms = batch_norms(setup_of("--track_running_stats").network)
    assert all(norms.values())
    assert len(norms) == 15 * 6 * 2 + 1 + 4 + 1


def test_cutout_is_at_most_a_quarter_of_a_digit(setup_of):
    assert setup_of("--cutout").train_loader.cutout == 4


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_fitness_is_measured_with_the_statistics_of_bn(setup_of, monkeypatch, bn):
    monkeypatch.setattr(
        search_space, "measure_fitness", lambda network, alphas, loader, statistics, *_, **__: statistics
    )
    assert setup_of("--bn", bn).measure(encoding.random_alphas(1), "fitness") == bn


def test_variant_rand_knows_the_true_accuracies_of_the_last_generation(tmp_path, table):
    """The others are not measured."""
    run = s2_search(tmp_path, *SHORT, "--variant", "rand", "--epochs", 2, "--api_path", table())
    first, last = read_history(run)
    assert not {"fitness_best", "true_accuracy", "kendall_tau"} & set(first)
    assert {"fitness_best", "true_accuracy", "kendall_tau"} <= set(last)


def test_search_without_momentum_saves_no_running_statistics_of_edges(tmp_path):
    run = s2_search(tmp_path, *SHORT, "--momentum", 0)
    names = torch.load(run / "weights/weights.pt", weights_only=True)
    assert {name.split(".")[0] for name in names if "running" in name} == {"stem", "cells", "lastact"}
    assert not any("edges" in name and "running" in name for name in names)


# ---- three seeds


def shell(*words, check=True, script=ROOT / "searchNAS201.sh"):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", script, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=check,
    )


def assert_summary(folder, names, out):
    """Check summary.json and the printed text against the histories of three runs of two generations with a table."""
    result = json.loads((folder / "summary.json").read_text())
    entries = [read_history(folder / name) for name in names]
    assert [len(lines) for lines in entries] == [2, 2, 2]
    assert [run["best_genotype"] for run in result["runs"]] == [lines[-1]["best_genotype"] for lines in entries]
    assert result["seconds"]["mean"] == pytest.approx(np.mean([sum(e["seconds"] for e in lines) for lines in entries]))
    assert result["runs"][1]["kendall_tau_by_generation"] == [entry["kendall_tau"] for entry in entries[1]]
    assert -1 <= result["kendall_tau_random_fitness"]["mean"] <= 1
    tests = [lines[-1]["true_accuracy"]["cifar10"]["test"] for lines in entries]
    assert_accuracies(result["accuracy"]["cifar10_test"], tests)
    assert f"{np.mean(tests):.2f} ± {np.std(tests, ddof=1):.2f}" in out
    beaten = [(S2_TRUTH[:, 1] > test).sum() for test in tests]
    assert f"{beaten[0]}, {beaten[1]}, {beaten[2]} of 15,625" in out
    for published in ("± 1.11", "20249.7"):  # those searches were not on digits
        assert published not in out


def assert_accuracies(row, tests):
    """Check a row of summary.json against the searched cells' test accuracies on CIFAR-10, which is column 1."""
    assert row["searched"] == pytest.approx({"mean": np.mean(tests), "std": np.std(tests, ddof=1)})
    assert row["published"] is None
    assert row["optimum"] == S2_TRUTH[:, 1].max()
    assert row["space_mean"] == pytest.approx(S2_TRUTH[:, 1].mean())
    assert row["beaten_by"] == [(S2_TRUTH[:, 1] > test).sum() for test in tests]
    assert row["space_best_of_10"] < row["space_best_of_50"] < row["optimum"]
    assert row["space_most_parameters"] > 0


@pytest.mark.slow
def test_summary_describes_three_seeds(tmp_path, table, capsys):
    names = [f"search-digits-seed{seed}" for seed in summary.SEEDS]
    sizes = ["--epochs", 2, "--train_samples", 100, "--baselines", 4, "--pop_size", 3, "--tsize", 2]
    for seed, name in zip(summary.SEEDS, names, strict=True):
        s2_search(tmp_path, "--api_path", table(), *sizes, "--seed", seed, "--run_name", name)
    capsys.readouterr()
    summary.main([str(tmp_path), "digits"])
    assert_summary(tmp_path, names, capsys.readouterr().out)


@pytest.mark.slow
def test_script_finishes_what_its_three_seeds_began(tmp_path, table, monkeypatch):
    """One run is finished, one was interrupted, one ended before its first checkpoint."""
    path, tiny = table(), [*S2_SEARCH_LINE[4:], "--epochs", "2"]  # --dataset and --device are the script's
    flags = [*tiny, "--api_path", str(path), "--data", "../data", "--device", "cpu", "--dataset", "digits"]
    flags += ["--track_running_stats"]  # as the script
    folder = tmp_path / "out put"
    names = [f"search-digits-seed{seed}" for seed in (18, 19, 20)]
    main([*flags, "--seed", "18", "--dir", str(folder), "--run_name", names[0]])
    save = runs.Run.save_checkpoint

    def interrupt(self, completed, state):
        save(self, completed, state)
        if completed == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runs.Run, "save_checkpoint", interrupt)
        main([*flags, "--seed", "19", "--dir", str(folder), "--run_name", names[1]])
    (folder / names[2]).mkdir()
    finished = (folder / names[0] / "history.jsonl").read_bytes()

    for name in ("utils", "numpy", "train_search"):  # modules in the current directory must not be imported
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "linked.sh").symlink_to(ROOT / "searchNAS201.sh")
    monkeypatch.chdir(tmp_path)
    out = shell("digits", "cpu", folder, *tiny, "--api_path", path, script=tmp_path / "linked.sh").stdout
    assert f"{names[0]} is finished" in out
    assert (folder / names[0] / "history.jsonl").read_bytes() == finished
    assert "generation 1/2" in (folder / names[1] / "log.txt").read_text()
    assert_summary(folder, names, out)


@pytest.mark.parametrize("dataset", ["digits", "cifar100"])
def test_summary_without_a_table_has_published_figures_of_the_searched_data_set(
    tmp_path, without_table, capsys, dataset
):
    """Nobody published searches of digits. Here the run stands for all three."""
    run, _ = without_table
    for seed in summary.SEEDS:
        (tmp_path / f"search-{dataset}-seed{seed}").symlink_to(run)
    summary.main([str(tmp_path), dataset])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "summary.json").read_text())
    for name, row in result["accuracy"].items():
        assert row["searched"] == {"mean": None, "std": None}
        assert (row["published"] is None) == (not name.startswith(dataset))
    assert result["accuracy"]["cifar10_test"]["optimum"] == 94.37
    assert "--api_path" in out
    for published in ("66.74 ± 3.08", "20249.7"):  # of CIFAR-100
        assert (published in out) == (dataset == "cifar100")
    assert "92.18 ± 1.11" not in out  # of CIFAR-10


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digits", "cpu"], "usage"),
        pytest.param(["mnist", "cpu", "out"], "mnist", marks=pytest.mark.slow),  # Python's message
        (["digits", "cpu", "out", "--seed", "3"], "--seed"),
        (["digits", "cpu", "out", "--dir=x"], "--dir"),
    ],
)
def test_bad_argument_of_the_script_is_refused(words, expected):
    done = shell(*words, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


# ---- bad input


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, table):
    """A folder with a table that lacks a row, a split file and a damaged benchmark."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "table.csv").write_text("\n".join(table().read_text().splitlines()[:-1]))
    (folder / "split.txt").write_text('{"train": ["int", ["1"]], "valid": ["int", ["1"]]}')
    (folder / "bench.pth").write_bytes(b"PK\x03\x04 no archive")
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--api_path", "{bad}/table.csv"], "15624"),
        (["--api_path", "{bad}/absent.csv"], "absent.csv"),
        (["--api_path", "{bad}/bench.pth"], "bench.pth"),
        (["--split_file", "{bad}/split.txt"], "--split_file"),
        (["--split", "fixed"], "digits"),
        (["--dataset", "ImageNet16-120", "--data", "{bad}"], "train_data_batch_1"),
        (["--dataset", "folder", "--data", "{bad}/nowhere"], "nowhere"),
        (["--dataset", "mnist"], "mnist"),
        (["--max_nodes", "5"], "--max_nodes"),
        (["--workers", "0"], "--workers"),
        (["--tsize", "7"], "--tsize 7"),
        (["--num_elites", "7"], "--num_elites 7"),
        (["--batch_size", "401"], "--batch_size 401"),
        (["--valid_samples", "100000"], "100000 images"),
        (["--epochs", "0"], "--epochs"),
        (["--layers", "8"], "--layers"),
        (["--train_portion", "0.5"], "--train_portion"),
        (["--resume", "{bad}"], "args.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_argument_is_refused(fails, bad_files, flags, words):
    flags = [word.replace("{bad}", str(bad_files)) for word in flags]
    assert words in fails(main, [*S2_SEARCH_LINE, *flags])


def test_summary_of_an_unfinished_run_is_refused(fails, tmp_path):
    assert "search-digits-seed18" in fails(summary.main, [tmp_path, "digits"])
