"""The report of a run: one self-contained HTML page, drawn from the files of the run directory.

It needs no network and no script: charts are SVG by matplotlib, every chart has its numbers in a table below it.
"""

import json
import os
import statistics
from html import escape

import genotype_files
import genotypes
from reporting import cells
from reporting.cells import COLOUR
from reporting.charts import chart, column, finite_values, pairs, scatter, show, step_of, wide
from run_settings import SETTINGS
from support.files import (
    UserError,
    atomic_write,
    check_unpacked_size,
    escaped,
    open_regular,
    quoted,
    read_history,
    read_json,
)

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
dd{margin:0;text-align:right;overflow-wrap:anywhere}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 12px}
figcaption{font-weight:600;margin-bottom:6px}small{font-weight:400}figure>svg{display:block;width:100%;height:auto}
small,pre,details{font-size:13px}
.wide{overflow-x:auto;margin-top:8px}.wide>svg{display:block}details .wide{max-height:320px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}caption{text-align:left}
th,td{padding:4px 8px;text-align:right;border-bottom:1px solid var(--rule)}th:first-child{text-align:left}
"""

# The policy makes browsers hold the page to its word: no script, no network.
PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel=icon href="data:,"><title>{title}</title><style>{css}</style></head>
<body><h1>{title}</h1><p>{about}</p>
{body}
</body></html>
"""


class Space:
    """What a report has to know of a search space: here of the DARTS space; others register themselves in SPACES."""

    title = "EvNAS search, DARTS space"
    cells = ("normal cell", "reduction cell")  # in the order of the alphas' first axis
    cell_type = dict  # of the best cell in the history

    def encoding(self):
        """Return `decode` and the operations by name. Imported when needed, since that takes torch seconds."""
        import encoding

        return encoding.decode, genotypes.PRIMITIVES

    def section(self, rows, searched):
        """Return a section of its own; `searched` is the data set."""
        return ""

    def baselines(self, worth):
        """Return HTML on what baselines.json holds of this space alone."""
        return ""


COSTS = {"parameters_M": "parameters, M", "mult_adds_M": "mult-adds, M", "latency_ms": "latency, ms"}
SPACES = {"s1": Space()}  # by the name in args.json


# ---- reading a run


def operation_shares(path, space):
    """Return {"normal cell max_pool_3x3": percent of such cells' edges, ..} of a saved population. Raises UserError."""
    import numpy as np
    import torch

    decode, operations = space.encoding()
    try:
        with open_regular(path) as packed, np.load(packed, allow_pickle=False) as file:
            check_unpacked_size(file.zip, 64 << 20)  # 50 individuals are 45 KB
            alphas = torch.from_numpy(file["alphas"].astype("float32"))  # (P, G, E, O)
        counts = decode(alphas).sum((0, 2))  # (G, O)
        if counts.shape != (len(space.cells), len(operations)):
            raise ValueError(f"alphas have the shape {tuple(alphas.shape)}")
    except Exception as error:  # zipfile and numpy raise nearly any exception on damaged files
        raise UserError(f"{path} is not a saved population: {type(error).__name__}: {error}") from error
    shares = 100 * counts / counts.sum(1, keepdims=True)
    names = [f"{cell} {operation}" for cell in space.cells for operation in operations]
    return dict(zip(names, shares.flatten().tolist(), strict=True))


# ---- sections: each returns HTML, or nothing, and adds to `missing` what it could not find


def section(title, *charts, card=""):
    """Return a heading, a card of other content, and charts side by side; "" where there is nothing to show."""
    card = f"<div class=card>{card}</div>" if card else ""
    charts = f"<div class=charts>{''.join(charts)}</div>" if any(charts) else ""
    return f"<section><h2>{title}</h2>{card}{charts}</section>" if card or charts else ""


def winner_section(run_dir, rows, missing):
    """Return the cells of genotype.json, else of the last line of the history."""
    path = os.path.join(run_dir, "genotype.json")
    last = rows[-1].get("best_genotype") if rows else None
    try:
        if os.path.exists(path):
            architecture = cells.load_architecture(path)
        elif not last:
            raise UserError("there is no genotype.json yet")
        else:
            architecture = last if isinstance(last, str) else genotype_files.from_dict(last, "history.jsonl, last line")
            missing.append("genotype.json is missing; the cells are those of the last line of history.jsonl.")
        drawn = cells.cells(architecture)
    except UserError as error:
        missing.append(f"The cells cannot be drawn: {error}")
        return ""
    card = "".join(wide(cells.cell_svg(**cell), cell["title"]) for cell in drawn.values())
    text = architecture if isinstance(architecture, str) else json.dumps(genotype_files.to_dict(architecture))
    card += f"<details><summary>As text</summary><pre>{escape(text)}</pre></details>"
    return section("Winning architecture" if rows and "generation" in rows[0] else "Architecture", card=card)


