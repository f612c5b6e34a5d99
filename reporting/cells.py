"""Drawings of cells as SVG or PNG. matplotlib draws, without a display."""

import contextlib
import functools
import io
import os
import re
import sys
from html import escape

import genotype_files
import genotypes
from support.files import UserError, atomic_write

PALETTE = {
    "paper": "#ffffff", "ink": "#1b1f27", "soft": "#5a6270", "line": "#6b7482", "rule": "#dde1e7", "node": "#e8ecf2",
    "blue": "#0069b4", "sky": "#1f9bcf", "green": "#00855f", "orange": "#c96a00", "yellow": "#8a8a00", "red": "#c9371f",
    "pink": "#b8478c", "purple": "#6a4fb5", "grey": "#7d8590",
}  # fmt: skip
COLOUR = {
    "none": "grey", "skip_connect": "green", "max_pool_3x3": "orange", "avg_pool_3x3": "yellow",
    "sep_conv_3x3": "blue", "sep_conv_5x5": "sky", "dil_conv_3x3": "red", "dil_conv_5x5": "pink",
    "sep_conv_7x7": "purple", "conv_7x1_1x7": "purple",
}  # fmt: skip

TEXT = 9  # points, as all sizes here
LETTER = 5.8  # generous, since the viewer's font is not known here
BOX, GAP, MARGIN, TITLE = 19, 9, 12, 24  # heights of a box and of the title, and the space around boxes
HOP, ARROW = 18, 6  # from an operation to its node, and the size of the arrow there
# Lightness is turned over and the hue kept where the viewer prefers dark pages.
DARK_CSS = "@media(prefers-color-scheme:dark){svg{filter:invert(.93) hue-rotate(180deg)}}"


@contextlib.contextmanager
def default_settings(style=()):
    """Draw with matplotlib's defaults and `style`: a user's settings can ask for TeX, a notebook's for its screen."""
    if "matplotlib" not in sys.modules:
        os.environ["MPLBACKEND"] = "agg"  # importing it fails where this names what is not there
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield


