"""The report of a run: one self-contained HTML page, made from the files in the run directory.

The page needs no network and no script. Charts are SVG, drawn by matplotlib, and each chart has a
table of its numbers.

`write_report` reads the run (`read_run`), makes the sections (`sections`) and puts the sections on
a page (`render`). Each section is HTML, or "" if there is nothing to show. `ReportedRun.missing`
collects what the report lacks, and the report shows that list.
"""

import contextlib
import json
import os
import statistics
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import genotype_files
from genotypes import Cell
from reporting.cells import OTHER, cell_svg, load_cell, write_cell
from reporting.charts import (
    Band,
    Line,
    chart,
    column,
    definition_list,
    finite_values,
    format_number,
    scrolling,
    section,
    step_of,
    table,
)
from reporting.reported_run import ReportedRun, read_run
from reporting.results import result_section
from reporting.views import SpaceView, Views, drawings_of
from support.files import UserError, atomic_write, escaped, quoted, read_json

if TYPE_CHECKING:
    from support.runs import Run  # importing torch takes seconds

CSS = """
:root{color-scheme:light dark;--page:#f3f5f8;--card:#fff;--ink:#1b1f27;--soft:#5a6270;--rule:#dde1e7}
@media(prefers-color-scheme:dark){:root{--page:#0e1015;--card:#121212;--ink:#eceff4;--soft:#a9b1bf;--rule:#343a45}}
*{box-sizing:border-box}
body{max-width:1240px;margin:0 auto;padding:24px 16px 48px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}h2{font-size:18px;margin:32px 0 12px}p{margin:0 0 12px}
p,dt,small,caption,summary,thead{color:var(--soft)}
.charts,dl{display:grid;gap:12px;margin:12px 0 0;grid-template-columns:repeat(auto-fill,minmax(min(100%,345px),1fr))}
dl{grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr));gap:0 24px;margin:0}
.card,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;min-width:0;margin:0;padding:14px}
.missing{margin-top:16px;border-color:#c96a00}
dl div{display:flex;justify-content:space-between;gap:12px;border-bottom:1px solid var(--rule);padding:3px 0}
dd{margin:0;text-align:right;overflow-wrap:break-word;max-width:75%}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 12px}
figcaption{font-weight:600;margin-bottom:6px}small{font-weight:400}figure>svg{display:block;width:100%;height:auto}
small,pre,details{font-size:13px}
.wide{overflow-x:auto;margin-top:8px}.wide>svg{display:block}details .wide{max-height:320px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}caption{text-align:left}
th,td{padding:4px 8px;text-align:right;border-bottom:1px solid var(--rule)}th:first-child{text-align:left}
"""

