"""Draw cells as SVG or PNG, and rebuild the report of a run.

    python visualize.py EvNASA                       a named cell
    python visualize.py search-.../genotype.json     a genotype file (JSON or legacy pickle)
    python visualize.py search-20250101-120000       the winner of a run, drawn into its directory
    python visualize.py '|nor_conv_3x3~0|+|...|'     a NAS-Bench-201 architecture
    python visualize.py --report search-...          rebuild report.html

The SVG is written here, by a layered layout of our own: no Graphviz, and nothing but the standard library.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from html import escape
from itertools import chain, pairwise

import genotypes
from safeio import UserError, atomic_write, read_json

# Colours on light and on dark. The light one is an SVG attribute, which every viewer knows; the dark one is CSS.
PALETTE = {
    "paper": ("#ffffff", "#171a20"), "ink": ("#1b1f27", "#eceff4"), "soft": ("#5a6270", "#a9b1bf"),
    "line": ("#6b7482", "#939dac"), "rule": ("#dde1e7", "#343a45"), "node": ("#e8ecf2", "#2b313c"),
    "blue": ("#0069b4", "#57aef2"), "sky": ("#1f9bcf", "#9ad9f7"), "green": ("#00855f", "#37c69b"),
    "orange": ("#c96a00", "#f7a440"), "yellow": ("#8a8a00", "#f0d84a"), "red": ("#c9371f", "#ff8068"),
    "pink": ("#b8478c", "#f09acb"), "purple": ("#6a4fb5", "#b7a0ff"), "grey": ("#7d8590", "#98a1ae"),
}  # fmt: skip
COLOUR = {
    "none": "grey", "skip_connect": "green", "max_pool_3x3": "orange", "avg_pool_3x3": "yellow",
    "sep_conv_3x3": "blue", "sep_conv_5x5": "sky", "dil_conv_3x3": "red", "dil_conv_5x5": "pink",
    "sep_conv_7x7": "purple", "conv_7x1_1x7": "purple", "nor_conv_1x1": "sky", "nor_conv_3x3": "blue",
}  # fmt: skip

FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
FONT_SIZE, CHAR_WIDTH = 12, 7.4  # pixels; a generous width, since the viewer's font is not known here
BOX_HEIGHT, ROW_GAP, MARGIN, TITLE_HEIGHT = 26, 12, 16, 30
GAP_INTO_OP, GAP_INTO_NODE = 46, 28  # between layers: where lines spread out, and the short hop to the sum


@dataclass(eq=False)
class Box:
    """A vertex of the drawing: a node, an operation (the label of an edge), or a bend of a line passing by."""

    kind: str  # "node", "op" or "bend"
    text: str
    layer: int
    x: float = 0.0  # left
    y: float = 0.0  # middle
    width: float = 0.0

    @property
    def colour(self):
        return COLOUR.get(self.text, "line") if self.kind == "op" else "ink"


# ---------------------------------------------------------------------------------------------------------------
# Layout. Layers run left to right; nodes stand on even layers, and the operation of an edge on the odd layer just
# before the edge's target. In a layer everything has its own place, lines that only pass included, and between
# layers there are only lines. So no label can meet another label, a node or a foreign line, and two edges between
# the same nodes are two boxes.


def build(edges, concat, inputs):
    """The boxes in layers, and {(box, box in the next layer): whether the line between them is dashed}."""
    rank = dict.fromkeys(inputs, 0)  # the longest path from an input
    for source, target, _ in edges:
        rank[target] = max(rank.get(target, 0), rank.setdefault(source, 0) + 1)
    node = {name: Box("node", name, 2 * r) for name, r in rank.items()}
    routes = [(source, Box("op", op, node[target].layer - 1), node[target]) for source, target, op in edges]
    if concat:
        label = Box("op", "concat", 2 * max(rank.values()) + 1)
        output = Box("node", "c_{k}", label.layer + 1)
        routes += [(source, label, output) for source in concat]

    trunks = {name: [box] for name, box in node.items()}  # all edges from a node share one line, and branch off it
    links = {}
    for source, label, target in routes:
        trunk = trunks[source]
        while trunk[-1].layer < label.layer - 1:
            trunk.append(Box("bend", "", trunk[-1].layer + 1))
        for link in pairwise([*trunk[: label.layer - trunk[0].layer], label, target]):
            links[link] = links.get(link, True) and label.text == "none"
    layers = {}
    for box in dict.fromkeys([*node.values(), *chain.from_iterable(links)]):
        layers.setdefault(box.layer, []).append(box)
    return [layers[i] for i in sorted(layers)], links


def place(layer, near, sort=False):
    """Pull every box of a layer towards its `near` [(box, weight)], keeping the order (unless `sort`) and the gaps."""
    wanted = {}
    for box in layer:
        weight = sum(w for _, w in near[box])
        wanted[box] = sum(other.y * w for other, w in near[box]) / weight if weight else box.y
    if sort:
        layer.sort(key=wanted.get)
    offsets = [0.0]
    for pair in pairwise(layer):
        offsets.append(offsets[-1] + ROW_GAP + sum(0 if box.kind == "bend" else BOX_HEIGHT / 2 for box in pair))
    groups = []  # [mean, size]: least squares by pooling adjacent violators
    for box, offset in zip(layer, offsets, strict=True):
        groups.append([wanted[box] - offset, 1])
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (m, n), (k, o) = groups[-2], groups.pop()
            groups[-1] = [(m * n + k * o) / (n + o), n + o]
    means = [mean for mean, size in groups for _ in range(size)]
    for box, mean, offset in zip(layer, means, offsets, strict=True):
        box.y = mean + offset


def crossings(links):
    pairs = [(a.layer, a.y, b.y) for a, b in links]
    return sum(i == j and (a - c) * (b - d) < 0 for k, (i, a, b) in enumerate(pairs) for j, c, d in pairs[:k])


def layout(edges, title, concat=(), inputs=()):
    """Place a cell: (boxes, lines, width, height) in pixels; `cell_svg` describes the arguments.

    A line is (four points of a Bezier curve, x up to which it goes straight on, dashed, has an arrow).
    """
    layers, links = build(edges, concat, inputs)
    boxes = [box for layer in layers for box in layer]
    before, behind = {box: [] for box in boxes}, {box: [] for box in boxes}
    for a, b in links:
        weight = 6 if a.kind == b.kind == "bend" else 1  # long lines should run straight
        before[b].append((a, weight))
        behind[a].append((b, weight))
    around = {box: before[box] + behind[box] for box in boxes}
    best, fewest = layers, float("inf")
    for sweep in range(24):  # order the layers so that few lines cross; the first sweep only makes room
        for layer in layers[:: -1 if sweep % 2 else 1]:
            place(layer, behind if sweep % 2 else before, sort=sweep > 0)
        if (count := crossings(links)) < fewest:
            best, fewest = [list(layer) for layer in layers], count
    for sweep in range(41):  # straighten them; the last sweep runs forward
        for layer in best[:: -1 if sweep % 2 else 1]:
            place(layer, around)

    top = min(box.y for box in boxes) - BOX_HEIGHT / 2 - MARGIN - TITLE_HEIGHT
    x = MARGIN
    for number, layer in enumerate(layers):
        width = max(max(len(box.text) * CHAR_WIDTH + 18 for box in layer), 30)
        for box in layer:
            box.x, box.y, box.width = x, box.y - top, width
        x += width + (GAP_INTO_NODE if number % 2 else GAP_INTO_OP)
    lines = []
    for (a, b), dashed in links.items():
        start, end = a.x + a.width, b.x
        points = [(start, a.y), ((start + end) / 2, a.y), ((start + end) / 2, b.y), (end, b.y)]
        lines.append((points, end + b.width if b.kind == "bend" else end, dashed, b.kind == "node"))
    width = max(x - GAP_INTO_OP, MARGIN + len(title) * CHAR_WIDTH * 1.3) + MARGIN
    height = max(box.y for box in boxes) + BOX_HEIGHT / 2 + MARGIN
    return [box for box in boxes if box.kind != "bend"], lines, width, height


# ---------------------------------------------------------------------------------------------------------------
# Drawing


def paint(**roles):
    """SVG attributes for e.g. fill="paper": the light colour, and the class that `theme_css` recolours on dark."""
    names = " ".join(f"{role}-{name}" for role, name in roles.items())
    return " ".join(f'{role}="{PALETTE[name][0]}"' for role, name in roles.items()) + f' class="{names}"'


def theme_css():
    """Rules that turn what `paint` coloured for light into its dark colours, where the viewer asks for dark."""
    rules = (f".fill-{name}{{fill:{dark}}}.stroke-{name}{{stroke:{dark}}}" for name, (_, dark) in PALETTE.items())
    return "@media (prefers-color-scheme:dark){" + "".join(rules) + "}"


def cell_svg(edges, title, concat=(), inputs=(), standalone=True):
    """The cell as SVG text.

    edges: (source, target, operation) by names of nodes, listed target by target in topological order.
    concat: the nodes whose concatenation is the output c_{k}. inputs: nodes to show even where no edge uses them.
    standalone=False leaves out the dark colours' style sheet: the page around it has `theme_css()` once.
    """
    title = escape("".join(c if c.isprintable() else "?" for c in title))  # XML is choosy, names of files are not
    boxes, lines, width, height = layout(edges, title, concat, inputs)
    said = "; ".join(f"{source} to {target}: {operation}" for source, target, operation in edges)
    said += f". The output c_{{k}} concatenates {', '.join(concat)}." if concat else "."
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" aria-label="{title}" font-family="{FONT}" font-size="{FONT_SIZE}">',
        f"<title>{title}</title><desc>{escape(said)}</desc>",
        f"<style>{theme_css() if standalone else ''}</style>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" {paint(fill="paper")}/>',
        f'<text x="{MARGIN}" y="{MARGIN + 10}" font-size="14" font-weight="600" {paint(fill="ink")}>{title}</text>',
    ]
    for ((ax, ay), (bx, by), (cx, cy), (x, y)), straight, dashed, arrow in lines:
        path = f"M{ax:.1f} {ay:.1f}C{bx:.1f} {by:.1f} {cx:.1f} {cy:.1f} {x:.1f} {y:.1f}H{straight:.1f}"
        dashes = ' stroke-dasharray="4 4"' if dashed else ""
        out.append(f'<path data-kind="line" d="{path}" fill="none" stroke-width="1.5"{dashes} {paint(stroke="line")}/>')
        if arrow:
            out.append(f'<path d="M{x:.1f} {y:.1f}l-8 -4v8z" {paint(fill="line")}/>')
    for box in boxes:
        radius, fill = (13, "node") if box.kind == "node" else (4, "paper")
        dashes = ' stroke-dasharray="4 3"' if box.text == "none" else ""
        out.append(
            f'<rect data-kind="{box.kind}" x="{box.x:.1f}" y="{box.y - BOX_HEIGHT / 2:.1f}" width="{box.width:.1f}" '
            f'height="{BOX_HEIGHT}" rx="{radius}" stroke-width="1.6"{dashes} {paint(fill=fill, stroke=box.colour)}/>'
            f'<text x="{box.x + box.width / 2:.1f}" y="{box.y + 4:.1f}" text-anchor="middle" {paint(fill="ink")}>'
            f"{escape(box.text)}</text>"
        )
    return "\n".join([*out, "</svg>", ""])


def cell_png(edges, title, file, concat=(), inputs=()):
    """The same drawing as PNG, into an open binary file. Needs matplotlib, but no display."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch, PathPatch
        from matplotlib.path import Path
    except ImportError as error:
        raise UserError("--format png needs matplotlib: pip install matplotlib, or ask for --format svg") from error
    boxes, lines, width, height = layout(edges, title, concat, inputs)
    colour = {name: light for name, (light, _) in PALETTE.items()}
    figure = Figure(figsize=(width / 72, height / 72), dpi=150, facecolor=colour["paper"])
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    ink = {"color": colour["ink"], "parse_math": False}
    axes.text(MARGIN, MARGIN + 10, title, fontsize=12, fontweight="bold", **ink)
    for points, straight, dashed, arrow in lines:
        x, y = points[-1]
        path = Path([*points, (straight, y)], [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO])
        axes.add_patch(PathPatch(path, fill=False, ec=colour["line"], lw=1.2, ls="--" if dashed else "-"))
        if arrow:
            axes.fill((x, x - 8, x - 8), (y, y - 4, y + 4), color=colour["line"], linewidth=0)
    for box in boxes:
        radius, fill = (13, "node") if box.kind == "node" else (4, "paper")
        style = {"boxstyle": f"round,pad=0,rounding_size={radius}", "ls": "--" if box.text == "none" else "-"}
        style |= {"fc": colour[fill], "ec": colour[box.colour], "lw": 1.3}
        axes.add_patch(FancyBboxPatch((box.x, box.y - BOX_HEIGHT / 2), box.width, BOX_HEIGHT, **style))
        axes.text(box.x + box.width / 2, box.y, box.text, fontsize=9, ha="center", va="center_baseline", **ink)
    figure.savefig(file, format="png")


