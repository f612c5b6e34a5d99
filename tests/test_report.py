"""Reports are self-contained pages that fit any window, whatever a run's files hold."""

import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

import genotypes
import nas201.report
from nas201.genotypes import PRIMITIVES
from nas201.report import NAS_BENCH_201
from reporting import cells as drawing
from reporting import report
from support.files import UserError, write_json
from views import DARTS, VIEWS

from chromium import Chromium
from helpers import REPORTED_ARCH, read_history, reported_run


def page_of(run_dir):
    """Write the report of a run and return the page, which must be valid and complete in itself."""
    path = report.write_report(run_dir, VIEWS)
    assert path == os.path.join(run_dir, "report.html")
    page = open(path, encoding="utf-8").read()
    for word in ("<script", "url(", "@import"):
        assert word not in page
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # not addresses
    assert set(re.findall(r"\w+://[^\"'<\s]*", page)) <= names
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)
    for svg in re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL):
        assert "nan" not in re.sub(r"<desc>.*?</desc>", "", svg).lower().replace("nanc", "")
        if 'role="img"' in svg:
            for word in ("<title>", "<desc>", 'aria-label="'):
                assert word in svg
    return page


def headings(page):
    """The titles of sections and charts."""
    return re.findall(r"<h2>(.*?)</h2>", page) + re.findall(r"<figcaption>(.*?) <small>", page)


def missing(page):
    """What the page says it lacks."""
    card = re.search(r"<div class='card missing'>.*?<ul>(.*?)</ul>", page, flags=re.DOTALL)
    return re.findall(r"<li>(.*?)</li>", card[1]) if card else []


class Written(NamedTuple):
    """A report with all charts."""

    path: Path
    page: str


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory):
    """`whole_report("search", "s1")` is the report of a whole run, written at the first call."""

    @functools.cache
    def write(kind, space):
        run = tmp_path_factory.mktemp("reported") / "run"
        reported_run(run, kind, space, steps=130 if kind == "eval" else 20)
        about = json.loads((run / "args.json").read_text())
        about["args"] |= {"epochs": 150, "dataset": "cifar10"}
        write_json(run / "args.json", about)
        return Written(run / "report.html", page_of(run))

    return write


def test_report_of_a_search_has_its_sections(whole_report):
    page = whole_report("search", "s1").page
    assert missing(page) == []
    assert headings(page) == [
        "Summary", "Best cell of the last generation", "Fitness and training", "Population", "Time", "Settings",
        "Fitness", "Training accuracy", "Training loss", "Operations, normal cell", "Operations, reduction cell",
        "Distinct architectures", "Time per generation", "Throughput", "Learning rate",
    ]  # fmt: skip


def test_report_has_the_figures_and_the_command_of_the_run(whole_report):
    page = whole_report("search", "s1").page
    assert "20 of 150" in page
    assert "python train_search.py &lt;&amp;&gt;" in page
    assert re.search(r"best: 61 [^;]* 80 ", page)  # the first and the last fitness
    assert "20 min 30 s" in page


def test_report_of_a_search_on_nas_bench_201_has_its_sections(whole_report):
    page = whole_report("search", "s2").page
    assert missing(page) == []
    assert {"True accuracy, CIFAR-10", "Rank correlation"} <= set(headings(page))
    assert not {"True accuracy, CIFAR-100", "True accuracy, ImageNet16-120"} & set(headings(page))
    assert REPORTED_ARCH in page
    assert "EvNAS, test" in page  # a line of the chart of the searched data set


@pytest.fixture
def accuracies(tmp_path, monkeypatch):
    """`accuracies(searched)`: the section's text, and how many horizontal lines each chart has."""
    levels_of = {}  # {title of a chart: number of its horizontal lines}

    def chart(rows, title, subtitle, lines, levels=()):
        levels_of[title] = len(levels)
        return title

    def write(searched):
        html = nas201.report.accuracy_section(rows, searched)
        return re.sub(r"<[^>]*>", " ", html), levels_of

    monkeypatch.setattr(nas201.report, "chart", chart)
    rows = read_history(reported_run(tmp_path / "run", space="s2"))
    return write


@pytest.mark.parametrize(
    "searched, name, figures",
    [
        ("cifar10", "CIFAR-10", r"CIFAR-10 test\s+91.23\s+92.18 ± 1.11\s+94.37\s+87.66\s+93.51"),
        ("cifar100", "CIFAR-100", r"CIFAR-100 valid\s+66.50\s+66.35 ± 2.59\s+73.49\s+59.00\s+71.14"),
    ],
)
def test_published_figures_are_those_of_the_searched_data_set(accuracies, searched, name, figures):
    text, levels = accuracies(searched)
    assert re.search(figures, text)
    assert levels == {f"True accuracy, {name}": 2, "Rank correlation": 0}  # the optimum and EvNAS