def population_section(run_dir, space, rows, missing):
    """Return charts of the operations in each generation, read from the saved populations."""
    counted, errors = [], {}
    for row in rows:
        path = os.path.join(run_dir, "population", f"{row['generation']:03d}.npz")
        try:
            counted.append(row | operation_shares(path, space))
        except UserError as error:
            counted.append(row)
            errors[str(row["generation"])] = str(error)
    if errors:
        missing.append(f"Operation counts of generation {', '.join(errors)}: {'; '.join(list(errors.values())[:8])}")
    charts = []
    for cell in space.cells:
        lines = [(operation, colour, f"{cell} {operation}") for operation, colour in COLOUR.items()]
        lines = [line for line in lines if any(column(counted, line[2]))]  # those that occur
        charts.append(chart(counted, f"Operations, {cell}", "% of the edges", lines, zero=True))
    distinct = [("distinct architectures", "orange", "distinct")]
    charts.append(chart(rows, "Distinct architectures", "in the population", distinct, zero=True))
    return section("Population", *charts)


def worth_section(run_dir, space, missing):
    """Return the winner beside random architectures (baselines.json), and fitness against costs (pareto.json)."""
    paths, card, charts = [os.path.join(run_dir, name) for name in ("baselines.json", "pareto.json")], "", []
    try:
        if os.path.exists(paths[0]):
            worth = read_json(paths[0])
            rows = [worth["winner"]]
            shown = {"Winner's fitness, %": finite_values(rows, "fitness")}
            shown |= {f"Its network's {axis}": finite_values(rows, name) for name, axis in COSTS.items()}
            shown |= {f"Random architectures, {of}": finite_values([worth], f"random_{of}") for of in ("mean", "best")}
            shown = {name: show(values[0]) for name, values in shown.items() if values}
            card = f"<p>{escape(worth['sentence'])}.</p><pre>{escape(worth['retrain'])}</pre>"
            card += pairs(shown) + space.baselines(worth)
        if os.path.exists(paths[1]):
            pareto = read_json(paths[1])
            for name, axis in COSTS.items():
                dots, front = (points(pareto[of], name) for of in ("individuals", "front"))
                if dots and front:
                    charts.append(scatter(f"Fitness and {axis}", "on the final weights, %", axis, dots, front))
            card += f"<p>The charts: {escape(pareto['about'])}.</p>" if charts else ""
    except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
        missing.append(f"What the winner is worth: baselines.json or pareto.json is damaged ({error!s:.200})")
    return section("What the winner is worth", *charts, card=card)


def points(rows, name):
    """Return [(cost, fitness)] of those rows that have both."""
    pairs = zip(column(rows, name), column(rows, "fitness"), strict=True)
    return [pair for pair in pairs if None not in pair]


def training_section(rows):
    """Return the curves of a search (fitness, shared weights) or of a retraining (loss, accuracy)."""
    if step_of(rows) == "generation":
        fitness = [("best", "red", "fitness_best"), ("mean", "blue", "fitness_mean")]
        return section(
            "Fitness and training",
            chart(rows, "Fitness", "top-1 on the validation split, %", fitness, ("fitness_mean", "fitness_std")),
            chart(rows, "Training accuracy", "shared weights, %", [("top-1", "green", "train_top1")]),
            chart(rows, "Training loss", "shared weights", [("loss", "purple", "train_loss")]),
        )
    loss, top1 = ([("training", "blue", f"train_{name}"), ("test", "red", f"test_{name}")] for name in ("loss", "top1"))
    return section(
        "Loss and accuracy",
        chart(rows, "Loss", "cross-entropy", loss),
        chart(rows, "Top-1 accuracy", "%", [("best test so far", "orange", "best_top1"), *top1]),
        chart(rows, "Top-5 accuracy", "%", [("test", "red", "test_top5")]),
    )


def time_section(rows):
    """Return charts of seconds, images/s and learning rate."""
    rate, lr = [("images/s", "green", "images_per_second")], [("learning rate", "purple", "lr")]
    return section(
        "Time",
        chart(rows, f"Time of each {step_of(rows)}", "seconds", [("seconds", "blue", "seconds")], zero=True),
        chart(rows, "Throughput", "images/s", rate, zero=True),
        chart(rows, "Learning rate", "", lr, zero=True),
    )