# The Content-Security-Policy makes the browser refuse scripts and network access, whatever the page
# contains.
PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel=icon href="data:,"><title>{title}</title><style>{css}</style></head>
<body><h1>{title}</h1><p>{about}</p>
{body}
</body></html>
"""


# ---- from run directory to page


def write_report(run_dir: str | os.PathLike, views: Views) -> str:
    """Write RUN_DIR/report.html from what the run has saved so far; return the report's path.

    `views` holds the views of all search spaces that the run may belong to. The report lists
    information that is missing. Raises UserError if `run_dir` is not a run directory, if a line of history.jsonl
    is not valid, or if the report cannot be written.
    """
    run = read_run(run_dir, views)
    page = render(run, sections(run))
    path = os.path.join(run_dir, "report.html")
    with atomic_write(path) as file:
        file.write(page.encode())
    return path


def sections(run: ReportedRun) -> list[str]:
    """Return the sections of a report, in order."""
    parts = search_sections(run) if run.is_search else retraining_sections(run)
    return [summary_section(run), missing_card(run.missing), *parts, settings_section(run)]


def search_sections(run: ReportedRun) -> list[str]:
    """Return the sections on the cell, fitness, operations and time of a search."""
    cell = cell_section(run, "Best cell of the last generation")
    if not run.rows:
        run.missing.append("The charts: history.jsonl has no generation yet.")
        return [cell]
    if not finite_values(run.rows, "fitness_best"):
        run.missing.append("Fitness: it was not measured in any generation.")
    return [
        cell,
        result_section(run),
        fitness_section(run.rows),
        run.view.section(run.rows, run.arguments.get("dataset")),
        population_section(run),
        time_section(run.rows),
    ]


def retraining_sections(run: ReportedRun) -> list[str]:
    """Return the sections on accuracy, cell and time of a retraining."""
    cell = cell_section(run, "Cell")
    if not run.rows:
        run.missing.append("The charts: history.jsonl has no epoch yet.")
        return [cell]
    return [accuracy_section(run.rows), class_section(run), cell, time_section(run.rows)]


def render(run: ReportedRun, parts: list[str]) -> str:
    """Return the HTML page of a run with the sections `parts`."""
    title = run.view.title if run.is_search else "EvNAS retraining"
    words = [run.arguments.get("dataset"), run.about.get("started"), os.path.basename(os.path.abspath(run.path))]
    about = escape(" · ".join(str(word) for word in words if word))
    return page_of(title, about, parts)


def page_of(title: str, about: str, parts: Sequence[str]) -> str:
    """Return an HTML page with these sections. `about` is the HTML of the line below the title."""
    page = PAGE.format(title=title, css=CSS, about=about, body="\n".join(parts))
    return "\n".join(escaped(line) for line in page.split("\n"))


# ---- sections


def summary_section(run: ReportedRun) -> str:
    """Return the section with the most important figures of a run."""
    if not run.rows:
        return ""
    last = run.rows[-1:]
    total = sum(finite_values([*run.rows, *last_measurement(run)], "seconds"))
    minutes, seconds = divmod(int(total), 60)
    figures = {
        f"{run.step.capitalize()}s": f"{last[0][run.step]} of {run.arguments.get('epochs', '?')}",
        "Time": f"{minutes} min {seconds} s",
    }
    names = {
        "fitness_best": "Best fitness, %",
        "fitness_mean": "Mean fitness, %",
        "distinct": "Distinct architectures",
        "test_top1": "Test top-1 accuracy, %",
        "best_top1": "Best test top-1 accuracy, %",
    }
    for key, name in names.items():
        for value in finite_values(last, key):
            figures[name] = format_number(value)
    if run.is_search and (images := validation_images(run)):
        figures["Validation images"] = f"{images:,} (one is {100 / images:.2g} % of fitness)"
    for value in finite_values(last, "test_top1"):
        figures["Test error, %"] = format_number(100 - value)
    if speeds := finite_values(run.rows, "images_per_second"):
        figures["Median throughput, images/s"] = format_number(statistics.median(speeds), 0)
    if memory := finite_values(run.rows, "peak_memory_mb"):
        figures["Peak memory"] = f"{format_number(max(memory), 0)} MB"
    return section("Summary", card=definition_list(figures))


def validation_images(run: ReportedRun) -> int | None:
    """Return the number of validation images in args.json, None if it is not there."""
    try:
        images = run.about["data"]["images"]["valid"]
    except (KeyError, TypeError):
        return None
    return images if type(images) is int and images > 0 else None


def last_measurement(run: ReportedRun) -> list[dict]:
    """Return the content of baselines.json, whose "seconds" are part of a search's time, in a list.

    The list is empty if there is no such file. Another section notes a damaged file.
    """
    with contextlib.suppress(UserError):
        result = read_json(run.file("baselines.json"))
        return [result] if isinstance(result, dict) else []
    return []


def missing_card(missing: Sequence[str]) -> str:
    """Return a card that lists what the report lacks; "" if it lacks nothing."""
    if not missing:
        return ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in missing)
    return f"<div class='card missing'>Missing from this report:<ul>{notes}</ul></div>"


def cell_section(run: ReportedRun, title: str) -> str:
    """Return the drawings of the cell in genotype.json, or else in the history's last row."""
    try:
        cell = cell_of(run)
        drawings = drawings_of(cell, run.views)
    except UserError as error:
        run.missing.append(f"The drawing of the cell: {error}")
        return ""
    card = "".join(scrolling(cell_svg(drawing), drawing.title) for drawing in drawings.values())
    text = cell if isinstance(cell, str) else json.dumps(genotype_files.to_dict(cell))
    card += f"<details><summary>The cell as text</summary><pre>{escape(text)}</pre></details>"
    return section(title, card=card)


