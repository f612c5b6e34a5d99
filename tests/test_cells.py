"""Cells are drawn without overlaps, and their drawings are readable by everyone."""

import io
import random
import re
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

import numpy as np
import pytest

import genotype_files
import genotypes
from nas201.genotypes import PRIMITIVES
from nas201.report import NAS_BENCH_201
from reporting import cells as drawing
from reporting.views import Drawing, Edge, drawings_of
from views import DARTS, VIEWS

from helpers import REPORTED_ARCH

SVG = "{http://www.w3.org/2000/svg}"


def random_genotype(seed):
    rng = random.Random(seed)
    cells = []
    for _ in range(2):
        nodes = rng.choice((1, 2, 4, 4, 5, 7))
        pairs = [(rng.choice(genotypes.OPERATIONS), rng.randrange(i // 2 + 2)) for i in range(2 * nodes)]
        cells += [pairs, sorted(rng.sample(range(2, nodes + 2), rng.randint(1, nodes)))]
    return genotype_files.validate(genotypes.Genotype(*cells))


def random_arch(seed):
    rng = random.Random(seed)
    node = ("|".join(f"{rng.choice(PRIMITIVES)}~{i}" for i in range(n)) for n in (1, 2, 3))
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
