"""Runs that begin with the weights of another run: `--init_from` of searches, `--init_weights` of retrainings."""

import json
import shutil

import pytest
import torch

import nas201.train_search
import remembered
import train
import train_search
from support.weights import read_state

from helpers import (
    assert_same_run,
    load_checkpoint,
    populations,
    retrain,
    retrained_run,
    search,
    search_line,
    train_line,
)

pytestmark = pytest.mark.usefixtures("quick_report", "tiny_supernet")
FROZEN = {"learning_rate": 0, "learning_rate_min": 0, "weight_decay": 0}  # parameters stay as they begin

STILL = {"learning_rate": 0, "weight_decay": 0}


@pytest.fixture(scope="module")
def first(tmp_path_factory, quick_reports, tiny_supernet):
    return search(tmp_path_factory.mktemp("first"), "--plain", epochs=1, baselines=0)


def parameters(state):
    return {name: value for name, value in state.items() if "running" not in name and "num_batches" not in name}


def assert_equal(state, expected, but=()):
    state = parameters(state)
    expected = parameters(expected)
    for name, value in state.items():
        if name not in but:
            assert torch.equal(value, expected[name]), name


def rows(alphas):
    return sorted(alphas.flatten(1).tolist())


# ---- searches


def test_search_begins_with_weights_and_population_of_another(tmp_path, first):
    run = search(tmp_path, "--plain", epochs=1, baselines=0, init_from=first, **FROZEN)
    assert_equal(read_state(run / "weights/weights.pt"), read_state(first / "weights/weights.pt"))
    assert rows(populations(run)[0][0]) == rows(populations(first)[-1][0])


def test_search_from_another_resumes_without_it(tmp_path, first):
    source = shutil.copytree(first, tmp_path / "source")
    expected = search(tmp_path, "--plain", epochs=2, baselines=0, init_from=source)
    run = shutil.copytree(expected, tmp_path / "copy")
    (run / "checkpoint.prev.pt").rename(run / "checkpoint.pt")  # after generation 1
    shutil.rmtree(source)
    train_search.main(["--resume", str(run)])
    assert load_checkpoint(run / "checkpoint.pt")["completed"] == 2
    assert_same_run(run, expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"pop_size": 3}, "--pop_size"), ({"init_from": "nowhere"}, "nowhere")],
)
def test_search_that_does_not_fit_is_refused_before_it_begins(tmp_path, first, fails, changes, named):
    line = search_line(dir=tmp_path / "new", **{"init_from": first, **changes})
    assert named in fails(train_search.main, line)
    assert not (tmp_path / "new").exists()


def test_search_takes_over_the_settings_of_the_other_one(tmp_path, first):
    """All but the device and the names of folders; here --epochs is another."""
    train_search.main(["--init_from", str(first), "--dir", str(tmp_path), "--run_name", "new", "--epochs", "2"])
    before, after = (json.loads((run / "args.json").read_text())["args"] for run in (first, tmp_path / "new"))
    changed = {name for name, value in after.items() if value != before[name]}
    assert changed == {"dir", "run_name", "device", "init_from", "epochs"}


def test_another_seed_is_noted(first, capsys):
    words = ["--init_from", str(first), "--seed", "5"]
    assert remembered.with_settings_of_search(train_search.make_parser(), words)[-4:] == words
    assert "note: another --seed" in capsys.readouterr().err


def test_search_of_the_other_space_is_refused_before_it_reads_images(first, fails):
    fails(nas201.train_search.main, ["--init_from", first], "not a search of python -m nas201.train_search")


def test_more_generations_than_a_run_was_started_with_are_refused_with_the_remedy(first, fails):
    fails(train_search.main, ["--resume", first, "--epochs", "9"], "Leave the argument out", f"--init_from {first}")


# ---- retrainings


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of EvNASB for three classes, in the size of a tiny retraining."""
    folder = tmp_path_factory.mktemp("retrained")
    retrained_run(folder, "cifar", None)
    return folder / "weights/weights.pt"


def test_retraining_begins_with_weights_and_a_fresh_classifier(tmp_path, weights, capsys):
    run = retrain(tmp_path, epochs=1, init_weights=weights, **STILL)
    found = read_state(run / "weights/weights.pt")
    assert_equal(found, read_state(weights), but=("classifier.weight", "classifier.bias"))
    assert len(found["classifier.bias"]) == 10
    assert "fresh because they do not fit: classifier" in capsys.readouterr().out


def test_retraining_with_the_same_classes_keeps_the_classifier(tmp_path, capsys):
    first = retrain(tmp_path / "first", epochs=1)
    run = retrain(tmp_path / "second", epochs=1, init_weights=first / "weights/weights.pt", **STILL)
    assert_equal(read_state(run / "weights/weights.pt"), read_state(first / "weights/weights.pt"))
    assert "fresh" not in capsys.readouterr().out


def test_weights_of_another_cell_are_refused(tmp_path, weights, fails):
    line = train_line(dir=tmp_path / "new", arch="EvNASA", init_weights=weights)
    assert "weights.pt" in fails(train.main, line)
    assert not (tmp_path / "new").exists()
