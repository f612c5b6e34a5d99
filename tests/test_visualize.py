"""Cells are drawn without overlaps, reports are self-contained pages, and bad input is one line."""

import dataclasses
import fcntl
import functools
import io
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

import genotype_files
import genotypes
import nas201.report
import visualize
from nas201.genotypes import PRIMITIVES
from nas201.report import NAS_BENCH_201
from reporting import cells as drawing
from reporting import report
from reporting.views import Drawing, Edge, drawings_of
from support.files import UserError, write_json
from views import DARTS, VIEWS

from helpers import REPORTED_ARCH, read_history, reported_run

SVG = "{http://www.w3.org/2000/svg}"


def random_genotype(seed):
    rng = random.Random(seed)
    cells = []
    for _ in range(2):
        nodes = rng.choice((1, 2, 4, 4, 5, 7))
        pairs = [(rng.choice(genotypes.OPERATIONS), rng.randrange(i // 2 + 2)) for i in range(2 * nodes)]
        cells += [pairs, sorted(rng.sample(range(2, nodes + 2), rng.randint(1, nodes)))]
    return genotype_files.validate(genotypes.Genotype(*cells))


def random_arch(seed, nodes=3):
    rng = random.Random(seed)
    node = ("|".join(f"{rng.choice(PRIMITIVES)}~{i}" for i in range(n)) for n in range(1, nodes + 1))
    return "+".join(f"|{text}|" for text in node)


def largest_genotype():
    """A cell with as many nodes as a genotype file may have."""
    rng = random.Random(0)
    pairs = [(rng.choice(genotypes.OPERATIONS), rng.randrange(i // 2 + 2)) for i in range(40)]
    return genotype_files.validate(genotypes.Genotype(pairs, [2], pairs, list(range(2, 22))))


ARCHITECTURES = {
    **{name: cell for name, cell in genotypes.NAMED.items() if name != "DARTS"},  # which is DARTS_V2
    **{f"genotype {seed}": random_genotype(seed) for seed in range(12)},
    **{f"arch {seed}": random_arch(seed) for seed in range(5)},
    "largest": largest_genotype(),
}
DRAWN_FAST = ("EvNASA", "genotype 0", "arch 0", "largest")  # slow tests draw the others


# ---- cells


class Box(NamedTuple):
    """A node or operation of a drawing, in points. The vertical axis points down."""

    kind: str  # "node" or "op"
    text: str
    text_x: float  # middle of the text
    text_y: float  # its base line
    left: float
    top: float
    right: float
    bottom: float


class Line(NamedTuple):
    """A line of a drawing, from its first end to its second one."""

    x0: float
    y0: float
    x1: float
    y1: float
    marked: bool  # whether it has a dot or an arrow


class Drawn(NamedTuple):
    """A cell, and what its drawing has."""

    cell: Drawing
    width: float
    height: float
    boxes: list[Box]
    lines: list[Line]


def draw(cell):
    """Draw a cell and read its SVG."""
    root = ElementTree.fromstring(drawing.cell_svg(cell))
    width, height = (float(root.get(key).removesuffix("pt")) for key in ("width", "height"))
    axes = next(group for group in root.iter(f"{SVG}g") if group.get("class") == "axes")
    boxes, lines = [], []
    for group, following in zip(axes, [*axes[1:], None], strict=True):
        kind, path = group.get("class"), group.find(f"{SVG}path")
        numbers = [] if path is None else [float(v) for v in re.findall(r"-?[\d.]+", path.get("d"))]
        xs, ys = numbers[::2], numbers[1::2]
        if kind in ("node", "op"):
            text = following.find(f"{SVG}text")
            at = float(text.get("x")), float(text.get("y"))
            boxes.append(Box(kind, text.text, *at, min(xs), min(ys), max(xs), max(ys)))
        elif kind == "line2d":
            lines.append(Line(*numbers, marked=group.find(f".//{SVG}use") is not None))
    return Drawn(cell, width, height, boxes, lines)


@pytest.fixture(
    scope="module",
    params=[name if name in DRAWN_FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
def drawings(request):
    """The drawings of one architecture: two of a genotype, one of an arch string."""
    name = request.param
    return [draw(cell) for cell in drawings_of(ARCHITECTURES[name], VIEWS, name).values()]


def test_text_fits_into_its_box(drawings):
    for drawn in drawings:
        for box in drawn.boxes:
            half = len(box.text) * drawing.LETTER / 2
            assert box.left <= box.text_x - half
            assert box.text_x + half <= box.right
            assert box.top + 8 <= box.text_y <= box.bottom - 4  # cap height above, descenders below


def test_drawing_has_every_operation_and_node(drawings):
    """Parallel edges have a label each."""
    for cell, _, _, boxes, _ in drawings:
        labels = sorted(box.text for box in boxes if box.kind == "op" and box.text != "concat")
        assert labels == sorted(op for _, _, op in cell.edges)
        nodes = {node for source, target, _ in cell.edges for node in (source, target)} | set(cell.inputs)
        nodes |= {"c_{k}"} if cell.concat else set()
        assert sorted(box.text for box in boxes if box.kind == "node") == sorted(nodes)


def test_boxes_are_on_the_page_and_apart(drawings):
    for _, width, height, boxes, _ in drawings:
        for i, box in enumerate(boxes):
            assert 0 <= box.left
            assert box.right <= width
            assert drawing.TITLE <= box.top
            assert box.bottom <= height
            for other in boxes[:i]:
                apart = other.left - box.right, box.left - other.right, other.top - box.bottom, box.top - other.bottom
                assert max(apart) >= 8, (box.text, other.text)


def test_lines_never_enter_a_box(drawings):
    """They may end at one."""
    for drawn in drawings:
        for x0, y0, x1, y1, _ in drawn.lines:
            for box in drawn.boxes:
                beside = max(box.left - max(x0, x1), min(x0, x1) - box.right)
                above_or_below = max(box.top - max(y0, y1), min(y0, y1) - box.bottom)
                assert max(beside, above_or_below) >= -0.2, (box.text, x0, y0, x1, y1)


def test_lines_do_not_lie_on_each_other(drawings):
    """Lines of two sources may cross. Those into the concatenation share the last row."""
    for cell, _, _, _, lines in drawings:
        last_row = max(line.y1 for line in lines)
        for i, (x0, y0, x1, y1, _) in enumerate(lines):
            for ox0, oy0, ox1, oy1, _ in lines[:i]:
                if y0 == y1 == oy0 == oy1 and min(x1, ox1) > max(x0, ox0):
                    assert cell.concat
                    assert y0 == last_row
                if x0 == x1 == ox0 == ox1:
                    assert min(y1, oy1) <= max(y0, oy0)


def test_lines_are_horizontal_with_a_mark_or_vertical_without(drawings):
    """The mark is a dot where a line turns, or an arrow where it ends."""
    for drawn in drawings:
        for line in drawn.lines:
            if line.marked:
                assert line.y0 == line.y1
            else:
                assert line.x0 == line.x1


def near(a, b):
    return abs(a - b) < 0.2


def target_of(drawn, operation):
    """The node to which the arrow behind an operation leads."""
    y = (operation.top + operation.bottom) / 2
    (arrow,) = [line for line in drawn.lines if near(line.x0, operation.right) and near(line.y0, y)]
    assert near(arrow.y1, y)
    nodes = [box for box in drawn.boxes if box.kind == "node" and box.top < y < box.bottom]
    (target,) = [node.text for node in nodes if near(arrow.x1 + drawing.ARROW / 2, node.left)]
    return target


def sources_of(drawn, operation):
    """The nodes from which lines go down, without a gap, and turn into the row of an operation."""
    y = (operation.top + operation.bottom) / 2
    found = []
    for x in [line.x0 for line in drawn.lines if near(line.x1, operation.left) and near(line.y1, y)]:
        nodes = [box for box in drawn.boxes if box.kind == "node"]
        (source,) = [node for node in nodes if near((node.left + node.right) / 2, x)]
        reached = source.bottom
        for line in sorted(line for line in drawn.lines if line.x0 == line.x1 == x):
            reached = max(reached, line.y1) if line.y0 <= reached + 0.2 else reached
        assert reached >= y - 0.2
        found.append(source.text)
    return found


def test_lines_connect_what_the_cell_says(drawings):
    for drawn in drawings:
        found = []
        for operation in [box for box in drawn.boxes if box.kind == "op"]:
            target = target_of(drawn, operation)
            found += [(source, target, operation.text) for source in sources_of(drawn, operation)]
        concat = [(node, "c_{k}", "concat") for node in drawn.cell.concat]
        assert sorted(found) == sorted(drawn.cell.edges + concat)


def luminance_of(colour, dark):
    """WCAG's relative luminance + 0.05 of "#rrggbb", after the filters of DARK_CSS if `dark`."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    if dark:
        amount = float(re.search(r"invert\(([.\d]+)\) hue-rotate\(180deg\)", drawing.DARK_CSS)[1])
        rgb = amount + rgb * (1 - 2 * amount)
        grey = np.tile([0.213, 0.715, 0.072], (3, 1))
        rgb = ((2 * grey - np.eye(3)) @ rgb).clip(0, 1)  # hue-rotate's matrix, at 180 degrees
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722] + 0.05


SIMPLE = Drawing('A <b> & "c"', [Edge("c_{k-2}", "0", "skip_connect")], DARTS.colours, concat=["0"])


def test_drawing_takes_any_name_of_a_file():
    strange = drawings_of(REPORTED_ARCH, VIEWS, "\x01\udcff <b>")["cell"]
    root = ElementTree.fromstring(drawing.cell_svg(strange).encode())
    assert root.get("aria-label") == "?? <b>: cell"
    png = io.BytesIO()
    drawing.cell_figure(strange).savefig(png, format="png")
    assert png.getvalue().startswith(b"\x89PNG")


def test_svg_has_a_text_alternative():
    root = ElementTree.fromstring(drawing.cell_svg(SIMPLE))
    assert root.get("role") == "img"
    assert root.get("aria-label") == SIMPLE.title
    assert root.find(f"{SVG}desc").text == "c_{k-2} to 0: skip_connect. The output c_{k} concatenates 0."


def test_equal_drawings_give_equal_bytes():
    assert drawing.cell_svg(SIMPLE) == drawing.cell_svg(SIMPLE)


def test_svg_has_its_own_background_and_only_colours_of_the_palette():
    svg = drawing.cell_svg(SIMPLE)
    root = ElementTree.fromstring(svg)
    assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text
    paper = next(root.iter(f"{SVG}path"))
    width, height = root.get("viewBox").split()[2:]
    assert "fill: #ffffff" in paper.get("style")
    assert paper.get("d").split()[:5] == ["M", "0", height, "L", width]
    used = set(re.findall(r"#[0-9a-f]{6}\b", svg.partition("<defs>")[2].replace("xlink:href", "")))
    assert used <= set(drawing.PALETTE.values())


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_palette_has_the_contrast_of_wcag(theme):
    luminance = {name: luminance_of(colour, theme == "dark") for name, colour in drawing.PALETTE.items()}
    for name, own in luminance.items():
        ratio = max(own, luminance["paper"]) / min(own, luminance["paper"])
        least = {"ink": 7, "soft": 4.5, "paper": 1, "rule": 1, "node": 1}.get(name, 3)  # WCAG: text 4.5, shapes 3
        assert ratio >= least, (name, ratio)
    ink, node = luminance["ink"], luminance["node"]
    assert max(ink, node) / min(ink, node) >= 7


def test_every_operation_has_a_colour():
    assert set(genotypes.OPERATIONS) <= set(DARTS.colours)
    assert set(PRIMITIVES) == set(NAS_BENCH_201.colours)


# ---- command line


def run(capsys, *argv):
    visualize.main([str(a) for a in argv])
    return capsys.readouterr().out.split("\n")[:-1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command_draws_a_named_cell(here, capsys):
    assert run(capsys, "EvNASA") == ["./EvNASA_normal.svg", "./EvNASA_reduce.svg"]
    assert "EvNASA: reduction cell" in (here / "EvNASA_reduce.svg").read_text()


def test_command_draws_a_file_into_output(here, capsys):
    genotype_files.save(genotypes.EvNASB, "mine.json")
    assert run(capsys, "mine.json", "--output", "out/deep") == ["out/deep/mine_normal.svg", "out/deep/mine_reduce.svg"]


def test_command_draws_a_run_into_its_folder(here, capsys):
    (here / "run").mkdir()
    genotype_files.save(genotypes.EvNASB, "run/genotype.pickle")
    assert run(capsys, "run") == ["run/cell_normal.svg", "run/cell_reduce.svg"]


def test_json_takes_precedence_over_pickle(here, capsys):
    (here / "run").mkdir()
    genotype_files.save(genotypes.EvNASB, "run/genotype.pickle")
    write_json("run/genotype.json", {"arch": REPORTED_ARCH})
    assert run(capsys, "run") == ["run/cell.svg"]


def test_command_draws_an_arch_string_like_its_file(here, capsys):
    assert run(capsys, REPORTED_ARCH) == ["./cell.svg"]
    (here / "run").mkdir()
    write_json("run/genotype.json", {"arch": REPORTED_ARCH})
    run(capsys, "run")
    assert (here / "run/cell.svg").read_bytes() == (here / "cell.svg").read_bytes()


def test_png_needs_no_display(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    for path in run(capsys, "AmoebaNet", "--format", "png", "--output", tmp_path):
        data = open(path, "rb").read()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def fails(capsys, *argv):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        visualize.main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "argv, named",
    [
        (["EvNASX"], "EvNASA"),  # the names that are known
        (["nowhere/genotype.json"], "nowhere/genotype.json"),
        (["."], "genotype.json"),
        (["--report", "."], "args.json"),
        ([], "--report"),
        (["EvNASA", "--report", "."], "--report"),
        (["EvNASA", "--output", "file/below"], "file"),
    ],
)
def test_command_refuses_bad_arguments(here, capsys, argv, named):
    (here / "file").write_text("")
    assert named in fails(capsys, *argv)


BAD_ARCHS = ["|", "|none~1|", "|conv~0|", "|none~0|+|none~0|", "|none~0|+", "|none~0|none~1|", "|none~٠|"]


@pytest.mark.parametrize("arch", [*BAD_ARCHS, "+".join(["|none~0|"] * 100_000), random_arch(0, 6)], ids=range(9))
def test_command_refuses_bad_arch_strings(here, capsys, arch):
    assert "arch string" in fails(capsys, arch)


BAD_JSON = ["{", "[]", '{"arch": 3}', '{"arch": "|none~3|"}', '{"normal": []}', "\x00", "[" * 100_000]


@pytest.mark.parametrize("text", BAD_JSON, ids=range(len(BAD_JSON)))
def test_command_refuses_bad_files_by_name(here, capsys, text):
    (here / "bad.json").write_text(text)
    assert "bad.json" in fails(capsys, "bad.json")


def test_import_of_the_command_is_light():
    code = "import sys, visualize; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- reports


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


# ---- in a browser


class Chromium:
    """Headless Chromium, controlled through its debugging pipe.

    The pipe has descriptors 3 and 4. Messages are JSON and end with a zero byte.
    """

    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
    ).split()

    def __init__(self, binary, folder):
        ours, theirs = os.pipe(), os.pipe()  # we write and they read; they write and we read
        read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (ours[0], theirs[1]))
        launch = (
            "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execvp(sys.argv[3], sys.argv[3:])"
        )
        command = [
            sys.executable,
            "-c",
            launch,
            str(read),
            str(write),
            binary,
            *self.flags,
            f"--user-data-dir={folder}",
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*command, "about:blank"], pass_fds=(read, write), **quiet)
        for fd in (ours[0], theirs[1], read, write):
            os.close(fd)
        self.write, self.read, self.buffer, self.number, self.events = ours[1], theirs[0], b"", 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session = None

    def message(self, deadline):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(self.read, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError("Chromium does not answer")
            self.buffer += data
        text, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(text)

    def call(self, method, **params):
        self.number += 1
        request = {"id": self.number, "method": method, "params": params}
        request |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(request).encode() + b"\0")
        deadline = time.monotonic() + 60
        while (message := self.message(deadline)).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, url, width):
        """Load a page; returns what it logged and asked for."""
        self.events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message(deadline))
        return self.events

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def close(self):
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(20)
        except Exception:
            self.process.kill()
            self.process.wait()
        os.close(self.write)
        os.close(self.read)


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


# ---- whatever the user's matplotlib is set to


@pytest.mark.slow
def test_settings_of_matplotlib_do_not_matter(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    environment = {**os.environ, "MPLBACKEND": "module://missing.notebook"}
    environment |= {"MATPLOTLIBRC": str(tmp_path), "PATH": str(tmp_path)}
    command = [sys.executable, visualize.__file__, "EvNASA", "--output", tmp_path / "theirs"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    visualize.main(["EvNASA", "--output", str(tmp_path / "ours")])
    for path in (tmp_path / "ours").iterdir():
        assert path.read_bytes() == (tmp_path / "theirs" / path.name).read_bytes()


def test_drawing_that_fails_does_not_end_a_run(tmp_path, monkeypatch):
    lines = []
    run = SimpleNamespace(writes=True, path=tmp_path, log=lines.append)
    monkeypatch.setattr(drawing, "cell_svg", lambda cell: 1 / 0)
    report.finish_run(run, genotypes.EvNASA, DARTS)
    (line,) = lines
    assert "ZeroDivisionError" in line
    assert f"--report {tmp_path}" in line
