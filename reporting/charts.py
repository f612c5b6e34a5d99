"""Charts of a history, drawn by matplotlib as SVG, and the tables below them."""

from html import escape

from reporting import cells
from reporting.cells import PALETTE

# Of a chart, for matplotlib; it is 4.2 inches wide, so that its text stays legible at 330 pixels.
STYLE = {
    "font.size": 9.5, "text.color": PALETTE["ink"], "axes.labelcolor": PALETTE["soft"], "axes.xmargin": 0,
    "axes.formatter.useoffset": False, "axes.formatter.limits": (-6, 6), "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "axes.edgecolor": PALETTE["rule"], "axes.spines.left": False, "axes.spines.right": False,
    "axes.spines.top": False, "grid.color": PALETTE["rule"], "xtick.bottom": False, "ytick.left": False,
    "xtick.labelcolor": PALETTE["soft"], "ytick.labelcolor": PALETTE["soft"], "legend.frameon": False,
    "legend.fontsize": 9, "legend.handlelength": 1.2, "legend.columnspacing": 1.2, "legend.handletextpad": 0.5,
    "lines.markersize": 3, "figure.facecolor": PALETTE["paper"], "axes.facecolor": "none",
}  # fmt: skip


def step_of(rows):
    """Return what the rows of a history count."""
    return "generation" if "generation" in rows[0] else "epoch"


def column(rows, key):
    """Return the values of a key, such as "lr" or "true_accuracy/cifar10/test", None where none is a finite number."""
    values = []
    for value in rows:
        for name in key.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        values.append(float(value) if type(value) in (int, float) and abs(value) < 1e15 else None)
    return values


def finite_values(rows, key):
    """Return those values of a key that are finite numbers."""
    return [value for value in column(rows, key) if value is not None]


def show(value, digits=2):
    """Write a number as people do, and a dash where there is none."""
    if value is None:
        return "–"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if abs(value) >= 0.1 else f"{value:.3g}"


def wide(content, label):
    """Return HTML that scrolls by itself where the page is narrower than `content`."""
    return f'<div class=wide tabindex=0 role=region aria-label="{label}">{content}</div>'


def pairs(values):
    """Return an HTML list of names and values."""
    shown = ((escape(name), "–" if value in (None, "") else escape(str(value))) for name, value in values.items())
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in shown)}</dl>"


def table(caption, head, rows):
    """Return an HTML table; the first column is the rows' header."""
    caption, heads = escape(caption), "".join(f"<th scope=col>{name}</th>" for name in head)
    body = ""
    for first, *values in rows:
        body += f"<tr><th scope=row>{first}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
    content = f"<caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    return wide(f"<table>{content}</table>", caption)


def chart(rows, title, note, lines, band=None, levels=(), zero=False):
    """Return a chart of lines [(label, colour, key of the rows)] and its numbers; "" where there is no value.

    band: the keys of a mean and its deviation. levels: [(label, colour, value)], dashed. zero: begin the axis at 0.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    step = step_of(rows)
    steps = [row[step] for row in rows]
    lines = [(label, colour, column(rows, name)) for label, colour, name in lines if finite_values(rows, name)]
    if not lines:
        return ""
    description = ""
    with cells.default_settings(STYLE):
        figure = Figure(figsize=(4.2, 2.6 + 0.08 * len([*lines, *levels])), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(step)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for label, colour, values in lines:
            finite = [value for value in values if value is not None]
            first, last, lowest, highest = map(show, (finite[0], finite[-1], min(finite), max(finite)))
            description += f"{label}: {first} at first, {last} at last; lowest {lowest}, highest {highest}. "
            style = "o-" if len(steps) <= 60 else "-"
            axes.plot(steps, np.array(values, float), style, color=PALETTE[colour], label=f"{label} {last}")
        if band:
            mean, deviation = (np.array(column(rows, name), float) for name in band)
            about = {"color": PALETTE["blue"], "alpha": 0.2, "lw": 0, "label": "mean ± one deviation"}
            axes.fill_between(steps, mean - deviation, mean + deviation, **about)
        for label, colour, value in levels:
            axes.axhline(value, ls="--", color=PALETTE[colour], label=f"{label} {show(value)}")
        if zero:
            axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower left", ncols=2)
        svg = cells.svg_of(figure, title, description)
    numbers = zip(steps, *([show(v, 3) for v in values] for _, _, values in lines), strict=True)
    return framed(title, note, svg, table(f"{title} by {step}", [step, *(label for label, *_ in lines)], numbers))


def framed(title, note, svg, numbers):
    """Return a chart with its heading, and its table to be unfolded."""
    return (
        f"<figure><figcaption>{title} <small>{note}</small></figcaption>{svg}"
        f"<details><summary>Numbers</summary>{numbers}</details></figure>"
    )


def scatter(title, note, axis, dots, front):
    """Return a chart of fitness against a cost, of (cost, fitness), and its front in numbers; the first dot won.

    The line goes through those of the front that are not dominated in this cost alone.
    """
    from matplotlib.figure import Figure

    line, (cost, fitness) = [], dots[0]
    for point in sorted(front, key=lambda point: (point[0], -point[1])):
        line += [point] if not line or point[1] > line[-1][1] else []
    with cells.default_settings(STYLE):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.set_xmargin(0.05)
        axes.set_xlabel(axis)
        axes.plot(*zip(*dots, strict=True), "o", color=PALETTE["grey"], label=f"{len(dots)} individuals")
        axes.plot(*zip(*line, strict=True), "o-", color=PALETTE["blue"], label="front")
        axes.plot(cost, fitness, "*", color=PALETTE["red"], markersize=11, label="winner")
        figure.legend(loc="outside lower left", ncols=3)
        described = f"{len(dots)} individuals; the winner has {show(cost)} {axis}, fitness {show(fitness)} %."
        svg = cells.svg_of(figure, title, described)
    numbers = [[show(v, 3) for v in point] for point in front]
    return framed(title, note, svg, table(f"{title}: the front", [axis, "fitness, %"], numbers))