def cell_of(run: ReportedRun) -> Cell:
    """Return the best cell of a search or the cell of a retraining. Raises UserError."""
    path = run.file("genotype.json")
    if os.path.exists(path):
        return load_cell(path, run.views)
    last = run.rows[-1].get("best_genotype") if run.rows else None
    if not last:
        raise UserError("there is no genotype.json yet")
    cell = genotype_files.from_json(last, "history.jsonl, last line")
    run.missing.append("genotype.json: the report shows the cell in the last line of history.jsonl instead.")
    return cell


def fitness_section(rows: list[dict]) -> str:
    """Return the charts of fitness and of the training of the shared weights."""
    fitness = [Line("best", "red", "fitness_best"), Line("mean", "blue", "fitness_mean")]
    band = Band("fitness_mean", "fitness_std")
    top1 = [Line("top-1", "green", "train_top1")]
    loss = [Line("loss", "purple", "train_loss")]
    return section(
        "Fitness and training",
        chart(rows, "Fitness", "top-1 accuracy on validation images, %", fitness, band, highest=100),
        chart(rows, "Training accuracy", "of the shared weights, %", top1, highest=100),
        chart(rows, "Training loss", "of the shared weights", loss),
    )


def accuracy_section(rows: list[dict]) -> str:
    """Return the charts of loss and accuracy of a retraining."""
    loss = [Line("training", "blue", "train_loss"), Line("test", "red", "test_loss")]
    top1 = [
        Line("best test so far", "orange", "best_top1"),
        Line("training", "blue", "train_top1"),
        Line("test", "red", "test_top1"),
    ]
    top5 = [Line("test", "red", "test_top5")]
    return section(
        "Loss and accuracy",
        chart(rows, "Loss", "cross-entropy", loss),
        chart(rows, "Top-1 accuracy", "%", top1, highest=100),
        chart(rows, "Top-5 accuracy", "%", top5, highest=100),
    )


def class_section(run: ReportedRun) -> str:
    """Return the section on accuracy by class, from test.json; "" if there is no such file."""
    if not os.path.exists(run.file("test.json")):
        return ""
    try:
        result = read_json(run.file("test.json"))
        classes = [str(name) for name in result["classes"]]
        counts = [[int(number) for number in row] for row in result["confusion"]]
        body = []
        for i, (name, accuracy) in enumerate(zip(classes, result["accuracy_by_class"], strict=True)):
            mistakes = sorted((j for j in range(len(classes)) if j != i and counts[i][j]), key=lambda j: -counts[i][j])
            taken_for = ", ".join(f"{classes[j]} ({counts[i][j]})" for j in mistakes[:3])
            body.append([escape(name), format_number(accuracy), str(sum(counts[i])), escape(taken_for) or "–"])
        about = f"Of {result['images']} images of {result['dataset']}, with {os.path.basename(result['weights'])}"
    except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
        run.missing.append(f"Accuracy by class: test.json is damaged ({error!s:.200}).")
        return ""
    head = ["Class", "Accuracy, %", "Images", "Most often taken for"]
    return section("Accuracy by class", card=table(about, head, body))


