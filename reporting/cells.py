"""Drawings of cells as SVG or PNG, made with matplotlib. No display is needed."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import genotype_files
from genotypes import Cell
from reporting.views import Drawing, Views, drawings_of
from support.files import UserError, atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # importing matplotlib takes a second
    from matplotlib.figure import Figure

PALETTE = {
    "paper": "#ffffff", "ink": "#1b1f27", "soft": "#5a6270", "line": "#6b7482", "rule": "#dde1e7", "node": "#e8ecf2",
    "blue": "#0069b4", "sky": "#1f9bcf", "green": "#00855f", "orange": "#c96a00", "yellow": "#8a8a00", "red": "#c9371f",
    "pink": "#b8478c", "purple": "#6a4fb5", "grey": "#7d8590",
}  # fmt: skip
OTHER = "line"  # colour of operations for which a space defines no colour

# Sizes are in points.
TEXT = 9
LETTER = 5.8  # width of a letter; generous, because we do not know the viewer's font
BOX = 19  # height of a box
GAP = 9  # between boxes
MARGIN = 12  # around the drawing
TITLE = 24  # height of the title
HOP = 18  # from an operation to its node
ARROW = 6  # size of the arrow at the node
# In dark mode, the drawing's lightness is inverted and its hues are kept.
DARK_CSS = "@media(prefers-color-scheme:dark){svg{filter:invert(.93) hue-rotate(180deg)}}"


@contextlib.contextmanager
def default_settings(style: Mapping[str, object] | None = None) -> Iterator[None]:
    """Within this block, use matplotlib's defaults and `style` instead of the user's settings.

    The user's settings might ask for TeX, and a notebook's settings for the notebook's display.
    """
    if "matplotlib" not in sys.modules:
        os.environ["MPLBACKEND"] = "agg"  # importing matplotlib fails if the variable names a missing backend
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style or {})
        yield


# ---- one drawing


class Route(NamedTuple):
    """A row of a drawing: an operation (or the concatenation) with its sources and its target."""

    sources: Sequence[str]
    operation: str
    target: str


@default_settings()
def cell_figure(drawing: Drawing) -> "Figure":
    """Draw a cell as a matplotlib figure.

    The nodes are on a diagonal from top left to bottom right, inputs first. Each edge has its own
    row, with the box of its operation just before the target node. The edge's line runs down from
    the source node and turns into the row at a dot. So boxes touch neither other boxes nor lines,
    and lines only cross at right angles. Two lines are connected only where there is a dot.
    """
    from matplotlib.figure import Figure

    figure = Figure(facecolor=PALETTE["paper"])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    ink = {"color": PALETTE["ink"], "parse_math": False, "zorder": 3}
    axes.text(MARGIN, MARGIN, drawing.title, fontsize=TEXT + 2, fontweight="bold", va="center", **ink)

    routes = [Route([edge.source], edge.operation, edge.target) for edge in drawing.edges]
    if drawing.concat:
        routes.append(Route(drawing.concat, "concat", "c_{k}"))
    targets = {route.target for route in routes}
    names = list(drawing.inputs)
    for route in routes:
        names += [*route.sources, route.target]
    line_ends = {}  # {node: (x, y) at which the line below it ends so far}
    x = MARGIN
    y = TITLE + MARGIN + BOX / 2
    # Each node once. Inputs come first, because they are not targets and False sorts before True.
    for name in sorted(dict.fromkeys(names), key=targets.__contains__):
        incoming = [route for route in routes if route.target == name]
        node_width = max(len(name) * LETTER + 12, 24)
        if not incoming:
            draw_node(axes, name, x, y, node_width, BOX)
            line_ends[name] = (x + node_width / 2, y + BOX / 2)
            x += node_width + GAP
            continue
        x = max(end_x for end_x, _ in line_ends.values()) + HOP
        operation_width = max(len(route.operation) for route in incoming) * LETTER + 12
        node_left = x + operation_width + HOP
        y += GAP
        node_top = y + BOX / 2 + GAP
        for route in incoming:
            y += BOX + GAP
            style = "--" if route.operation == "none" else "-"
            for source in route.sources:
                start, above = line_ends[source]
                draw_line(axes, [start, start], [above, y])
                draw_line(axes, [start, x], [y, y], style, marker="o", markersize=4, markevery=[0])
                line_ends[source] = (start, y)
            arrow = {"marker": ">", "markersize": ARROW, "markevery": [1]}
            draw_line(axes, [x + operation_width, node_left - ARROW / 2], [y, y], style, **arrow)
            colour = drawing.colours.get(route.operation, OTHER)
            draw_operation(axes, route.operation, colour, x, y, operation_width)
        bottom = y + BOX / 2
        draw_node(axes, name, node_left, (node_top + bottom) / 2, node_width, bottom - node_top)
        line_ends[name] = (node_left + node_width / 2, bottom)
    width = max(node_left + node_width, MARGIN + len(drawing.title) * LETTER * 1.3) + MARGIN
    height = bottom + MARGIN
    axes.set(xlim=(0, width), ylim=(height, 0))
    figure.set_size_inches(width / 72, height / 72)
    return figure


def draw_node(axes: "Axes", text: str, left: float, middle: float, width: float, height: float) -> None:
    """Draw a node as a rounded box; `middle` is the y coordinate of the box's centre."""
    draw_box(axes, "node", text, left, middle, width, height, edge="ink", fill="node", radius=9)


