"""--rank_all: the fitness of all architectures on the final weights. Here a space of 12 stands for all."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import nas201.train_search
from nas201 import encoding, rank_all
from support import clock

from helpers import S2_ARCHS, S2_TRUTH, STOP, s2_search, stop_at, write_table

pytestmark = pytest.mark.usefixtures("quick_report")
FEW = 12


ALL = rank_all.all_alphas()


def make_few(patch):
    alphas = ALL[:: len(ALL) // FEW + 1]
    patch.setattr(rank_all, "all_alphas", lambda: alphas)
    patch.setattr(rank_all, "PART", 5)
    return alphas


@pytest.fixture(autouse=True)
def few(monkeypatch):
    return make_few(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick_reports):
    """A search that measured all architectures without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        make_few(patch)
        return s2_search(tmp_path_factory.mktemp("whole"), "--epochs", 1, "--rank_all")


@pytest.fixture
def searched(whole, tmp_path):
    """The same search, which has not measured all architectures yet."""
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("all_architectures.*")))


def read(run):
    with open(run / rank_all.TABLE, newline="") as file:
        return list(csv.DictReader(file))


def test_every_architecture_is_there_once():
    archs = [encoding.arch_string(alphas) for alphas in ALL]
    assert sorted(archs) == sorted(S2_ARCHS)


def test_table_has_fitness_and_truth_of_every_architecture(tmp_path, few):
    run = s2_search(tmp_path, "--epochs", 1, "--rank_all", "--api_path", write_table(tmp_path))
    rows = read(run)
    assert [row["cell"] for row in rows] == [encoding.arch_string(alphas) for alphas in few]
    truth = [S2_TRUTH[S2_ARCHS.index(row["cell"]), 0] for row in rows]
    assert [float(row["cifar10_valid"]) for row in rows] == truth
    result = json.loads((run / rank_all.RESULT).read_text())
    fitness = [float(row["fitness"]) for row in rows]
    assert result["architectures"] == FEW
    assert result["truth"] == "cifar10 valid"
    assert result["kendall_tau"] == pytest.approx(stats.kendalltau(fitness, truth).statistic)
    assert not (run / rank_all.PARTIAL).exists()


@pytest.mark.slow
def test_architectures_see_the_images_of_the_last_measurement(searched, monkeypatch):
    """So an individual of the last population has the fitness that individuals.csv gives it."""
    with open(searched / "individuals.csv", newline="") as file:
        final = {row["cell"]: row["fitness"] for row in csv.DictReader(file) if row["weights"] == "final"}
    chosen = [alphas for alphas in ALL if encoding.arch_string(alphas) in final]
    monkeypatch.setattr(rank_all, "all_alphas", lambda: torch.stack(chosen))
    nas201.train_search.main(["--resume", str(searched), "--rank_all"])
    assert {row["cell"]: row["fitness"] for row in read(searched)} == final


@pytest.mark.slow
def test_interrupted_measurement_continues(whole, searched):
    again = ["--resume", str(searched), "--rank_all"]
    stop_at("all architectures, 5 of 12: batch 0", STOP, nas201.train_search.main, again)
    saved = np.load(searched / rank_all.PARTIAL)["fitness"]
    assert np.isnan(saved).sum() == FEW - 5
    nas201.train_search.main(again)
    assert read(searched) == read(whole)


def test_each_minute_a_line_tells_how_far_it_is(searched, monkeypatch, capsys):
    monkeypatch.setattr(clock, "MINUTE", 1e-9)
    nas201.train_search.main(["--resume", str(searched), "--rank_all"])
    lines = re.findall(r"^fitness of (\d+) architectures; ", capsys.readouterr().out, flags=re.MULTILINE)
    assert lines == ["5", "10", "12"]


@pytest.mark.parametrize("content", [pytest.param(b"", marks=pytest.mark.slow), b"damaged", None])
def test_partial_file_of_another_measurement_is_ignored(whole, searched, content):
    if content is None:
        np.savez(searched / rank_all.PARTIAL, fitness=np.full(FEW, 50.0), weights="of another search")
    else:
        (searched / rank_all.PARTIAL).write_bytes(content)
    nas201.train_search.main(["--resume", str(searched), "--rank_all"])
    assert read(searched) == read(whole)
