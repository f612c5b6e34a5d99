"""Accuracy by class and the confusion matrix, which a test prints and saves."""

import argparse
import json
import re

import numpy as np
import pytest
import torch

import class_results
import test_cifar
import train
import training
from datasets import load_digits
from reporting import report
from views import VIEWS

from helpers import retrain

pytestmark = pytest.mark.usefixtures("quick_report")
CONFUSION = torch.tensor([[8, 2, 0], [0, 0, 0], [1, 4, 5]])
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_reports):
    return retrain(tmp_path_factory.mktemp("retrained"), epochs=1)


def test_accuracy_by_class_is_the_share_of_correct_answers():
    assert class_results.accuracy_by_class(CONFUSION) == [80, None, 50]


def test_lines_name_each_class_and_its_most_frequent_mistake():
    _, ant, cat = class_results.lines(CLASSES, CONFUSION)
    assert re.search(r"ant +80\.00 % of 10; 2 taken for bee", ant)
    assert re.search(r"cat +50\.00 % of 10; 4 taken for bee", cat)


def test_of_many_classes_only_the_worst_are_printed():
    confusion = torch.diag(torch.arange(1, 31))
    confusion[3, 4] = 100
    _, *lines = class_results.lines([f"class {i}" for i in range(30)], confusion)
    assert len(lines) == class_results.WORST
    assert "class 3" in lines[0]


def test_confusion_counts_the_answers_of_the_network():
    torch.manual_seed(0)
    x = torch.randn(50, 7)
    y = torch.randint(4, (50,))
    network = torch.nn.Linear(7, 4)
    confusion = torch.ones(4, 4, dtype=torch.int64)  # counts are added to what is there
    loader = [(x[:30], y[:30]), (x[30:], y[30:])]
    module = torch.nn.Sequential(network)
    module.forward = lambda x: (network(x), None)
    args = argparse.Namespace(amp=False, report_freq=10)
    training.evaluate(module, loader, args, log=print, confusion=confusion)
    answers = network(x).argmax(1)
    expected = np.ones((4, 4), int)
    np.add.at(expected, (y.numpy(), answers.numpy()), 1)
    assert confusion.tolist() == expected.tolist()


def test_retraining_saves_the_test_of_its_last_epoch(run):
    result = json.loads((run / "test.json").read_text())
    last = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    assert (result["top1"], result["loss"]) == (last["test_top1"], last["test_loss"])
    assert np.trace(result["confusion"]) / result["images"] * 100 == pytest.approx(result["top1"])
    assert result["images"] == len(load_digits(None, "test"))
    assert result["classes"] == [str(digit) for digit in range(10)]


def test_test_script_saves_the_same(run, capsys):
    before = json.loads((run / "test.json").read_text())
    (run / "test.json").unlink()
    test_cifar.main(["--dir", str(run)])
    after = json.loads((run / "test.json").read_text())
    assert after["confusion"] == before["confusion"]
    assert "accuracy by class" in capsys.readouterr().out


def test_report_shows_accuracy_by_class(run):
    page = open(report.write_report(run, VIEWS)).read()
    assert "Accuracy by class" in page
    assert "test.json" not in page


@pytest.mark.parametrize("content", ["[]", "{}", '{"classes": [1], "confusion": 3}'])
def test_report_notes_a_damaged_file(tmp_path, run, content):
    before = (run / "test.json").read_text()
    (run / "test.json").write_text(content)
    page = open(report.write_report(run, VIEWS)).read()
    (run / "test.json").write_text(before)
    assert "test.json is damaged" in page


def test_folder_that_cannot_be_written_is_noted(tmp_path, capsys):
    class_results.save(tmp_path / "no/folder", {}, CLASSES, CONFUSION, weights="w", dataset="d")
    assert "not saved" in capsys.readouterr().out


def test_lost_file_of_a_finished_retraining_is_made_again(run):
    before = json.loads((run / "test.json").read_text())
    (run / "test.json").unlink()
    train.main(["--resume", str(run)])
    assert json.loads((run / "test.json").read_text())["confusion"] == before["confusion"]