def test_search_on_other_images_has_no_published_search_to_compare_with(accuracies):
    text, levels = accuracies("digits")
    assert re.search(r"CIFAR-10 test\s+91.23\s+–\s+94.37\s+–", text)
    assert re.search(r"CIFAR-100 valid\s+66.50\s+–\s+73.49\s+–", text)
    del levels["Rank correlation"]
    assert list(levels.values()) == [1, 1, 1]  # the optimum


def test_report_of_a_retraining_has_its_sections(whole_report):
    page = whole_report("eval", "s1").page
    assert missing(page) == []
    assert {"Loss", "Top-1 accuracy", "Top-5 accuracy", "Cell"} <= set(headings(page))
    assert "Population" not in headings(page)
    assert "3.75" in page  # the test error


def test_operation_shares_are_those_of_the_genotypes(tmp_path):
    from encoding import genotype, random_alphas

    alphas = random_alphas(5)
    np.savez(tmp_path / "001.npz", alphas=alphas.numpy(), fitness=np.zeros(5))
    found = [genotype(a) for a in alphas]
    expected = {}
    for kind, name in (("normal", "normal cell"), ("reduce", "reduction cell")):
        chosen = [op for one in found for op, _ in getattr(one, kind)]
        expected |= {f"{name} {op}": 100 * chosen.count(op) / 40 for op in genotypes.PRIMITIVES}
    assert report.operation_shares(tmp_path / "001.npz", DARTS) == pytest.approx(expected)


def test_operation_shares_are_those_of_the_arch_string(tmp_path):
    np.savez(tmp_path / "002.npz", alphas=np.eye(5, dtype=np.float32)[[[[0, 3, 3, 3, 1, 0]]]], fitness=np.zeros(1))
    expected = {f"cell {op}": share for op, share in zip(PRIMITIVES, (100 / 3, 50 / 3, 0, 50, 0), strict=True)}
    assert report.operation_shares(tmp_path / "002.npz", NAS_BENCH_201) == pytest.approx(expected)


def test_operation_without_a_colour_is_in_the_chart():
    colours = {name: colour for name, colour in DARTS.colours.items() if name != "sep_conv_3x3"}
    rows = [{"generation": 1, "normal cell sep_conv_3x3": 40.0, "normal cell skip_connect": 60.0}]
    lines = report.operation_lines(rows, "normal cell", dataclasses.replace(DARTS, colours=colours))
    assert [(line.label, line.colour) for line in lines] == [("skip_connect", "green"), ("sep_conv_3x3", "line")]


def test_report_leaves_out_charts_without_a_finite_value(tmp_path):
    empty = dict(fitness_best=None, fitness_mean=None, fitness_std=None, lr=float("nan"))
    page = page_of(reported_run(tmp_path / "run", **empty))
    (note,) = missing(page)
    assert note.startswith("Fitness")
    assert "Throughput" in headings(page)
    assert not {"Fitness", "Learning rate"} & set(headings(page))


def test_report_names_populations_that_cannot_be_read(tmp_path, quick_report):
    folder = reported_run(tmp_path / "run")
    (folder / "population" / "002.npz").unlink()
    (folder / "population" / "003.npz").write_bytes(b"PK damaged")
    np.savez(folder / "population" / "004.npz", alphas=np.array([object()], dtype=object))
    (note,) = missing(page_of(folder))
    for words in ("2, 3, 4", "002.npz", "003.npz", "004.npz"):
        assert words in note
    assert "001.npz" not in note


def test_report_without_arguments_or_cell_uses_the_history(tmp_path, quick_report):
    folder = reported_run(tmp_path / "run")
    (folder / "args.json").write_text("{")
    (folder / "genotype.json").unlink()
    page = page_of(folder)
    of_arguments, of_cell = missing(page)
    assert "args.json" in of_arguments
    assert "genotype.json" in of_cell
    assert "Best cell of the last generation" in headings(page)


@pytest.mark.parametrize("cell, named", [('{"arch": 3}', "genotype.json"), (None, "history.jsonl")])
def test_report_says_that_a_cell_cannot_be_drawn(tmp_path, quick_report, cell, named):
    folder = reported_run(tmp_path / "run", best_genotype={"normal": 1})
    (folder / "genotype.json").unlink()
    if cell:
        (folder / "genotype.json").write_text(cell)
    (note,) = missing(page_of(folder))
    assert named in note


@pytest.mark.parametrize("history", [None, "\n"])
def test_report_without_a_generation_says_so(tmp_path, quick_report, history):
    folder = reported_run(tmp_path / "run")
    (folder / "history.jsonl").unlink()
    if history:
        (folder / "history.jsonl").write_text(history)
    (note,) = missing(page_of(folder))
    assert "history.jsonl" in note


