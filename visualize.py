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
import re
import sys
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from safeio import UserError, atomic_write, read_json

# NAS-Bench-201's operations, in the order of its alphas.
NAS201_OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")

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


@dataclass
class Box:
    """A vertex of the drawing: a node, an operation (the label of an edge), or a bend of a line passing by."""

    kind: str  # "node", "op" or "bend"
    text: str
    layer: int
    x: float = 0.0  # left
    y: float = 0.0  # middle
    width: float = 0.0

    @property
    def height(self):
        return 0 if self.kind == "bend" else BOX_HEIGHT


# ---------------------------------------------------------------------------------------------------------------
# Layout. Layers run left to right; nodes stand on even layers, and the operation of an edge on the odd layer just
# before the edge's target. In a layer everything has its own place, lines that only pass included, and between
# layers there are only lines. So no label can meet another label, a node or a foreign line, and two edges between
# the same nodes are two boxes.


def _build(edges, concat, inputs):
    """Boxes, and for each edge (operation, [box index, one a layer, from source to target])."""
    rank = dict.fromkeys(inputs, 0)  # the longest path from an input
    for source, target, _ in edges:
        rank[target] = max(rank.get(target, 0), rank.setdefault(source, 0) + 1)
    boxes, routes = [], []

    def add(kind, text, layer):
        boxes.append(Box(kind, text, layer))
        return len(boxes) - 1

    node = {name: add("node", name, 2 * r) for name, r in rank.items()}
    trunk = {name: [index] for name, index in node.items()}  # all edges from a node share one line, and branch off it

    def route(source, layer):
        while len(trunk[source]) < layer - 2 * rank[source]:
            trunk[source].append(add("bend", "", boxes[trunk[source][-1]].layer + 1))
        return trunk[source][: layer - 2 * rank[source]]

    for source, target, operation in edges:
        layer = 2 * rank[target] - 1
        routes.append((operation, [*route(source, layer), add("op", operation, layer), node[target]]))
    if concat:
        layer = 2 * max(rank.values()) + 1
        ends = [add("op", "concat", layer), add("node", "c_{k}", layer + 1)]
        routes += [("concat", route(source, layer) + ends) for source in concat]
    return boxes, routes


def _crossings(links, place):
    pairs = [(place[a], place[b]) for a, b in links]
    return sum((a - c) * (b - d) < 0 for i, (a, b) in enumerate(pairs) for c, d in pairs[:i])


def _order(layers, links):
    """Order every layer so that lines cross little: barycentre sweeps, then swaps of neighbours. links: by gap."""
    place = {box: i for layer in layers for i, box in enumerate(layer)}
    near = {box: ([], []) for box in place}  # neighbours in the layer before, and in the layer behind
    for a, b in (link for gap in links for link in gap):
        near[a][1].append(b)
        near[b][0].append(a)
    best, fewest = dict(place), sum(_crossings(gap, place) for gap in links)
    for sweep in range(16):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            centre = {b: [place[n] for n in near[b][sweep % 2]] or [place[b]] for b in layer}
            for i, box in enumerate(sorted(layer, key=lambda b: (sum(centre[b]) / len(centre[b]), place[b]))):
                place[box] = i
        count = sum(_crossings(gap, place) for gap in links)
        if count < fewest:
            best, fewest = dict(place), count
    place, improved = best, True
    while improved:
        improved = False
        for number, layer in enumerate(layers):
            around = links[max(number - 1, 0) : number + 1]
            layer.sort(key=place.get)
            for a, b in pairwise(list(layer)):
                before = sum(_crossings(gap, place) for gap in around)
                place[a], place[b] = place[b], place[a]
                if sum(_crossings(gap, place) for gap in around) < before:
                    improved = True
                    break  # the list of neighbours is stale
                place[a], place[b] = place[b], place[a]
    return [sorted(layer, key=place.get) for layer in layers]


