"""Charts of a history as SVG, drawn by matplotlib, and the HTML tables below them.

In this module, a row is one line of a run's history, as a dictionary.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from reporting import cells
from reporting.cells import PALETTE

# matplotlib's settings for a chart. The text of a chart that is 4.2 inches wide is still legible
# when a page shows the chart 330 pixels wide.
WIDTH = 4.2
STYLE = {
    "font.size": 9.5, "text.color": PALETTE["ink"], "axes.labelcolor": PALETTE["soft"], "axes.xmargin": 0,
    "axes.formatter.useoffset": False, "axes.formatter.limits": (-6, 6), "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "axes.edgecolor": PALETTE["rule"], "axes.spines.left": False, "axes.spines.right": False,
    "axes.spines.top": False, "grid.color": PALETTE["rule"], "xtick.bottom": False, "ytick.left": False,
    "xtick.labelcolor": PALETTE["soft"], "ytick.labelcolor": PALETTE["soft"], "legend.frameon": False,
    "legend.fontsize": 9, "legend.handlelength": 1.2, "legend.columnspacing": 1.2, "legend.handletextpad": 0.5,
    "lines.markersize": 3, "figure.facecolor": PALETTE["paper"], "axes.facecolor": "none",
}  # fmt: skip


# ---- numbers


def step_of(rows: Sequence[dict]) -> str:
    """Return the name of the step that the rows of a history count: "generation" or "epoch"."""
    return "generation" if "generation" in rows[0] else "epoch"


def column(rows: Iterable[dict], key: str) -> list[float | None]:
    """Return the values of a key, such as "lr" or "true_accuracy/cifar10/test".

    A value that is not a finite number becomes None. So does a number from 1e15 on, because no
    chart could show such a number.
    """
    values = []
    for value in rows:
        for name in key.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        usable = type(value) in (int, float) and abs(value) < 1e15  # False for bool, inf and NaN
        values.append(float(value) if usable else None)
    return values


def finite_values(rows: Iterable[dict], key: str) -> list[float]:
    """Return the values of a key that are finite numbers."""
    return [value for value in column(rows, key) if value is not None]


def format_number(value: float | None, digits: int = 2) -> str:
    """Return a number as text, or a dash for None.

    Numbers from 0.1 to 1000 have `digits` decimals. Whole numbers and numbers from 1000 on have no
    decimals. Numbers below 0.1 have three significant digits.
    """
    if value is None:
        return "–"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if abs(value) >= 0.1 else f"{value:.3g}"


# ---- HTML


def scrolling(content: str, label: str) -> str:
    """Return HTML in which `content` scrolls sideways if the page is narrower than `content`."""
    return f'<div class=wide tabindex=0 role=region aria-label="{label}">{content}</div>'


def definition_list(values: Mapping[str, object]) -> str:
    """Return an HTML list of names and values."""
    content = ""
    for name, value in values.items():
        text = "–" if value in (None, "") else escape(str(value))
        content += f"<div><dt>{escape(name)}</dt><dd>{text}</dd></div>"
    return f"<dl>{content}</dl>"


def table(caption: str, head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """Return an HTML table.

    The first cell of each line of `body` is the heading of that line. Cells are HTML.
    """
    caption = escape(caption)
    heads = "".join(f"<th scope=col>{name}</th>" for name in head)
    lines = ""
    for first, *values in body:
        lines += f"<tr><th scope=row>{first}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
    content = f"<caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody>"
    return scrolling(f"<table>{content}</table>", caption)


def figure_with_table(title: str, subtitle: str, svg: str, numbers: str) -> str:
    """Return a chart with its title, and with a table of its numbers that the reader can unfold."""
    return (
        f"<figure><figcaption>{title} <small>{subtitle}</small></figcaption>{svg}"
        f"<details><summary>Numbers</summary>{numbers}</details></figure>"
    )


def section(title: str, *charts: str, card: str = "") -> str:
    """Return a section: a heading, a card, and charts side by side; "" without card and charts."""
    card = f"<div class=card>{card}</div>" if card else ""
    figures = f"<div class=charts>{''.join(charts)}</div>" if any(charts) else ""
    return f"<section><h2>{title}</h2>{card}{figures}</section>" if card or figures else ""


# ---- charts


class Line(NamedTuple):
    """A line of a chart."""

    label: str
    colour: str  # name in PALETTE
    key: str  # key of the line's values in the rows, see `column`


class Level(NamedTuple):
    """A dashed horizontal line of a chart."""

    label: str
    colour: str  # name in PALETTE
    value: float


class Band(NamedTuple):
    """The keys of a mean and a standard deviation. The chart shades mean ± standard deviation."""

    mean: str
    deviation: str


def chart(
    rows: Sequence[dict],
    title: str,
    subtitle: str,
    lines: Sequence[Line],
    band: Band | None = None,
    levels: Sequence[Level] = (),
    from_zero: bool = False,
    highest: float | None = None,
) -> str:
    """Return a chart of a history as HTML, with a table of its numbers; "" if no line has a value.

    With `from_zero` the vertical axis begins at 0. It ends at `highest` at the latest, if that is
    given: 100 for a percentage.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = [line for line in lines if finite_values(rows, line.key)]
    if not lines:
        return ""
    step = step_of(rows)
    steps = [row[step] for row in rows]
    columns = [column(rows, line.key) for line in lines]
    description = ""
    with cells.default_settings(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6 + 0.08 * (len(lines) + len(levels))), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(step)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for line, values in zip(lines, columns, strict=True):
            finite = [value for value in values if value is not None]
            last = format_number(finite[-1])
            description += f"{line.label}: {format_number(finite[0])} at first, {last} at last; "
            description += f"lowest {format_number(min(finite))}, highest {format_number(max(finite))}. "
            style = "o-" if len(steps) <= 60 else "-"
            axes.plot(steps, np.array(values, float), style, color=PALETTE[line.colour], label=f"{line.label} {last}")
        if band:
            mean = np.array(column(rows, band.mean), float)
            deviation = np.array(column(rows, band.deviation), float)
            look = {"color": PALETTE["blue"], "alpha": 0.2, "lw": 0, "label": "mean ± one standard deviation"}
            axes.fill_between(steps, mean - deviation, mean + deviation, **look)
        for level in levels:
            label = f"{level.label} {format_number(level.value)}"
            axes.axhline(level.value, ls="--", color=PALETTE[level.colour], label=label)
        if from_zero:
            axes.set_ylim(bottom=0)
        if highest is not None and axes.get_ylim()[1] > highest:
            axes.set_ylim(top=highest)
        figure.legend(loc="outside lower left", ncols=2)
        svg = cells.svg_of(figure, title, description)
    texts = [[format_number(value, 3) for value in values] for values in columns]
    numbers = table(title, [step, *(line.label for line in lines)], zip(steps, *texts, strict=True))
    return figure_with_table(title, subtitle, svg, numbers)