def population_section(run: ReportedRun) -> str:
    """Return the charts of each generation's population: operations and distinct architectures."""
    import populations

    rows = []
    errors = {}  # {generation: why its population cannot be read}
    for row in run.rows:
        generation = row["generation"]
        try:
            shares = operation_shares(populations.path_of(run.path, generation), run.view)
        except UserError as error:
            shares = {}
            errors[str(generation)] = str(error)
        rows.append(row | shares)
    if errors:
        first = "; ".join(list(errors.values())[:8])
        run.missing.append(f"The operations of generation {', '.join(errors)}: {first}.")
    charts = []
    for cell_name in run.view.cell_names:
        lines = operation_lines(rows, cell_name, run.view)
        charts.append(chart(rows, f"Operations, {cell_name}", "% of edges", lines, from_zero=True))
    distinct = [Line("distinct architectures", "orange", "distinct")]
    charts.append(chart(rows, "Distinct architectures", "in the population", distinct, from_zero=True))
    return section("Population", *charts)


def operation_lines(rows: list[dict], cell_name: str, view: SpaceView) -> list[Line]:
    """Return a chart's line for each operation that occurs in cells of this name.

    Operations without a colour of their own are grey.
    """
    lines = []
    for operation in dict.fromkeys([*view.colours, *view.operations]):  # in the order of the colours
        line = Line(operation, view.colours.get(operation, OTHER), f"{cell_name} {operation}")
        if any(column(rows, line.key)):
            lines.append(line)
    return lines


def operation_shares(path: str | os.PathLike, view: SpaceView) -> dict[str, float]:
    """Return {"normal cell max_pool_3x3": percent of edges, ...} for a saved population.

    Raises UserError if the file is not a population of this space.
    """
    import torch

    import populations

    alphas = torch.from_numpy(populations.load(path).alphas)  # (P, G, E, O)
    try:
        counts = view.decode(alphas).sum((0, 2))  # (G, O)
        if counts.shape != (len(view.cell_names), len(view.operations)):
            raise ValueError(f"alphas have the shape {tuple(alphas.shape)}")
    except (IndexError, RuntimeError, ValueError) as error:  # the alphas are those of another space
        raise UserError(f"{path}: not a saved population ({type(error).__name__}: {error})") from error
    shares = 100 * counts / counts.sum(1, keepdims=True)
    names = [f"{cell} {operation}" for cell in view.cell_names for operation in view.operations]
    return dict(zip(names, shares.flatten().tolist(), strict=True))


def time_section(rows: list[dict]) -> str:
    """Return the charts of time, throughput and learning rate."""
    seconds = [Line("seconds", "blue", "seconds")]
    throughput = [Line("images/s", "green", "images_per_second")]
    lr = [Line("learning rate", "purple", "lr")]
    return section(
        "Time",
        chart(rows, f"Time per {step_of(rows)}", "seconds", seconds, from_zero=True),
        chart(rows, "Throughput", "images/s", throughput, from_zero=True),
        chart(rows, "Learning rate", "", lr, from_zero=True),
    )


def settings_section(run: ReportedRun) -> str:
    """Return the section with the command, the arguments and the versions of a run."""
    if not run.about:
        return ""
    circumstances = {key: run.about[key] for key in ("git", "threads", "started") if key in run.about}
    card = f"<pre>{escape(str(run.about.get('command', '')))}</pre>"
    card += definition_list(run.arguments)
    card += "<h3>Versions</h3>" + definition_list(run.about["versions"] | circumstances)
    return section("Settings", card=card)


# ---- the end of a run


def finish_run(run: "Run", cell: Cell, view: SpaceView) -> None:
    """Draw the cell and write the report of a run that has finished.

    If drawing or writing fails, the log says why and how to try again. The run's results are
    already saved at this point.
    """
    if not run.writes:
        return
    views = {view.name: view}
    try:
        write_cell(run.path, cell, views)
        run.log(f"finished; report: {write_report(run.path, views)}")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        again = f"python visualize.py --report {quoted(run.path)}"
        run.log(f"finished, but without a report ({reason}); to try again: {again}")