def _spread(wanted, heights):
    """Positions nearest to `wanted` (least squares) that keep the order and the gaps: pool adjacent violators."""
    offsets = [0.0]
    for above, below in pairwise(heights):
        offsets.append(offsets[-1] + (above + below) / 2 + ROW_GAP)
    groups = []  # [mean, size]
    for want, offset in zip(wanted, offsets, strict=True):
        groups.append([want - offset, 1])
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (m, n), (k, o) = groups[-2], groups.pop()
            groups[-1] = [(m * n + k * o) / (n + o), n + o]
    means = [mean for mean, size in groups for _ in range(size)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def layout(edges, title, concat=(), inputs=()):
    """Place a cell: (boxes, lines, width, height) in pixels; `cell_svg` describes the arguments.

    A line is (four points of a Bezier curve, x up to which it goes straight on, dashed, has an arrow).
    """
    boxes, routes = _build(edges, concat, inputs)
    layers = [[] for _ in range(max(box.layer for box in boxes) + 1)]
    for index, box in enumerate(boxes):
        layers[box.layer].append(index)
    dashed = {}  # (box, box) in neighbouring layers; a line that several edges share is drawn once
    for operation, route in routes:
        for link in pairwise(route):
            dashed[link] = dashed.get(link, True) and operation == "none"
    links = [[] for _ in layers[1:]]
    near = [[] for _ in boxes]
    for a, b in dashed:
        links[boxes[a].layer].append((a, b))
        weight = 6 if boxes[a].kind == boxes[b].kind == "bend" else 1  # long lines should run straight
        near[a].append((b, weight))
        near[b].append((a, weight))
    layers = _order(layers, links)

    for sweep in range(41):  # pull every box towards its neighbours; the last sweep runs forward
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = [
                sum(boxes[n].y * w for n, w in near[i]) / sum(w for _, w in near[i]) if near[i] else 0.0 for i in layer
            ]
            for index, y in zip(layer, _spread(wanted, [boxes[i].height for i in layer]), strict=True):
                boxes[index].y = y
    top = min(box.y for box in boxes) - BOX_HEIGHT / 2 - MARGIN - TITLE_HEIGHT
    x = MARGIN
    for number, layer in enumerate(layers):
        width = max(max(len(boxes[i].text) * CHAR_WIDTH + 18 for i in layer), 30)
        for index in layer:
            boxes[index].x, boxes[index].width = x, width
            boxes[index].y -= top
        x += width + (GAP_INTO_NODE if number % 2 else GAP_INTO_OP)

    lines = []
    for link, is_dashed in dashed.items():
        a, b = (boxes[i] for i in link)
        start, end = a.x + a.width, b.x
        points = [(start, a.y), ((start + end) / 2, a.y), ((start + end) / 2, b.y), (end, b.y)]
        lines.append((points, end + (b.width if b.kind == "bend" else 0), is_dashed, b.kind == "node"))
    boxes = [box for box in boxes if box.kind != "bend"]
    width = max(max(box.x + box.width for box in boxes), MARGIN + len(title) * CHAR_WIDTH * 1.3) + MARGIN
    height = max(y for y in [box.y for box in boxes] + [points[-1][1] for points, *_ in lines])
    return boxes, lines, width, height + BOX_HEIGHT / 2 + MARGIN


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
    title = "".join(c if c.isprintable() else "?" for c in title)  # it may be a file's name, and XML is choosy
    boxes, lines, width, height = layout(edges, title, concat, inputs)
    said = "; ".join(f"{source} to {target}: {operation}" for source, target, operation in edges)
    said += f". The output c_{{k}} concatenates {', '.join(concat)}." if concat else "."
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'font-family="{FONT}" font-size="{FONT_SIZE}">',
        f"<title>{escape(title)}</title><desc>{escape(said)}</desc>",
        f"<style>{theme_css()}</style>" if standalone else "",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" {paint(fill="paper")}/>',
        f'<text x="{MARGIN}" y="{MARGIN + 10}" font-size="14" font-weight="600" {paint(fill="ink")}>'
        f"{escape(title)}</text>",
    ]
    for points, straight, dashed, arrow in lines:
        (ax, ay), (bx, by), (cx, cy), (x, y) = points
        path = f"M{ax:.1f} {ay:.1f}C{bx:.1f} {by:.1f} {cx:.1f} {cy:.1f} {x:.1f} {y:.1f}H{straight:.1f}"
        dashes = ' stroke-dasharray="4 4"' if dashed else ""
        out.append(f'<path data-kind="line" d="{path}" fill="none" stroke-width="1.5"{dashes} {paint(stroke="line")}/>')
        if arrow:
            out.append(f'<path d="M{x:.1f} {y:.1f}l-8 -4v8z" {paint(fill="line")}/>')
    for box in boxes:
        colour = COLOUR.get(box.text, "line") if box.kind == "op" else "ink"
        fill = paint(fill="node" if box.kind == "node" else "paper", stroke=colour)
        dashes = ' stroke-dasharray="4 3"' if box.text == "none" else ""
        out.append(
            f'<rect data-kind="{box.kind}" x="{box.x:.1f}" y="{box.y - BOX_HEIGHT / 2:.1f}" width="{box.width:.1f}" '
            f'height="{BOX_HEIGHT}" rx="{13 if box.kind == "node" else 4}" stroke-width="1.6"{dashes} {fill}/>'
            f'<text x="{box.x + box.width / 2:.1f}" y="{box.y + 4:.1f}" text-anchor="middle" {paint(fill="ink")}>'
            f"{escape(box.text)}</text>"
        )
    return "\n".join([*filter(None, out), "</svg>", ""])