class Point(NamedTuple):
    """An individual in a scatter chart of fitness."""

    x: float  # a cost, or the true accuracy
    fitness: float  # percent


class Marks(NamedTuple):
    """The points of a scatter chart that look alike."""

    label: str
    colour: str  # name in PALETTE
    style: str  # as matplotlib's plot takes it: "o", "x", "*" or "o-"
    points: Sequence[Point]


def points(individuals: Sequence[dict], key: str) -> list[Point]:
    """Return `key` and fitness of those individuals that have both."""
    pairs = zip(column(individuals, key), column(individuals, "fitness"), strict=True)
    return [Point(*pair) for pair in pairs if None not in pair]


def of_group(final: Sequence[dict], group: str) -> list[dict]:
    """Return the rows of a group, such as "random architectures"."""
    return [row for row in final if row["group"] == group]


def scatter(title: str, subtitle: str, axis: str, groups: Sequence[Marks], numbers: str) -> str:
    """Return a chart of fitness against something as HTML.

    `axis` labels the horizontal axis. Later groups are drawn over earlier ones. `numbers` is the
    HTML of a table that the reader can unfold.
    """
    from matplotlib.figure import Figure

    groups = [group for group in groups if group.points]
    with cells.default_settings(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.set_xmargin(0.05)
        axes.set_xlabel(axis)
        axes.set_ylabel("fitness, %")
        for group in groups:
            size = 11 if group.style == "*" else 4
            look = {"color": PALETTE[group.colour], "markersize": size, "label": group.label}
            axes.plot(*zip(*group.points, strict=True), group.style, **look)
        figure.legend(loc="outside lower left", ncols=2)
        counts = ", ".join(f"{group.label}: {len(group.points)}" for group in groups)
        svg = cells.svg_of(figure, title, f"{counts}. {axis} and fitness of each are in the table of numbers.")
    return figure_with_table(title, subtitle, svg, numbers)


def rising(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point with a smaller or equal x reaches in fitness."""
    line = []
    for point in sorted(points, key=lambda point: (point.x, -point.fitness)):
        if not line or point.fitness > line[-1].fitness:
            line.append(point)
    return line