def draw_operation(axes: "Axes", text: str, colour: str, left: float, middle: float, width: float) -> None:
    """Draw an operation as a box; `middle` is the y coordinate of the box's centre.

    `colour` is a name in PALETTE.
    """
    draw_box(axes, "op", text, left, middle, width, BOX, edge=colour, fill="paper", radius=3)


def draw_box(
    axes: "Axes", kind: str, text: str, left: float, middle: float, width: float, height: float,
    *, edge: str, fill: str, radius: float,
) -> None:  # fmt: skip
    """Draw a box with its text.

    `kind` becomes the box's class in the SVG, see `svg_of`. `edge` and `fill` are names in PALETTE.
    """
    from matplotlib.patches import FancyBboxPatch

    style = {"fc": PALETTE[fill], "ec": PALETTE[edge], "ls": "--" if text == "none" else "-"}
    style |= {"boxstyle": f"round,pad=0,rounding_size={radius}", "gid": f"{kind}_0", "lw": 1.2, "zorder": 3}
    axes.add_patch(FancyBboxPatch((left, middle - height / 2), width, height, **style))
    ink = {"color": PALETTE["ink"], "parse_math": False, "zorder": 3}
    axes.text(left + width / 2, middle, text, fontsize=TEXT, ha="center", va="center_baseline", **ink)


def draw_line(axes: "Axes", xs: list[float], ys: list[float], style: str = "-", **marker: object) -> None:
    """Draw a straight line. `marker` has matplotlib's settings for a dot or an arrow at one end."""
    axes.plot(xs, ys, style, color=PALETTE["line"], lw=1.1, **marker)


@default_settings()
def svg_of(figure: "Figure", title: str, description: str) -> str:
    """Return a figure as an <svg> element in which text stays text. Equal figures give equal bytes.

    matplotlib gives its elements numbered ids, which would clash if several figures share a page.
    So each numbered id becomes a class. Only markers keep an id, which depends on the marker's
    shape and on the title.
    """
    from matplotlib import rc_context

    for artist in figure.findobj():
        artist.set_clip_on(False)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML header
    svg = re.sub(r' id="([^"]*)_\d+"', r' class="\1"', svg)
    about = f"<title>{escape(title)}</title><desc>{escape(description)}</desc><style>{DARK_CSS}</style>"
    return svg.replace(">", f' role="img" aria-label="{escape(title)}">{about}', 1)


def cell_svg(drawing: Drawing) -> str:
    """Return the drawing of a cell as SVG, with a description in words."""
    description = "; ".join(f"{edge.source} to {edge.target}: {edge.operation}" for edge in drawing.edges)
    description += f". The output c_{{k}} concatenates {', '.join(drawing.concat)}." if drawing.concat else "."
    return svg_of(cell_figure(drawing), drawing.title, description)


# ---- files


def load_cell(path: str | os.PathLike, views: Views) -> Cell:
    """Return the cell in a genotype file.

    Raises UserError, which names the file, if the cell cannot be read or cannot be drawn.
    """
    cell = genotype_files.load(path)
    try:
        drawings_of(cell, views)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return cell


@default_settings()
def write_cell(folder: str | os.PathLike, cell: Cell, views: Views, format: str = "svg", name: str = "") -> list[str]:
    """Write the drawings of a cell into `folder` and return their paths.

    The files of a Genotype are cell_normal and cell_reduce, and the file of an arch string is cell.
    With `name`, file names begin with `name` instead of "cell", and titles begin with `name` too.
    Raises UserError and OSError.
    """
    os.makedirs(folder, exist_ok=True)
    paths = []
    for file, drawing in drawings_of(cell, views, name).items():
        if name:
            file = file.replace("cell", name, 1)
        path = os.path.join(folder, f"{file}.{format}")
        paths.append(path)
        with atomic_write(path) as output:
            if format == "png":
                cell_figure(drawing).savefig(output, format="png", dpi=150)
            else:
                output.write(cell_svg(drawing).encode())
    return paths
