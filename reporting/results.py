"""The part of a search's report on its result: the winner, random architectures and the front."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from html import escape

import genotype_files
from reporting.cells import cell_svg
from reporting.charts import (
    Marks,
    definition_list,
    finite_values,
    format_number,
    of_group,
    points,
    rising,
    scatter,
    scrolling,
    section,
    table,
)
from reporting.reported_run import ReportedRun
from reporting.views import drawings_of
from support.files import UserError, read_bytes, read_json

MOST_DRAWN = 6  # cells of the front that are drawn; all of them are there as text
WHY_NOT_FIRST = (
    "The winner was the fittest of the last generation, as measured in that generation. The charts show a second "
    "measurement with the final weights, on other augmented images, so another individual can be ahead of the winner."
)


def result_section(run: ReportedRun) -> str:
    """Return the section on the winner, random architectures and the front.

    What is damaged is noted in `run.missing`.
    """
    card = ""
    charts = []
    final = []
    with noting_damage(run, "individuals.csv"):
        final = final_rows(run)
    if os.path.exists(run.file("baselines.json")):
        with noting_damage(run, "baselines.json"):
            result = read_json(run.file("baselines.json"))
            card += result_card(run, result)
            charts += run.view.result_charts(result, final)
    if os.path.exists(run.file("pareto.json")):
        with noting_damage(run, "pareto.json"):
            pareto = read_json(run.file("pareto.json"))
            cost_charts = charts_of_costs(pareto, final)
            if cost_charts:
                card += f"<p>{WHY_NOT_FIRST} The charts of costs show {escape(pareto['about'])}.</p>"
                card += front_list(run, pareto["front"])
            charts += cost_charts
    return section("The winner and random architectures", *charts, card=card)


@contextlib.contextmanager
def noting_damage(run: ReportedRun, name: str) -> Iterator[None]:
    """Note in `run.missing` that a file is damaged, if the block cannot use its content."""
    try:
        yield
    except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
        run.missing.append(f"Part of the winner's comparison: {name} is damaged ({error!s:.200}).")


def result_card(run: ReportedRun, result: dict) -> str:
    """Return what baselines.json says of the winner."""
    from costs import COSTS  # imports torch

    winner = [result["winner"]]
    values = {"Winner's fitness, %": finite_values(winner, "fitness")}
    values |= {f"Winner's {cost.axis}": finite_values(winner, cost.name) for cost in COSTS}
    values["Mean of random architectures, %"] = finite_values([result], "random_mean")
    values["Best of random architectures, %"] = finite_values([result], "random_best")
    figures = {name: format_number(found[0]) for name, found in values.items() if found}
    sentence = result["sentence"]
    card = f"<p>{escape(sentence[:1].upper() + sentence[1:])}.</p>"
    card += f"<p>Retrain it with:</p><pre>{escape(result['retrain'])}</pre>"
    return card + definition_list(figures) + run.view.tables(result)


def final_rows(run: ReportedRun) -> list[dict]:
    """Return the rows of individuals.csv that were measured with the final weights, [] without it.

    Numbers are floats; an empty cell is None. Raises ValueError for what is not such a table.
    """
    path = run.file("individuals.csv")
    if not os.path.exists(path):
        return []
    reader = csv.DictReader(io.StringIO(read_bytes(path).decode()))
    texts = ("group", "weights", "cell")
    rows = []
    try:
        for row in reader:
            if row["weights"] == "final":
                numbers = {key: float(value) if value else None for key, value in row.items() if key not in texts}
                rows.append({key: row[key] for key in texts} | numbers)
    except csv.Error as error:
        raise ValueError(error) from error
    return rows


def charts_of_costs(pareto: dict, final: Sequence[dict]) -> list[str]:
    """Return a chart of fitness against each cost that was measured."""
    from costs import COSTS  # imports torch

    charts = []
    for cost in COSTS:
        individuals = points(pareto["individuals"], cost.name)
        front = points(pareto["front"], cost.name)
        if not individuals or not front:
            continue
        groups = [
            Marks("random architectures", "yellow", "x", points(of_group(final, "random architectures"), cost.name)),
            Marks(f"{len(individuals)} individuals", "grey", "o", individuals),
            Marks("front", "blue", "o-", rising(front)),
            Marks("winner", "red", "*", individuals[:1]),
        ]
        title = f"Fitness against {cost.axis}"
        body = [[str(n), *(format_number(value, 3) for value in point)] for n, point in enumerate(front, start=1)]
        numbers = table(f"{title}: the front", ["--pick", cost.axis, "fitness, %"], body)
        charts.append(scatter(title, "on the final weights", cost.axis, groups, numbers))
    return charts


def front_list(run: ReportedRun, front: Sequence[dict]) -> str:
    """Return the cells of the front, numbered as `train.py --pick` counts them."""
    from costs import COSTS  # imports torch

    lines = ""
    for number, entry in enumerate(front, start=1):
        figures = [f"fitness {format_number(value)} %" for value in finite_values([entry], "fitness")]
        for cost in COSTS:
            figures += [f"{format_number(value)} {cost.unit}" for value in finite_values([entry], cost.name)]
        cell = genotype_files.from_json(entry["genotype"], f"pareto.json, front, number {number}")
        content = ""
        if number <= MOST_DRAWN:
            drawings = drawings_of(cell, run.views).values()
            content = "".join(scrolling(cell_svg(drawing), drawing.title) for drawing in drawings)
        text = cell if isinstance(cell, str) else json.dumps(genotype_files.to_dict(cell))
        content += f"<pre>{escape(text)}</pre>"
        lines += f"<details><summary>--pick {number}: {escape(', '.join(figures))}</summary>{content}</details>"
    return f"<p>The front, fittest first. Retrain one of its cells with <code>--pick NUMBER</code>:</p>{lines}"