@default_settings()
def cell_figure(edges, title, concat=(), inputs=()):
    """Draw the cell as a matplotlib figure.

    edges: (source, target, operation) by names of nodes, listed target by target in topological order.
    concat: the nodes whose concatenation is the output c_{k}. inputs: nodes to show even where no edge uses them.

    Nodes step down a diagonal. Each edge has a row of its own, in which its operation stands just before the target:
    the source's line runs down below the source and turns into the row at a dot. So boxes meet neither each other nor
    a line, and lines meet at right angles, connected where there is a dot.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(facecolor=PALETTE["paper"])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    ink = {"color": PALETTE["ink"], "parse_math": False, "zorder": 3}
    axes.text(MARGIN, MARGIN, title, fontsize=TEXT + 2, fontweight="bold", va="center", **ink)

    def draw_box(kind, text, x, y, width, height=BOX):  # x: left, y: middle
        colour, fill, radius = ("ink", "node", 9) if kind == "node" else (COLOUR.get(text, "line"), "paper", 3)
        style = {"fc": PALETTE[fill], "ec": PALETTE[colour], "ls": "--" if text == "none" else "-"}
        style |= {"boxstyle": f"round,pad=0,rounding_size={radius}", "gid": f"{kind}_0", "lw": 1.2, "zorder": 3}
        axes.add_patch(FancyBboxPatch((x, y - height / 2), width, height, **style))
        axes.text(x + width / 2, y, text, fontsize=TEXT, ha="center", va="center_baseline", **ink)

    def draw_line(xs, ys, style="-", **marker):
        axes.plot(xs, ys, style, color=PALETTE["line"], lw=1.1, **marker)

    routes = [([source], operation, target) for source, target, operation in edges]
    routes += [(concat, "concat", "c_{k}")] if concat else []
    targets = {target for _, _, target in routes}
    names = dict.fromkeys([*inputs, *(name for sources, _, target in routes for name in (*sources, target))])
    foot = {}  # of each node: where the line below it ends so far
    x, y = MARGIN, TITLE + MARGIN + BOX / 2
    for name in sorted(names, key=targets.__contains__):  # inputs first
        rows = [(sources, operation) for sources, operation, target in routes if target == name]
        width = max(len(name) * LETTER + 12, 24)
        if not rows:
            draw_box("node", name, x, y, width)
            foot[name] = (x + width / 2, y + BOX / 2)
            x += width + GAP
            continue
        x = max(at for at, _ in foot.values()) + HOP
        wide = max(len(operation) for _, operation in rows) * LETTER + 12
        left, y, top = x + wide + HOP, y + GAP, y + GAP + BOX / 2 + GAP
        for sources, operation in rows:
            y += BOX + GAP
            style = "--" if operation == "none" else "-"
            for source in sources:
                start, above = foot[source]
                draw_line([start, start], [above, y])
                draw_line([start, x], [y, y], style, marker="o", markersize=4, markevery=[0])
                foot[source] = (start, y)
            draw_line([x + wide, left - ARROW / 2], [y, y], style, marker=">", markersize=ARROW, markevery=[1])
            draw_box("op", operation, x, y, wide)
        bottom = y + BOX / 2
        draw_box("node", name, left, (top + bottom) / 2, width, bottom - top)
        foot[name] = (left + width / 2, bottom)
    size = (max(left + width, MARGIN + len(title) * LETTER * 1.3) + MARGIN, bottom + MARGIN)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    figure.set_size_inches(size[0] / 72, size[1] / 72)
    return figure


@default_settings()
def svg_of(figure, title, description):
    """Return a figure as an <svg> element in which text stays text; equal figures give equal bytes.

    What matplotlib numbers becomes a class; only marks keep an id, made of their shape and the title.
    """
    from matplotlib import rc_context

    for artist in figure.findobj():
        artist.set_clip_on(False)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r' id="([^"]*)_\d+"', r' class="\1"', file.getvalue()[file.getvalue().index("<svg") :])
    about = f"<title>{escape(title)}</title><desc>{escape(description)}</desc><style>{DARK_CSS}</style>"
    return svg.replace(">", f' role="img" aria-label="{escape(title)}">{about}', 1)


def cell_svg(edges, title, concat=(), inputs=()):
    """Return the cell as SVG text; `cell_figure` describes the arguments."""
    description = "; ".join(f"{source} to {target}: {operation}" for source, target, operation in edges)
    description += f". The output c_{{k}} concatenates {', '.join(concat)}." if concat else "."
    return svg_of(cell_figure(edges, title, concat, inputs), title, description)


# ---- architectures


@functools.singledispatch
def cells(architecture, name=""):
    """Return {file name: keyword arguments of `cell_figure`} of an architecture; titles begin with `name`.

    A Genotype has "cell_normal" and "cell_reduce". Other search spaces register what they call an architecture.
    """
    raise UserError(f"{str(architecture)[:80]} is no architecture that can be drawn")


@cells.register
def _(architecture: genotypes.Genotype, name=""):
    drawn = {}
    for kind, words in (("normal", "normal cell"), ("reduce", "reduction cell")):
        pairs = getattr(architecture, kind)
        nodes = ["c_{k-2}", "c_{k-1}", *(str(i) for i in range(len(pairs) // 2))]
        edges = [(nodes[source], nodes[2 + i // 2], op) for i, (op, source) in enumerate(pairs)]
        concat = [nodes[i] for i in getattr(architecture, f"{kind}_concat")]
        drawn[f"cell_{kind}"] = {"title": title(name, words), "edges": edges, "concat": concat, "inputs": nodes[:2]}
    return drawn


def title(name, words):
    """Return the title of a drawing. XML is choosy about characters, names of files are not."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return f"{name}: {words}" if name else words.capitalize()


def load_architecture(path):
    """Return the Genotype or arch string in a genotype file. Raises UserError naming the file."""
    architecture = genotype_files.load(path)
    try:
        cells(architecture)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return architecture


@default_settings()
def write_cells(folder, architecture, format="svg", name=""):
    """Write cell_normal and cell_reduce (Genotype) or cell (arch string) into `folder`. Returns the paths.

    With `name` files are called NAME_normal and so on, and titles begin with it. Raises UserError and OSError.
    """
    os.makedirs(folder, exist_ok=True)
    paths = []
    for file, cell in cells(architecture, name).items():
        paths.append(os.path.join(folder, f"{file.replace('cell', name, 1) if name else file}.{format}"))
        with atomic_write(paths[-1]) as output:
            if format == "png":
                cell_figure(**cell).savefig(output, format="png", dpi=150)
            else:
                output.write(cell_svg(**cell).encode())
    return paths
