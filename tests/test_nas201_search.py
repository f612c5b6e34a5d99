"""Searches on NAS-Bench-201 end to end: resume, variants, the benchmark's figures, searchNAS201.sh, bad input."""

import dataclasses
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
from nas201.train_search import main
from reporting.cells import load_cell
from support import runs
from views import VIEWS

from helpers import S2_ARCHS, S2_SEARCH_LINE, S2_TRUTH, s2_search, write_table

ROOT = Path(__file__).resolve().parents[1]


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
    return lambda absent=(): write_table(tmp_path_factory.mktemp("table"), absent)


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def same(a, b):
    """Whether two values, nested dicts and lists of tensors, are bit-identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()) and a.isnan().all()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# The run and its files


def test_a_run_and_its_history(tmp_path, table, capsys):
    run = s2_search(tmp_path, "--api_path", table())
    entries = history(run)
    assert [entry["generation"] for entry in entries] == [1, 2, 3]
    index = {arch: i for i, arch in enumerate(S2_ARCHS)}
    for entry in entries:
        with np.load(run / "population" / f"{entry['generation']:03d}.npz") as file:
            alphas, fitness = torch.from_numpy(file["alphas"]), file["fitness"]
        assert alphas.shape == (6, 1, 6, 5) and (np.diff(fitness) <= 0).all() and len(set(fitness)) > 1
        archs = [encoding.arch_string(individual) for individual in alphas]
        assert entry["best_genotype"] == archs[0] and entry["fitness_best"] == fitness[0]
        best = S2_TRUTH[index[archs[0]]]
        assert list(entry["true_accuracy"]) == ["cifar10", "cifar100", "ImageNet16-120"]
        assert [v for pair in entry["true_accuracy"].values() for v in (pair["valid"], pair["test"])] == list(best)
        truth = [S2_TRUTH[index[arch], 0] for arch in archs]  # CIFAR-10 validation, column 0
        assert entry["truth"] == "cifar10 valid"
        assert entry["kendall_tau"] == pytest.approx(stats.kendalltau(fitness, truth).statistic)
        assert entry["spearman_rho"] == pytest.approx(stats.spearmanr(fitness, truth).statistic)
    assert json.loads((run / "genotype.json").read_text()) == {"arch": entries[-1]["best_genotype"]}
    assert load_cell(run / "genotype.json", VIEWS) == entries[-1]["best_genotype"]
    assert (run / "cell.svg").exists() and (run / "weights/weights.pt").exists()
    assert "True accuracy, CIFAR-10" in (run / "report.html").read_text()
    assert "cifar10 valid accuracy of the best" in (run / "log.txt").read_text()
    before = (run / "history.jsonl").read_bytes()
    capsys.readouterr()
    main(["--resume", str(run)])
    assert capsys.readouterr().out == f"{run} is finished\n" and (run / "history.jsonl").read_bytes() == before


def test_tensorboard_has_the_true_accuracies(tmp_path, table, monkeypatch):
    written = []

    class Board:
        def add_scalar(self, name, value, step):
            written.append(name)

        flush = close = lambda self: None

    monkeypatch.setattr(runs, "open_board", lambda run: Board())
    s2_search(tmp_path, "--api_path", table(), "--epochs", 1)
    assert {"kendall_tau", "spearman_rho", "fitness_best", "true_accuracy/ImageNet16-120/test"} <= set(written)


def test_without_a_table_the_string_alone(tmp_path):
    run = s2_search(tmp_path, "--epochs", 1)
    entry = history(run)[0]
    assert entry["best_genotype"] in S2_ARCHS
    assert not {"true_accuracy", "truth", "kendall_tau", "spearman_rho"} & set(entry)


def test_a_table_without_validation_is_compared_by_test(tmp_path, table, capsys):
    run = s2_search(tmp_path, "--api_path", table(absent=("valid",)), "--epochs", 1, "--api_dataset", "cifar100")
    assert "cifar100 test accuracy after 200 epochs; absent are cifar10_valid_200" in capsys.readouterr().out
    entry = history(run)[0]
    assert entry["truth"] == "cifar100 test" and entry["true_accuracy"]["cifar100"]["valid"] is None
    assert -1 <= entry["kendall_tau"] <= 1


def test_a_table_without_the_data_set(tmp_path, table):
    run = s2_search(tmp_path, "--api_path", table(absent=("cifar10_",)), "--epochs", 1)
    entry = history(run)[0]
    assert entry["truth"] is None and entry["kendall_tau"] is None and entry["spearman_rho"] is None
    assert entry["true_accuracy"]["cifar10"] == {"valid": None, "test": None}
    assert entry["true_accuracy"]["cifar100"]["test"] is not None


def test_the_shared_table(tmp_path, shared_data):
    run = s2_search(tmp_path, "--api_path", shared_data("nb201_accuracy.csv.xz"), "--epochs", 1)
    entry = history(run)[0]  # this table has test accuracies alone
    assert entry["truth"] == "cifar10 test" and entry["true_accuracy"]["cifar10"]["test"] > 9


def test_equal_fitness_has_no_correlation(tmp_path, table):
    flags = ["--epochs", 1, "--learning_rate", 0, "--learning_rate_min", 0, "--track_running_stats"]
    run = s2_search(tmp_path, "--api_path", table(), *flags)
    entry = history(run)[0]  # nothing is learnt, and fresh running statistics see one class in everything
    assert entry["fitness_std"] == 0 and entry["kendall_tau"] is None and entry["spearman_rho"] is None


# Resume; see also test_resume.py


def test_resume_with_other_arguments(tmp_path, fails):
    run = s2_search(tmp_path / "run", "--epochs", 1)
    for flags, words in (
        (["--bn", "batch"], "--bn batch"),
        (["--epochs", "4"], "--epochs 4"),
        (["--track_running_stats"], "--track_running_stats True"),
    ):
        assert words in fails(main, ["--resume", run, *flags])


def test_a_run_is_bound_to_its_table_wherever_that_lies(tmp_path, table, monkeypatch, fails):
    path = table()
    run = s2_search(tmp_path, "--api_path", path, "--epochs", 1)
    (run / "report.html").unlink()
    shutil.copy(path, tmp_path / "moved.csv")
    monkeypatch.chdir(tmp_path)
    main(["--resume", "run", "--api_path", "moved.csv"])
    (run / "report.html").unlink()
    figures = [line.split(",") for line in path.read_text().splitlines()]
    figures[7][3] = "1.5"
    (tmp_path / "moved.csv").write_text("\n".join(map(",".join, figures)))
    assert "run: table is '" in fails(main, ["--resume", "run", "--api_path", "moved.csv"])
    assert "no such" in fails(main, ["--resume", "run", "--api_path", "nowhere.csv"]).lower()


def test_a_run_is_bound_to_its_split_file_wherever_that_lies(tmp_path, monkeypatch, fails):
    """On CIFAR-10 in name; the images are random ones of 8x8 pixels."""

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
    lists = {"train": range(0, 1_000, 2), "valid": range(1, 1_000, 2)}
    run = s2_search(tmp_path, "--dataset", "cifar10", "--epochs", 1, *write_split("first.txt", **lists))
    (run / "report.html").unlink()
    main(["--resume", "run", *write_split("moved.txt", **lists)])
    (run / "report.html").unlink()
    lists["valid"] = [49_999, *range(3, 1_000, 2)]
    assert "run: split is '" in fails(main, ["--resume", "run", *write_split("other.txt", **lists)])
    assert not (run / "report.html").exists()


def test_resume_keeps_what_differs_from_this_spaces_defaults(tmp_path):
    run = s2_search(tmp_path, "--bn", "batch", "--valid_transform", "train", "--epochs", 1)
    (run / "report.html").unlink()
    main(["--resume", str(run)])
    assert json.loads((run / "args.json").read_text())["args"]["bn"] == "batch" and (run / "report.html").exists()


# Flags


def test_defaults(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(search_cli, "run_search", lambda search, setup, *_: seen.update(vars(setup.args), setup=setup))
    main(["--dataset", "digits", "--device", "cpu", "--init_channels", "4"])
    expected = dict(
        batch_size=64, valid_batch_size=1024, epochs=50, pop_size=50, tsize=10, num_elites=1, mutate_rate=0.1, seed=18,
        learning_rate=0.025, learning_rate_min=0.001, momentum=0.9, weight_decay=3e-4, grad_clip=5, num_cells=5,
        max_nodes=4, track_running_stats=False, bn="running", valid_transform="test", cutout=False, workers=2,
    )  # fmt: skip
    assert expected.items() <= seen.items()
    setup = seen["setup"]
    space, network, train, valid = setup.space, setup.network, setup.train_loader, setup.valid_loader
    assert space.nesterov and len(network.cells) == 17 and (train.cutout, valid.augment) == (0, False)
    norms = {name: m.track_running_stats for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(tracked is ("edges" not in name) for name, tracked in norms.items())
    main(["--dataset", "digits", "--device", "cpu", "--init_channels", "4", "--cutout", "--track_running_stats"])
    norms = [m.track_running_stats for m in seen["setup"].network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norms) and len(norms) == 15 * 6 * 2 + 1 + 4 + 1
    assert seen["setup"].train_loader.cutout == 4  # 16, held to a quarter of a digit's image


@pytest.mark.parametrize("variant", ["rand", "nd", "ndt", "ndf", "mut", "cross"])
def test_variants(tmp_path, table, variant):
    run = s2_search(tmp_path, "--variant", variant, "--api_path", table(), "--epochs", 2)
    entries = history(run)
    assert ("fitness_best" in entries[0]) == (variant != "rand")
    assert entries[1]["best_genotype"] in S2_ARCHS and "kendall_tau" in entries[1]


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_fitness_leaves_batch_norm_buffers_untouched(tmp_path, monkeypatch, bn):
    measure, checked = search_space.measure_fitness, []

    def check(network, *rest, **more):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        fitness = measure(network, *rest, **more)
        assert same(before, dict(network.state_dict())) and network.training
        assert rest[2] == bn
        checked.append(fitness)
        return fitness

    monkeypatch.setattr(search_space, "measure_fitness", check)
    s2_search(tmp_path, "--bn", bn, "--epochs", 2)
    assert len(checked) == 3  # two generations, and at the end the random architectures


def test_no_running_statistics_and_no_momentum(tmp_path):
    run = s2_search(tmp_path, "--momentum", 0, "--epochs", 1)
    names = torch.load(run / "weights/weights.pt", weights_only=True)
    assert {name.split(".")[0] for name in names if "running" in name} == {"stem", "cells", "lastact"}
    assert not any("edges" in name and "running" in name for name in names)


# ---- summary and shell script


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
    """summary.json and the printed summary agree with the histories of three runs of two generations with a table."""
    result = json.loads((folder / "summary.json").read_text())
    entries = [history(folder / name) for name in names]
    assert [len(lines) for lines in entries] == [2, 2, 2]
    assert [run["best_genotype"] for run in result["runs"]] == [lines[-1]["best_genotype"] for lines in entries]
    tests = [lines[-1]["true_accuracy"]["cifar10"]["test"] for lines in entries]
    row = result["accuracy"]["cifar10_test"]
    assert row["searched"] == pytest.approx({"mean": np.mean(tests), "std": np.std(tests, ddof=1)})
    assert row["published"] is None and row["optimum"] == S2_TRUTH[:, 1].max()
    assert row["space_mean"] == pytest.approx(S2_TRUTH[:, 1].mean())
    assert result["seconds"]["mean"] == pytest.approx(np.mean([sum(e["seconds"] for e in lines) for lines in entries]))
    assert f"{np.mean(tests):.2f} ± {np.std(tests, ddof=1):.2f}" in out and "Kendall's tau" in out
    assert "± 1.11" not in out and "20249.7" not in out  # published searches were not on digits
    beaten = [int((S2_TRUTH[:, 1] > test).sum()) for test in tests]
    assert row["beaten_by"] == beaten and f"{beaten[0]}, {beaten[1]}, {beaten[2]} of 15,625" in out
    assert row["space_best_of_10"] < row["space_best_of_50"] < row["optimum"] and row["space_most_parameters"] > 0
    assert -1 <= result["kendall_tau_random_fitness"]["mean"] <= 1 and "true accuracy (cifar10 valid), rank" in out
    assert result["runs"][1]["kendall_tau_by_generation"] == [entry["kendall_tau"] for entry in entries[1]]


def test_summary_has_the_figures_of_three_histories(tmp_path, table, capsys):
    names = [f"search-digits-seed{seed}" for seed in summary.SEEDS]
    for seed, name in zip(summary.SEEDS, names, strict=True):
        s2_search(tmp_path, "--api_path", table(), "--epochs", 2, "--seed", seed, "--run_name", name)
    capsys.readouterr()
    summary.main([str(tmp_path), "digits"])
    assert_summary(tmp_path, names, capsys.readouterr().out)


@pytest.mark.slow
def test_script_skips_finished_runs_and_continues_the_others(tmp_path, table, monkeypatch):
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

    for name in ("utils", "numpy", "train_search"):  # what lies where the script is called is not run
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "linked.sh").symlink_to(ROOT / "searchNAS201.sh")
    monkeypatch.chdir(tmp_path)
    out = shell("digits", "cpu", folder, *tiny, "--api_path", path, script=tmp_path / "linked.sh").stdout
    assert f"{names[0]} is finished" in out and (folder / names[0] / "history.jsonl").read_bytes() == finished
    assert "generation 1/2" in (folder / names[1] / "log.txt").read_text()
    assert_summary(folder, names, out)


def test_summary_without_a_table_shows_published_figures_of_the_searched_data_set(tmp_path, capsys):
    """The three runs have two names each, so that they can pass for searches on CIFAR-100."""
    for seed in summary.SEEDS:
        flags = ["--epochs", 1, "--seed", seed, "--run_name", f"search-digits-seed{seed}"]
        s2_search(tmp_path, *flags)
        (tmp_path / f"search-cifar100-seed{seed}").symlink_to(tmp_path / f"search-digits-seed{seed}")
    for dataset in ("digits", "cifar100"):
        capsys.readouterr()
        summary.main([str(tmp_path), dataset])
        out = capsys.readouterr().out
        result = json.loads((tmp_path / "summary.json").read_text())
        for name, row in result["accuracy"].items():
            assert row["searched"] == {"mean": None, "std": None}
            assert (row["published"] is None) == (not name.startswith(dataset))
        assert result["accuracy"]["cifar10_test"]["optimum"] == 94.37 and "Kendall" not in out
        assert "--api_path" in out
        assert ("66.74 ± 3.08" in out) == ("20249.7" in out) == (dataset == "cifar100") and "92.18 ± 1.11" not in out


def test_the_benchmark_is_looked_for_where_the_published_script_had_it(tmp_path, monkeypatch, table, capsys):
    monkeypatch.chdir(tmp_path)
    run = s2_search(Path("."), "--epochs", 1)
    assert capsys.readouterr().out.count("--api_path") == 1
    (run / "report.html").unlink()
    monkeypatch.setattr("nas201.train_search.PUBLISHED_TABLE", os.path.relpath(table()))
    main(["--resume", str(run)])  # a run keeps to what it was started with
    assert "--api_path" not in capsys.readouterr().out and "truth" not in history(run)[0]
    main([*S2_SEARCH_LINE, "--epochs", "1", "--run_name", "found"])
    assert history(tmp_path / "found")[0]["truth"] == "cifar10 valid"
    main([*S2_SEARCH_LINE, "--epochs", "1", "--run_name", "none", "--api_path", ""])
    assert "truth" not in history(tmp_path / "none")[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digits", "cpu"], "usage"),
        (["mnist", "cpu", "out"], "mnist"),
        (["digits", "cpu", "out", "--seed", "3"], "--seed"),
        (["digits", "cpu", "out", "--dir=x"], "--dir"),
    ],
)
def test_script_refuses_bad_arguments(words, expected):
    done = shell(*words, check=False)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1


# Bad input


def test_bad_arguments(fails, table, tmp_path_factory):
    other = tmp_path_factory.mktemp("bad")
    bad_table, split, damaged = other / "table.csv", other / "split.txt", other / "bench.pth"
    bad_table.write_text("\n".join(table().read_text().splitlines()[:-1]))
    split.write_text('{"train": ["int", ["1"]], "valid": ["int", ["1"]]}')
    damaged.write_bytes(b"PK\x03\x04 no archive")
    for flags, words in (
        (["--api_path", bad_table], "15624"),
        (["--api_path", other / "absent.csv"], "absent.csv"),
        (["--api_path", damaged], "bench.pth"),
        (["--split_file", split], "--split_file and --split fixed are for"),
        (["--split", "fixed"], "not for digits"),
        (["--dataset", "ImageNet16-120", "--data", other], "train_data_batch_1"),
        (["--dataset", "folder", "--data", other / "nowhere"], "nowhere"),
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
        (["--resume", other], "args.json"),
    ):
        assert words in fails(main, [*S2_SEARCH_LINE, *flags])


def test_summary_refuses_an_unfinished_run(fails, tmp_path):
    assert "search-digits-seed18" in fails(summary.main, [tmp_path, "digits"])