def settings_section(args):
    """Return command, arguments and versions."""
    about = {key: args[key] for key in ("git", "threads", "started") if key in args}
    card = f"<pre>{escape(str(args.get('command', '')))}</pre>"
    card += pairs(args["args"]) + "<h3>Versions</h3>" + pairs(args["versions"] | about)
    return section("Settings", card=card)


def summary_section(rows, total):
    """Return the figures to see first."""
    step, last = step_of(rows), rows[-1:]
    minutes, seconds = divmod(int(sum(finite_values(rows, "seconds"))), 60)
    shown = {f"{step.capitalize()}s": f"{last[0][step]} of {total}", "Time": f"{minutes} min {seconds} s"}
    named = {"Best fitness, %": "fitness_best", "Mean fitness, %": "fitness_mean", "Distinct architectures": "distinct"}
    named |= {"Test top-1, %": "test_top1", "Best test top-1, %": "best_top1"}
    shown |= {name: show(value) for name, key in named.items() for value in finite_values(last, key)}
    for value in finite_values(last, "test_top1"):
        shown["Test error, %"] = show(100 - value)
    if speeds := finite_values(rows, "images_per_second"):
        shown["Images/s, median"] = show(statistics.median(speeds), 0)
    if memory := finite_values(rows, "peak_memory_mb"):
        shown["Peak memory"] = f"{show(max(memory), 0)} MB"
    return section("Summary", card=pairs(shown))


def write_report(run_dir):
    """Write RUN_DIR/report.html from whatever the run has saved so far; return its path.

    What is missing is said in the report. Raises UserError where `run_dir` is no run, for a malformed line of
    history.jsonl, and where the report cannot be written.
    """
    files = ("args.json", "history.jsonl", "genotype.json")
    if not any(os.path.isfile(os.path.join(run_dir, name)) for name in files):
        raise UserError(f"{run_dir} is not a run directory: it has none of {', '.join(files)}")
    missing = []
    try:
        args = read_json(os.path.join(run_dir, "args.json"))
        if not isinstance(args, dict) or not all(isinstance(args.get(key), dict) for key in ("args", "versions")):
            raise UserError("args.json does not hold the arguments of a run")
    except UserError as error:
        missing.append(f"Settings are left out: {error}.")
        args = {}
    flags, space = args.get("args", {}), SPACES.get(str(args.get("space")))
    rows = read_history(run_dir, SETTINGS)
    step = step_of(rows) if rows else "epoch" if args.get("kind") == "eval" else "generation"
    rows = sorted({row[step]: row for row in rows}.values(), key=lambda row: row[step])
    if space is None:
        best = rows[-1].get("best_genotype") if rows else None
        space = next((space for space in SPACES.values() if isinstance(best, space.cell_type)), SPACES["s1"])

    parts = [winner_section(run_dir, rows, missing)]
    if not rows:
        missing.append(f"history.jsonl has no {step} yet, so there are no curves.")
    elif step == "epoch":
        parts = [training_section(rows), *parts, time_section(rows)]
    else:
        if not finite_values(rows, "fitness_best"):
            missing.append("Fitness was not measured in any generation.")
        parts += [worth_section(run_dir, space, missing), training_section(rows)]
        parts += [space.section(rows, flags.get("dataset"))]
        parts += [population_section(run_dir, space, rows, missing), time_section(rows)]
    notes = "".join(f"<li>{escape(note)}</li>" for note in missing)
    notes = notes and f"<div class='card missing'>Not in this report:<ul>{notes}</ul></div>"
    parts = [summary_section(rows, flags.get("epochs", "?")) if rows else "", notes, *parts]
    parts.append(settings_section(args) if args else "")

    title = space.title if step == "generation" else "EvNAS retraining"
    about = [flags.get("dataset"), args.get("started"), os.path.basename(os.path.abspath(run_dir))]
    about = escape(" · ".join(str(part) for part in about if part))
    page = PAGE.format(title=title, css=CSS, about=about, body="\n".join(parts))
    page = "\n".join(map(escaped, page.split("\n")))
    path = os.path.join(run_dir, "report.html")
    with atomic_write(path) as file:
        file.write(page.encode())
    return path


def finish(run, architecture):
    """Draw the cell (a Genotype or an arch string) and write the report: what a finished run ends with.

    A drawing that fails is a line in the log: the results are there all the same.
    """
    if not run.writes:
        return
    try:
        cells.write_cells(run.path, architecture)
        run.log(f"finished; report: {write_report(run.path)}")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        again = f"python visualize.py --report {quoted(run.path)}"
        run.log(f"finished, without a report ({reason}); for another try: {again}")