# ---------------------------------------------------------------------------------------------------------------
# Architectures


def cells(architecture):
    """{file name: keyword arguments of `cell_svg`} of a Genotype or an arch string. Raises UserError."""
    if isinstance(architecture, str):
        from nas201.genotypes import EDGES, PRIMITIVES, from_arch_string

        names = ("0 (input)", "1", "2", "3 (output)")
        operations = [PRIMITIVES[op] for op in from_arch_string(architecture)]
        return {"cell": {"edges": [(names[b], names[a], op) for (a, b), op in zip(EDGES, operations, strict=True)]}}
    drawn = {}
    for kind in ("normal", "reduce"):
        pairs = getattr(architecture, kind)
        names = ["c_{k-2}", "c_{k-1}", *(str(i) for i in range(len(pairs) // 2))]
        edges = [(names[source], names[2 + i // 2], op) for i, (op, source) in enumerate(pairs)]
        concat = [names[i] for i in getattr(architecture, f"{kind}_concat")]
        drawn[f"cell_{kind}"] = {"edges": edges, "concat": concat, "inputs": names[:2]}
    return drawn


def title_of(file_name, name=""):
    """What stands above a drawing: "EvNASA: normal cell"."""
    kind = {"cell_normal": "normal cell", "cell_reduce": "reduction cell", "cell": "cell"}[file_name]
    return f"{name}: {kind}" if name else kind.capitalize()


def load_architecture(path):
    """The Genotype or arch string in a genotype file. Raises UserError naming the file."""
    value = read_json(path) if str(path).endswith(".json") else None
    if not isinstance(value, dict) or not isinstance(value.get("arch"), str):
        return genotypes.load(path)
    try:
        cells(value["arch"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return value["arch"]


def find(target):
    """(architecture, name, folder for its drawings) of what the command line names. Raises UserError."""
    if target.lstrip().startswith("|"):
        return target.strip(), "", "."
    if os.path.isdir(target):
        paths = [os.path.join(target, file) for file in ("genotype.json", "genotype.pickle")]
        found = [path for path in paths if os.path.exists(path)]
        if not found:
            raise UserError(f"{target} has no genotype.json: not a run directory, or its first generation is not over")
        return load_architecture(found[0]), "", target
    if os.sep in target or target.endswith((".json", ".pickle")):
        return load_architecture(target), os.path.splitext(os.path.basename(target))[0], "."
    return genotypes.get(target), target, "."


def write_cells(folder, architecture, format="svg", name=""):
    """Write cell_normal and cell_reduce (Genotype) or cell (arch string) into `folder`. Returns the paths.

    With `name` files are called NAME_normal and so on, and titles begin with it. Raises UserError.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    paths = []
    for file, cell in cells(architecture).items():
        title = title_of(file, name)
        paths.append(os.path.join(folder, f"{file.replace('cell', name, 1) if name else file}.{format}"))
        with atomic_write(paths[-1]) as output:
            if format == "png":
                cell_png(title=title, file=output, **cell)
            else:
                output.write(cell_svg(title=title, **cell).encode())
    return paths


def write_report(run_dir):
    """Write RUN_DIR/report.html from the run's files and return its path. Raises UserError."""
    import report  # not above: report draws with this module

    return report.write_report(run_dir)


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Draw cells, or rebuild the report of a run.")
    what = "a named cell such as EvNASA, a genotype file, a run directory or a NAS-Bench-201 arch string"
    parser.add_argument("target", nargs="?", metavar="NAME|FILE|RUN_DIR|ARCH", help=what)
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="png needs matplotlib (default: svg)")
    parser.add_argument("--output", metavar="DIR", help="folder for the drawings (default: the run directory, or .)")
    parser.add_argument("--report", metavar="RUN_DIR", help="rebuild the report of a search or a retraining")
    args = parser.parse_args(argv)
    try:
        if (args.target is None) == (args.report is None):
            raise UserError(f"give either {what}, or --report RUN_DIR")
        if args.report is not None:
            paths = [write_report(args.report)]
        else:
            architecture, name, folder = find(args.target)
            paths = write_cells(args.output or folder, architecture, args.format, name)
        print("\n".join(paths))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
