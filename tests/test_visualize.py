"""Cells are drawn without overlaps, reports are self-contained pages, and bad input is one line."""

import dataclasses
import fcntl
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
from types import SimpleNamespace

import numpy as np
import pytest

import genotype_files
import genotypes
import visualize
from nas201.genotypes import PRIMITIVES
from nas201.report import NAS_BENCH_201
from reporting import cells as drawing
from reporting import report
from reporting.views import Drawing, Edge, drawings_of
from support.files import UserError, write_json
from views import DARTS, VIEWS

from helpers import REPORTED_ARCH, reported_run

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


ARCHITECTURES = {
    **genotypes.NAMED,
    **{f"genotype {seed}": random_genotype(seed) for seed in range(30)},
    **{f"arch {seed}": random_arch(seed) for seed in range(15)},
}


# ---- cells


def drawn(cell):
    """The root, [(kind, text, left, top, right, bottom)] of nodes and operations, and [(x, y, x, y)] of the lines."""
    root = ElementTree.fromstring(drawing.cell_svg(cell))
    axes = next(group for group in root.iter(f"{SVG}g") if group.get("class") == "axes")
    boxes, lines = [], []
    for group, following in zip(axes, [*axes[1:], None], strict=True):
        kind, path = group.get("class"), group.find(f"{SVG}path")
        numbers = [] if path is None else [float(v) for v in re.findall(r"-?[\d.]+", path.get("d"))]
        if kind in ("node", "op"):
            left, right, top, bottom = (end(numbers[i::2]) for i in (0, 1) for end in (min, max))
            text = following.find(f"{SVG}text")
            x, y, half = float(text.get("x")), float(text.get("y")), len(text.text) * drawing.LETTER / 2
            assert left <= x - half and x + half <= right
            assert top + 8 <= y <= bottom - 4  # cap height above, descenders below
            boxes.append((kind, text.text, left, top, right, bottom))
        elif kind == "line2d":
            lines.append(tuple(numbers))
            assert numbers[0] == numbers[2] or numbers[1] == numbers[3]
            # A line turns where there is a dot, and ends at a node with an arrow.
            assert (group.find(f".//{SVG}use") is not None) == (numbers[0] != numbers[2])
    return root, boxes, lines


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drawing_has_no_overlaps(name):
    for cell in drawings_of(ARCHITECTURES[name], VIEWS, name).values():
        root, boxes, lines = drawn(cell)
        width, height = (float(root.get(key).removesuffix("pt")) for key in ("width", "height"))
        labels = sorted(text for kind, text, *_ in boxes if kind == "op" and text != "concat")
        assert labels == sorted(op for _, _, op in cell.edges)  # parallel edges have a label each, apart
        nodes = {n for source, target, _ in cell.edges for n in (source, target)} | set(cell.inputs)
        assert sorted(text for kind, text, *_ in boxes if kind == "node") == sorted(
            nodes | ({"c_{k}"} if cell.concat else set())
        )
        for i, (_, text, left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left and right <= width and drawing.TITLE <= top and bottom <= height
            for _, other, *box in boxes[:i]:
                apart = box[0] - right, left - box[2], box[1] - bottom, top - box[3]
                assert max(apart) >= 8, (text, other)
        for x0, y0, x1, y1 in lines:
            for _, text, left, top, right, bottom in boxes:  # a line may end at a box, and never enters one
                outside = max(left - max(x0, x1), min(x0, x1) - right, top - max(y0, y1), min(y0, y1) - bottom)
                assert outside >= -0.2, (text, x0, y0, x1, y1)
        for i, (x0, y0, x1, y1) in enumerate(lines):  # lines of two sources may cross, and lie on each other in concat
            for ox0, oy0, ox1, oy1 in lines[:i]:
                same_row = y0 == y1 == oy0 == oy1 and min(x1, ox1) > max(x0, ox0)
                assert not same_row or (cell.concat and y0 == max(line[3] for line in lines))
                assert not (x0 == x1 == ox0 == ox1 and min(y1, oy1) > max(y0, oy0))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lines_connect_what_the_cell_says(name):
    for cell in drawings_of(ARCHITECTURES[name], VIEWS).values():
        _, boxes, lines = drawn(cell)
        near = lambda a, b: abs(a - b) < 0.2  # noqa: E731
        found = []
        for _, operation, left, top, right, bottom in (box for box in boxes if box[0] == "op"):
            y = (top + bottom) / 2
            arrows = [line for line in lines if near(line[0], right) and near(line[1], y) and near(line[3], y)]
            assert len(arrows) == 1
            [target] = [
                text
                for kind, text, *box in boxes
                if kind == "node" and box[1] < y < box[3] and near(arrows[0][2] + drawing.ARROW / 2, box[0])
            ]
            for x0, _, _, _ in (line for line in lines if near(line[2], left) and near(line[3], y)):
                [source] = [box for box in boxes if box[0] == "node" and near((box[2] + box[4]) / 2, x0)]
                reached = source[5]
                for _, start, _, end in sorted(line for line in lines if line[0] == line[2] == x0):
                    reached = max(reached, end) if start <= reached + 0.2 else reached
                assert reached >= y - 0.2
                found.append((source[1], target, operation))
        concat = [(n, "c_{k}", "concat") for n in cell.concat]
        assert sorted(found) == sorted(cell.edges + concat)


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
    ElementTree.fromstring(drawing.cell_svg(strange).encode())
    drawing.cell_figure(strange).savefig(io.BytesIO(), format="png")


def test_svg_has_a_text_alternative():
    root = ElementTree.fromstring(drawing.cell_svg(SIMPLE))
    assert root.get("role") == "img" and root.get("aria-label") == SIMPLE.title
    assert root.find(f"{SVG}desc").text == "c_{k-2} to 0: skip_connect. The output c_{k} concatenates 0."


def test_equal_drawings_give_equal_bytes():
    assert drawing.cell_svg(SIMPLE) == drawing.cell_svg(SIMPLE)


def test_svg_has_its_own_background_and_only_colours_of_the_palette():
    svg = drawing.cell_svg(SIMPLE)
    root = ElementTree.fromstring(svg)
    assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text
    paper = next(root.iter(f"{SVG}path"))
    width, height = root.get("viewBox").split()[2:]
    assert "fill: #ffffff" in paper.get("style") and paper.get("d").split()[:5] == ["M", "0", height, "L", width]
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


def test_largest_cells_are_drawn_quickly():
    rng = random.Random(0)
    pairs = [(rng.choice(genotypes.OPERATIONS), rng.randrange(i // 2 + 2)) for i in range(40)]
    largest = genotype_files.validate(genotypes.Genotype(pairs, [2], pairs, list(range(2, 22))))
    start = time.monotonic()
    for cell in drawings_of(largest, VIEWS).values():
        drawing.cell_svg(cell)
    assert time.monotonic() - start < 20


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
    write_json("run/genotype.json", {"arch": REPORTED_ARCH})  # takes precedence over the pickle
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
        assert data.startswith(b"\x89PNG") and len(data) > 10_000


def fails(capsys, *argv):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        visualize.main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
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
    path = report.write_report(run_dir, VIEWS)
    assert path == os.path.join(run_dir, "report.html")
    page = open(path, encoding="utf-8").read()
    assert "<script" not in page and "url(" not in page and "@import" not in page
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # not addresses
    assert set(re.findall(r"\w+://[^\"'<\s]*", page)) <= names
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)
    for svg in re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL):
        assert "nan" not in re.sub(r"<desc>.*?</desc>", "", svg).lower().replace("nanc", "")
        assert 'role="img"' not in svg or ("<title>" in svg and "<desc>" in svg and 'aria-label="' in svg)
    return page


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page) + re.findall(r"<figcaption>(.*?) <small>", page)


def test_report_of_a_search_has_its_sections(tmp_path):
    page = page_of(reported_run(tmp_path / "run"))
    assert "EvNAS search, DARTS space" in page and "Missing from this report" not in page
    assert headings(page) == [
        "Summary", "Best cell of the last generation", "Fitness and training", "Population", "Time", "Settings",
        "Fitness", "Training accuracy", "Training loss", "Operations, normal cell", "Operations, reduction cell",
        "Distinct architectures", "Time per generation", "Throughput", "Learning rate",
    ]  # fmt: skip
    assert "4 of 5" in page and "python train_search.py &lt;&amp;&gt;" in page and "Reduction cell" in page
    assert "best: 61 at first, 64 at last" in page and "4 min 6 s" in page


@pytest.mark.parametrize("searched", ["cifar10", "cifar100", "digits"])
def test_report_shows_published_figures_of_the_searched_data_set(tmp_path, searched):
    run = reported_run(tmp_path / "run", space="s2")
    args = json.loads((run / "args.json").read_text())
    args["args"]["dataset"] = searched
    write_json(run / "args.json", args)
    page = page_of(run)
    text = re.sub(r"<[^>]*>", " ", page)
    published = {
        "cifar10": r"CIFAR-10 test\s+91.23\s+92.18 ± 1.11\s+94.37\s+87.66\s+93.51",
        "cifar100": r"CIFAR-100 valid\s+66.50\s+66.35 ± 2.59\s+73.49\s+59.00\s+71.14",
    }
    elsewhere = {"cifar10": r"CIFAR-10 test\s+91.23\s+–\s+94.37\s+–", "cifar100": r"valid\s+66.50\s+–\s+73.49\s+–"}
    if searched == "digits":
        assert all(re.search(line, text) for line in elsewhere.values())
    for name in published:
        assert bool(re.search(published[name], text)) == (name == searched)
    assert ("EvNAS, test" in page) == (searched != "digits")
    assert "Rank correlation" in page and REPORTED_ARCH in page and "True accuracy, ImageNet16-120" not in page


def test_report_of_a_retraining_has_its_sections(tmp_path):
    page = page_of(reported_run(tmp_path / "run", kind="eval", steps=130))
    assert "EvNAS retraining" in page and "Population" not in page and "Missing from this report" not in page
    assert {"Loss", "Top-1 accuracy", "Top-5 accuracy", "Cell"} <= set(headings(page))
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


def test_report_without_fitness_says_so(tmp_path):
    folder = reported_run(tmp_path / "run", fitness_best=None, fitness_mean=None, fitness_std=None, lr=float("nan"))
    page = page_of(folder)
    assert "Fitness: " in page and "Learning rate" not in headings(page)


def test_report_names_populations_that_cannot_be_read(tmp_path):
    folder = reported_run(tmp_path / "run")
    (folder / "population" / "002.npz").unlink()
    (folder / "population" / "003.npz").write_bytes(b"PK damaged")
    np.savez(folder / "population" / "004.npz", alphas=np.array([object()], dtype=object))
    page = page_of(folder)
    assert all(text in page for text in ("generation 2, 3, 4", "002.npz", "003.npz", "004.npz"))


def test_report_without_arguments_or_cell_uses_the_history(tmp_path):
    folder = reported_run(tmp_path / "run")
    (folder / "args.json").write_text("{")
    (folder / "genotype.json").unlink()
    page = page_of(folder)
    assert "args.json" in page and "genotype.json" in page and "Best cell" in page and "Reduction cell" in page


@pytest.mark.parametrize("cell", ['{"arch": 3}', None])
def test_report_says_that_a_cell_cannot_be_drawn(tmp_path, cell):
    folder = reported_run(tmp_path / "run", best_genotype={"normal": 1})
    (folder / "genotype.json").unlink()
    if cell:
        (folder / "genotype.json").write_text(cell)
    assert "The drawing of the cell: " in page_of(folder)


@pytest.mark.parametrize("history", [None, "\n"])
def test_report_without_a_generation_says_so(tmp_path, history):
    folder = reported_run(tmp_path / "run")
    (folder / "history.jsonl").unlink()
    if history:
        (folder / "history.jsonl").write_text(history)
    assert "history.jsonl has no generation" in page_of(folder)


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
    page_of(reported_run(tmp_path / "run", space="s2", steps=1, true_accuracy=[1], distinct=1e300, seconds=-1, lr=0))


@pytest.mark.parametrize("arguments", [[1], {"epochs": ["<b>"], "dataset": {}}], ids=["a list", "odd values"])
def test_odd_arguments_do_not_break_a_report(tmp_path, arguments):
    folder = reported_run(tmp_path / "run", space="s2", steps=1)
    odd = {"versions": {"\ud800": "\x01"}, "space": ["s2"], "kind": {}, "command": 7, "git": []}
    write_json(folder / "args.json", {"args": arguments, **odd})
    assert "<b>" not in page_of(folder).replace("<td><b>", "")


# ---- in a browser


class Chromium:
    """Headless Chromium, spoken to through its debugging pipe (descriptors 3 and 4, JSON ended by a zero byte)."""

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


@pytest.mark.parametrize("kind, space", [("search", "s1"), ("search", "s2"), ("eval", "s1")])
def test_report_fits_its_page_in_a_browser(chromium, tmp_path, kind, space):
    path = report.write_report(reported_run(tmp_path / "run", kind=kind, space=space, steps=50), VIEWS)
    url = f"file://{path}"
    for width in (1280, 390):
        events = chromium.open(url, width)
        asked = {e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"}
        assert {u for u in asked if not u.startswith("data:")} == {url}
        wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
        assert [e for e in events if e.get("method") in wrong] == []
        assert chromium.value("innerWidth") == width
        chromium.value("document.querySelectorAll('details').forEach(d => d.open = true)||0")
        assert chromium.value("document.documentElement.scrollWidth") <= width
        # Text of charts and cells as drawn on the screen, in pixels, and no text of a chart outside its picture.
        smallest = """Math.min(...[...document.querySelectorAll('svg text')].map(t =>
            parseFloat(getComputedStyle(t).fontSize) * t.getCTM().a))"""
        assert chromium.value(smallest) >= 9
        outside = """[...document.querySelectorAll('svg[role=img] text')].filter(t => {
            const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
            return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1
        }).map(t => t.textContent)"""
        assert chromium.value(outside) == []
        # The labels of cells fit their boxes in the font that the browser has chosen.
        spilt = """[...document.querySelectorAll('g.node, g.op')].map(box => [box, box.nextElementSibling])
            .filter(([box, text]) => text.getBBox().width > box.getBBox().width - 4)
            .map(([box, text]) => text.textContent)"""
        assert chromium.value("document.querySelectorAll('g.node, g.op').length") >= 10
        assert chromium.value(spilt) == []


# ---- whatever the user's matplotlib is set to


@pytest.mark.parametrize("backend", ["module://missing.notebook", "tkagg"])
def test_settings_of_matplotlib_do_not_matter(tmp_path, backend):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    environment = {**os.environ, "MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path), "PATH": str(tmp_path)}
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
    assert len(lines) == 1 and "ZeroDivisionError" in lines[0] and f"--report {tmp_path}" in lines[0]