def test_report_refuses_a_malformed_history_with_its_line(tmp_path):
    folder = reported_run(tmp_path / "run")
    good = (folder / "history.jsonl").read_text()
    bad = [
        *("{", "[]", "null", "{}", "[" * 100_000),
        *(f'{{"generation": {v}}}' for v in ("0", '"5"', "true", "1e400")),
    ]
    bad += ['{"epoch": 5}', '{"generation": 5, "seconds": "long"}', '{"generation": 5, "lr": [1]}']
    for line in bad:
        (folder / "history.jsonl").write_text(good + line + "\n")
        with pytest.raises(UserError, match="history.jsonl.*5") as error:
            report.write_report(folder, VIEWS)
        assert "\n" not in str(error.value)


def test_odd_figures_do_not_break_a_report(tmp_path):
    odd = dict(true_accuracy=[1], distinct=1e300, seconds=-1, lr=0)
    page = page_of(reported_run(tmp_path / "run", space="s2", steps=1, **odd))
    assert "Learning rate" in headings(page)
    assert "Distinct architectures" not in headings(page)


@pytest.mark.parametrize("arguments", [[1], {"epochs": ["<b>"], "dataset": {}}], ids=["a list", "odd values"])
def test_odd_arguments_do_not_break_a_report(tmp_path, quick_report, arguments):
    folder = reported_run(tmp_path / "run", space="s2", steps=1)
    odd = {"versions": {"\ud800": "\x01"}, "space": ["s2"], "kind": {}, "command": 7, "git": []}
    write_json(folder / "args.json", {"args": arguments, **odd})
    assert "<b>" not in page_of(folder).replace("<td><b>", "")


def test_drawing_that_fails_does_not_end_a_run(tmp_path, monkeypatch):
    lines = []
    run = SimpleNamespace(writes=True, path=tmp_path, log=lines.append)
    monkeypatch.setattr(drawing, "cell_svg", lambda cell: 1 / 0)
    report.finish_run(run, genotypes.EvNASA, DARTS)
    (line,) = lines
    assert "ZeroDivisionError" in line
    assert f"--report {tmp_path}" in line


# ---- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip("no Chromium or Chrome on this machine: the reports are not looked at in a browser")
    browser = Chromium(binary, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


class Opened(NamedTuple):
    """A report in the browser, with everything unfolded."""

    url: str
    width: int  # of the window, in pixels
    events: list[dict]  # what the browser told while it loaded the page
    value: Callable[[str], object]  # evaluates JavaScript

    def told(self, *methods):
        return [event["params"] for event in self.events if event.get("method") in methods]


WINDOWS = [
    pytest.param((kind, space, width), marks=marks)
    for kind, space, marks in (
        ("search", "s1", []),
        ("search", "s2", pytest.mark.slow),
        ("eval", "s1", pytest.mark.slow),
    )
    for width in (1280, 390)
]


@pytest.fixture(scope="module", params=WINDOWS)
def opened(request, chromium, whole_report):
    kind, space, width = request.param
    url = f"file://{whole_report(kind, space).path}"
    events = list(chromium.open(url, width))
    chromium.value("document.querySelectorAll('details').forEach(d => d.open = true)||0")
    return Opened(url, width, events, chromium.value)


def test_browser_loads_nothing_else_and_reports_no_error(opened):
    asked = {told["request"]["url"] for told in opened.told("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:")} == {opened.url}
    wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
    assert opened.told(*wrong) == []


def test_page_is_no_wider_than_the_window(opened):
    assert opened.value("innerWidth") == opened.width
    assert opened.value("document.documentElement.scrollWidth") <= opened.width


def test_text_of_pictures_is_large_enough_on_the_screen(opened):
    smallest = """Math.min(...[...document.querySelectorAll('svg text')].map(t =>
        parseFloat(getComputedStyle(t).fontSize) * t.getCTM().a))"""
    assert opened.value(smallest) >= 9  # pixels


def test_text_of_pictures_is_inside_them(opened):
    outside = """[...document.querySelectorAll('svg[role=img] text')].filter(t => {
        const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1
    }).map(t => t.textContent)"""
    assert opened.value("document.querySelectorAll('svg[role=img] text').length") > 20
    assert opened.value(outside) == []


def test_labels_of_cells_fit_their_boxes_in_the_browsers_font(opened):
    spilt = """[...document.querySelectorAll('g.node, g.op')].map(box => [box, box.nextElementSibling])
        .filter(([box, text]) => text.getBBox().width > box.getBBox().width - 4)
        .map(([box, text]) => text.textContent)"""
    assert opened.value("document.querySelectorAll('g.node, g.op').length") >= 10
    assert opened.value(spilt) == []