def cell_png(edges, title, file, concat=(), inputs=()):
    """The same drawing as PNG, into an open binary file. Needs matplotlib, but no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch, PathPatch
        from matplotlib.path import Path
    except ImportError as error:
        raise UserError("--format png needs matplotlib, which is not installed: pip install matplotlib, or ask for "
                        "--format svg, which needs nothing") from error  # fmt: skip
    boxes, lines, width, height = layout(edges, title, concat, inputs)
    figure = Figure(figsize=(width / 72, height / 72), dpi=150, facecolor=PALETTE["paper"][0])
    FigureCanvasAgg(figure)  # draws into memory whatever backend the host prefers
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    text = {"color": PALETTE["ink"][0], "parse_math": False}
    axes.text(MARGIN, MARGIN + 10, title, fontsize=12, fontweight="bold", **text)
    line = PALETTE["line"][0]
    for points, straight, dashed, arrow in lines:
        x, y = points[-1]
        path = Path([*points, (straight, y)], [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO])
        style = {"linestyle": "--" if dashed else "-", "linewidth": 1.2, "zorder": 1}
        axes.add_patch(PathPatch(path, facecolor="none", edgecolor=line, **style))
        if arrow:
            axes.fill((x, x - 8, x - 8), (y, y - 4, y + 4), color=line, linewidth=0)
    for box in boxes:
        colour = COLOUR.get(box.text, "line") if box.kind == "op" else "ink"
        axes.add_patch(FancyBboxPatch(
            (box.x, box.y - BOX_HEIGHT / 2), box.width, BOX_HEIGHT, linewidth=1.3, edgecolor=PALETTE[colour][0],
            boxstyle=f"round,pad=0,rounding_size={13 if box.kind == 'node' else 4}",
            facecolor=PALETTE["node" if box.kind == "node" else "paper"][0],
            linestyle="--" if box.text == "none" else "-",
        ))  # fmt: skip
        axes.text(box.x + box.width / 2, box.y, box.text, fontsize=9, ha="center", va="center_baseline", **text)
    figure.savefig(file, format="png")


# ---------------------------------------------------------------------------------------------------------------
# Architectures


def parse_arch(arch):
    """[(source, target, operation)] by node number of `|op~0|+|op~0|op~1|+...`. Raises UserError."""
    wrong = UserError(
        f"{arch[:200]!r} is not a NAS-Bench-201 architecture: expected |op~0|+|op~0|op~1|+|op~0|op~1|op~2| with "
        f"operations from {', '.join(NAS201_OPERATIONS)}"
    )
    edges = []
    for target, node in enumerate(arch.split("+"), start=1):
        if not re.fullmatch(r"\|(\w+~\d+\|)+", node, flags=re.ASCII):
            raise wrong
        pairs = [part.split("~") for part in node[1:-1].split("|")]
        if [source for _, source in pairs] != [str(i) for i in range(target)]:
            raise wrong
        if any(operation not in NAS201_OPERATIONS for operation, _ in pairs) or target > 16:
            raise wrong
        edges += [(int(source), target, operation) for operation, source in pairs]
    return edges


def cells(architecture):
    """{file name: keyword arguments of `cell_svg`} of a Genotype or an arch string."""
    if isinstance(architecture, str):
        edges = parse_arch(architecture)
        last = edges[-1][1]
        name = {**{i: str(i) for i in range(last)}, 0: "0 (input)", last: f"{last} (output)"}
        return {"cell": {"edges": [(name[a], name[b], op) for a, b, op in edges]}}
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
    import genotypes

    if not str(path).endswith(".pickle"):
        value = read_json(path)
        if isinstance(value, dict) and "arch" in value:
            if not isinstance(value["arch"], str):
                raise UserError(f'{path}: "arch" is not a string')
            try:
                parse_arch(value["arch"])
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            return value["arch"]
    return genotypes.load(path)


def find(target):
    """(architecture, name, folder for its drawings) of what the command line names. Raises UserError."""
    import genotypes

    if target.lstrip().startswith("|"):
        return target.strip(), "", "."
    if os.path.isdir(target):
        for file in ("genotype.json", "genotype.pickle"):
            if os.path.exists(os.path.join(target, file)):
                return load_architecture(os.path.join(target, file)), "", target
        raise UserError(f"{target} has no genotype.json: not a run directory, or its first generation is not over")
    if os.path.isfile(target):
        return load_architecture(target), os.path.splitext(os.path.basename(target))[0], "."
    if os.sep in target or target.endswith((".json", ".pickle")):
        raise UserError(f"there is no file or directory {target}: give a genotype file, a run directory or a name")
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
        path = os.path.join(folder, f"{file.replace('cell', name, 1) if name else file}.{format}")
        with atomic_write(path) as output:
            if format == "png":
                cell_png(title=title_of(file, name), file=output, **cell)
            else:
                output.write(cell_svg(title=title_of(file, name), **cell).encode())
        paths.append(path)
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
        print("\n".join(str(path) for path in paths))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
