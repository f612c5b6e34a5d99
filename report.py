"""The report of a run: one self-contained HTML page, drawn from the files of the run directory.

It needs no network and no script: charts are SVG written here, every chart has its numbers in a table below it.
"""

import json
import math
import os
from html import escape

import genotypes
import visualize
from safeio import UserError, atomic_write, check_unpacked_size, read_bytes, read_json
from visualize import COLOUR, paint

# True accuracy in percent on NAS-Bench-201 (200 epochs), {data set: [(valid, test) by NAS201_HEAD]}.
NAS201_HEAD = ["EvNAS, published", "Best there is", "RSPS", "GDAS"]
NAS201_PUBLISHED = {
    "cifar10": [(88.98, 92.18), (91.61, 94.37), (84.16, 87.66), (90.00, 93.51)],
    "cifar100": [(66.35, 66.74), (73.49, 73.51), (59.00, 58.33), (71.14, 70.61)],
    "ImageNet16-120": [(39.61, 39.00), (46.77, 47.31), (31.56, 31.14), (41.70, 41.84)],
}
NAS201_SPREAD = {"cifar10": (1.40, 1.11), "cifar100": (2.59, 3.08), "ImageNet16-120": (0.72, 0.44)}
NAS201_NOTE = (
    "Accuracy in percent after 200 epochs of training, mean over the benchmark's seeds. EvNAS, published: mean and "
    "standard deviation of three searches. RSPS: random search with shared weights."
)

CSS = """
:root{color-scheme:light dark;--page:#f3f5f8;--card:#fff;--ink:#1b1f27;--soft:#5a6270;--rule:#dde1e7}
@media(prefers-color-scheme:dark){:root{--page:#0e1015;--card:#171a20;--ink:#eceff4;--soft:#a9b1bf;--rule:#343a45}}
*{box-sizing:border-box}
body{max-width:1240px;margin:0 auto;padding:24px 16px 48px;background:var(--page);color:var(--ink);font:15px/1.5 FONT}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}h2{font-size:18px;margin:32px 0 12px}p{margin:0 0 12px}
p,dt,small,caption,summary,thead{color:var(--soft)}
.tiles,.charts,.settings{display:grid;gap:12px;margin:12px 0 0}
.tiles{grid-template-columns:repeat(auto-fill,minmax(min(100%,150px),1fr))}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,345px),1fr))}
.settings{grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr));gap:0 24px}
.card,figure,.tiles>div{background:var(--card);border:1px solid var(--rule);border-radius:10px;min-width:0}
.card,figure{margin:0;padding:14px}.tiles>div{padding:10px 14px}.missing{margin-top:16px;border-color:#c96a00}
dd{margin:0}.tiles dd{font-size:21px;font-weight:600}
.settings div{display:flex;justify-content:space-between;gap:12px;border-bottom:1px solid var(--rule);padding:3px 0}
.settings dd{text-align:right;overflow-wrap:anywhere}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 12px}
figcaption{font-weight:600;margin-bottom:6px}small{font-weight:400}figure>svg{display:block;width:100%;height:auto}
.key{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;margin:6px 0 0;padding:0}.key svg{width:18px;height:10px}
small,pre,details,.key,.tiles dt{font-size:13px}
.wide{overflow-x:auto;margin-top:8px}.wide>svg{display:block}details .wide{max-height:320px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}caption{text-align:left}
th,td{padding:4px 8px;text-align:right;border-bottom:1px solid var(--rule)}th:first-child{text-align:left}
""".replace("FONT", visualize.FONT)

# The policy makes browsers hold the page to its word: no script, no network.
PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel=icon href="data:,"><title>{title}</title><style>{css}</style></head>
<body><h1>{title}</h1><p>{about}</p>
{body}
</body></html>
"""

SPACES = {"s1": (2, 14, 8), "s2": (1, 6, 5)}  # (G, E, O) of the alphas
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 240, 46, 12, 10, 34  # of a chart; text stays legible at 330 pixels


# ---------------------------------------------------------------------------------------------------------------
# Reading a run


def read_history(path):
    """The lines of history.jsonl. Raises UserError naming file and line of one that is malformed."""
    rows = []
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON: {error}; remove the line, or resume the run") from error
        step = row.get(step_of([*rows, row])) if isinstance(row, dict) else None
        if type(step) is not int or not 0 < step < 10**6:
            raise UserError(f"{where} does not have a generation, or an epoch, that is a positive whole number")
        for key in row.keys() - {"best_genotype", "true_accuracy", "truth"}:
            if row[key] is not None and type(row[key]) not in (int, float):
                raise UserError(f'{where}: "{key}" is {str(row[key])[:60]!r}, not a number')
        rows.append(row)
    return rows


def step_of(rows):
    return "generation" if "generation" in rows[0] else "epoch"


def column(rows, key):
    """The values of a key, such as "lr" or "true_accuracy/cifar10/test", None where there is no finite number."""
    values = []
    for value in rows:
        for name in key.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        values.append(float(value) if type(value) in (int, float) and abs(value) < 1e15 else None)
    return values


def operation_shares(path, space):
    """How often each operation occurs in a saved population, decoded: G lists of O percentages. Raises UserError."""
    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as file:
            check_unpacked_size(file.zip, 64 << 20)  # 50 individuals are 45 KB
            alphas = torch.from_numpy(file["alphas"].astype("float32"))  # (P, G, E, O)
        if alphas.shape[1:] != SPACES[space]:
            raise ValueError(f"alphas have the shape {tuple(alphas.shape)}")
    except Exception as error:  # zipfile and numpy raise nearly any exception on damaged files
        raise UserError(f"{path} is not a saved population: {type(error).__name__}: {error}") from error
    if space == "s1":
        from encoding import decode
    else:
        from nas201.encoding import decode
    counts = decode(alphas).sum((0, 2))  # (G, O)
    return (100 * counts / counts.sum(1, keepdims=True)).tolist()


# ---------------------------------------------------------------------------------------------------------------
# Charts


def show(value, digits=2):
    """A number as people write it; a dash where there is none."""
    if value is None:
        return "–"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if abs(value) >= 0.1 else f"{value:.3g}"


def ticks(low, high, whole=False):
    """About five round numbers within [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5)
    step = max(round(step), 1) if whole else step
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def table(caption, head, rows):
    """An HTML table that scrolls by itself; the first column is the rows' header."""
    caption = escape(caption)
    body = ""
    for first, *values in rows:
        body += f"<tr><th scope=row>{first}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
    heads = "".join(f"<th scope=col>{name}</th>" for name in head)
    return (
        f'<div class=wide tabindex=0 role=region aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def key(label, colour, style):
    swatch = f'<svg viewBox="0 0 18 10" aria-hidden=true><path d="M0 5H18" {style} {paint(stroke=colour)}/></svg>'
    return f"<li>{swatch} {label}</li>"


def text(x, y, words, anchor="middle"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {paint(fill="soft")}>{words}</text>'


def chart(rows, title, note, lines, band=None, levels=(), zero=False):
    """A chart of lines [(label, colour, key of the rows)] and its numbers, or nothing where no value is known.

    band: the keys of a mean and its deviation. levels: [(label, colour, value)], dashed. zero: begin the axis at 0.
    """
    step = step_of(rows)
    steps = [row[step] for row in rows]
    lines = [(label, colour, column(rows, name)) for label, colour, name in lines]
    lines = [line for line in lines if any(value is not None for value in line[2])]
    if not lines:
        return ""
    spread = []
    if band:
        spread = [(s, m - d, m + d) for s, m, d in zip(steps, *(column(rows, name) for name in band), strict=True)
                  if None not in (m, d)]  # fmt: skip
    known = [value for _, _, values in lines for value in values if value is not None] + [0] * zero
    known += [value for _, _, value in levels] + [value for _, *ends in spread for value in ends]
    pad = (max(known) - min(known)) * 0.06 or max(abs(known[0]) * 0.1, 0.1)
    low, high = min(known) - pad, max(known) + pad
    low = max(low, 0) if zero else low
    first, last = (steps[0] - 0.5, steps[0] + 0.5) if len(steps) == 1 else (steps[0], steps[-1])

    def x(value):
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - first) / (last - first)

    def y(value):
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    body, keys, said = text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, step), "", ""
    for tick in ticks(low, high):
        body += f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" {paint(stroke="rule")}/>'
        body += text(LEFT - 6, y(tick) + 4, f"{tick:,.6g}", "end")
    for tick in ticks(first, last, whole=True):
        body += text(x(tick), HEIGHT - BOTTOM + 16, tick) if tick >= 1 else ""
    if spread:
        outline = [(s, top) for s, _, top in spread] + [(s, bottom) for s, bottom, _ in reversed(spread)]
        corners = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in outline)
        body += f'<polygon points="{corners}" fill-opacity=".18" {paint(fill="blue")}/>'
        keys += key("mean ± one deviation", "blue", 'stroke-width="9" stroke-opacity=".25"')
    for label, colour, value in levels:
        style = 'stroke-width="2" stroke-dasharray="5 4"'
        body += f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" {style} {paint(stroke=colour)}/>'
        keys += key(f"{label} {show(value)}", colour, style)
    for label, colour, values in lines:
        path, pen, found = "", "M", []
        for s, v in zip(steps, values, strict=True):
            if v is not None:
                path += f"{pen}{x(s):.1f} {y(v):.1f}"
                found.append((s, v))
            pen = "M" if v is None else "L"  # a gap where a value is missing
        body += f'<path d="{path}" fill="none" stroke-width="2" {paint(stroke=colour)}/>'
        for s, v in found if len(steps) <= 60 else ():  # dots, each with its value on hover
            body += f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.5" {paint(fill=colour)}>'
            body += f"<title>{label}, {step} {s}: {show(v, 3)}</title></circle>"
        found = [v for _, v in found]
        ends, lowest, highest = [show(found[0]), show(found[-1])], show(min(found)), show(max(found))
        said += f"{label}: {ends[0]} at first, {ends[1]} at last; lowest {lowest}, highest {highest}. "
        keys += key(f"{label} {ends[1]}", colour, 'stroke-width="3"')
    numbers = zip(steps, *([show(v, 3) for v in values] for _, _, values in lines), strict=True)
    numbers = table(f"{title} by {step}", [step, *(label for label, *_ in lines)], numbers)
    return (
        f"<figure><figcaption>{title} <small>{note}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" font-size="12">'
        f"<title>{title}</title><desc>{said}</desc>{body}</svg>"
        f"<ul class=key>{keys}</ul><details><summary>Numbers</summary>{numbers}</details></figure>"
    )


# ---------------------------------------------------------------------------------------------------------------
# Sections: each returns HTML, or nothing, and adds to `missing` what it could not find


def section(title, *charts, card=""):
    """A heading, a card of other content, and charts side by side; nothing where there is nothing."""
    card = f"<div class=card>{card}</div>" if card else ""
    charts = f"<div class=charts>{''.join(charts)}</div>" if any(charts) else ""
    return f"<section><h2>{title}</h2>{card}{charts}</section>" if card or charts else ""


def winner_section(run_dir, rows, missing):
    """The cells of genotype.json, else of the last line of the history."""
    path = os.path.join(run_dir, "genotype.json")
    last = rows[-1].get("best_genotype") if rows else None
    try:
        if os.path.exists(path):
            architecture = visualize.load_architecture(path)
        elif last:
            architecture = last if isinstance(last, str) else genotypes.from_dict(last, "history.jsonl, last line")
            missing.append("genotype.json is missing; the cells are those of the last line of history.jsonl.")
        else:
            missing.append("There is no genotype.json yet, so no cells are drawn.")
            return ""
        cells = visualize.cells(architecture)
    except UserError as error:
        missing.append(f"The cells cannot be drawn: {error}")
        return ""
    card = ""
    for file, cell in cells.items():
        title = visualize.title_of(file)
        svg = visualize.cell_svg(title=title, standalone=False, **cell)
        card += f"<div class=wide tabindex=0 role=region aria-label='{title}'>{svg}</div>"
    text = architecture if isinstance(architecture, str) else json.dumps(genotypes.to_dict(architecture))
    card += f"<details><summary>As text</summary><pre>{escape(text)}</pre></details>"
    return section("Winning architecture" if rows and "generation" in rows[0] else "Architecture", card=card)


def benchmark_section(rows):
    """S2: the true accuracy of each generation's best, beside the published figures and the optimum."""
    charts, lines = [], []
    for data_set, published in NAS201_PUBLISHED.items():
        name = data_set.replace("cifar", "CIFAR-")
        keys = [f"true_accuracy/{data_set}/{split}" for split in ("valid", "test")]
        for i, key in enumerate(keys):
            evnas, *others = (f"{row[i]:.2f}" for row in published)
            own = f"<b>{show(column(rows, key)[-1])}</b>"
            spread = f"{evnas} ± {NAS201_SPREAD[data_set][i]:.2f}"
            lines.append([f"{name} {'test' if i else 'valid'}", own, spread, *others])
        levels = [("best there is, test", "grey", published[1][1]), ("EvNAS, test", "orange", published[0][1])]
        curves = [("validation", "sky", keys[0]), ("test", "blue", keys[1])]
        charts.append(chart(rows, f"True accuracy, {name}", "generation's best, %", curves, levels=levels))
    card = f"<p>{NAS201_NOTE}</p>" + table("True accuracy", ["Data set", "This run", *NAS201_HEAD], lines)
    curves = [("Kendall's tau", "purple", "kendall_tau"), ("Spearman's rho", "green", "spearman_rho")]
    charts.append(chart(rows, "Rank correlation", "fitness and true accuracy", curves))
    return section("NAS-Bench-201", *charts, card=card if any(charts) else "")


def population_section(run_dir, space, rows, missing):
    names, operations = ("normal cell", "reduction cell"), genotypes.PRIMITIVES
    if space == "s2":
        from nas201.genotypes import PRIMITIVES as operations

        names = ("cell",)
    counted, errors = [], {}
    for row in rows:
        path, shares = os.path.join(run_dir, "population", f"{row['generation']:03d}.npz"), {}
        try:
            for name, values in zip(names, operation_shares(path, space), strict=True):
                shares |= {f"{name} {operation}": value for operation, value in zip(operations, values, strict=True)}
        except UserError as error:
            errors[row["generation"]] = str(error)
        counted.append(row | shares)
    if errors:
        which, why = ", ".join(map(str, list(errors)[:8])), "; ".join(list(errors.values())[:8])
        missing.append(f"Operation counts of generation {which}{' ...' if len(errors) > 8 else ''}: {why}")
    charts = []
    for name in names:
        lines = [(operation, COLOUR[operation], f"{name} {operation}") for operation in operations]
        lines = [line for line in lines if any(column(counted, line[2]))]  # `none` never occurs in the DARTS space
        charts.append(chart(counted, f"Operations, {name}", "share of the edges, %", lines, zero=True))
    distinct = [("distinct architectures", "orange", "distinct")]
    charts.append(chart(rows, "Distinct architectures", "in the population", distinct, zero=True))
    return section("Population", *charts)


def training_section(rows):
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
    rate, lr = [("images/s", "green", "images_per_second")], [("learning rate", "purple", "lr")]
    return section(
        "Time",
        chart(rows, f"Time of each {step_of(rows)}", "seconds", [("seconds", "blue", "seconds")], zero=True),
        chart(rows, "Throughput", "images/s", rate, zero=True),
        chart(rows, "Learning rate", "", lr, zero=True),
    )


def settings_section(args):
    about = {key: args[key] for key in ("git", "threads", "started") if key in args}
    card = f"<pre>{escape(str(args.get('command', '')))}</pre>"
    for heading, values in (("", args["args"]), ("<h3>Versions</h3>", args["versions"] | about)):
        shown = ((key, "–" if value in (None, "") else value) for key, value in values.items())
        pairs = (f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>" for key, value in shown)
        card += f"{heading}<dl class=settings>{''.join(pairs)}</dl>"
    return section("Settings", card=card)


def tiles(rows, total):
    """The figures to see first."""
    step, last = step_of(rows), rows[-1]
    minutes, seconds = divmod(int(sum(value or 0 for value in column(rows, "seconds"))), 60)
    speeds = sorted(value for value in column(rows, "images_per_second") if value is not None)
    memory = max((value or 0 for value in column(rows, "peak_memory_mb")), default=0)
    test = column([last], "test_top1")[0]
    shown = {
        f"{step.capitalize()}s": f"{last[step]} of {escape(str(total))}",
        "Best fitness, %": show(column([last], "fitness_best")[0]),
        "Mean fitness, %": show(column([last], "fitness_mean")[0]),
        "Test top-1, %": show(test),
        "Best test top-1, %": show(column([last], "best_top1")[0]),
        "Test error, %": show(None if test is None else 100 - test),
        "Distinct cells": show(column([last], "distinct")[0]),
        "Time": f"{minutes} min {seconds} s",
        "Images/s, median": show(speeds[len(speeds) // 2], 0) if speeds else "–",
        "Peak memory": f"{show(memory, 0)} MB" if memory else "–",
    }
    found = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown.items() if value != "–")
    return f"<dl class=tiles>{''.join(found)}</dl>"


def write_report(run_dir):
    """Write RUN_DIR/report.html from whatever the run has saved so far; return its path.

    What is missing is said in the report. Raises UserError where `run_dir` is no run, for a malformed line of
    history.jsonl, and where the report cannot be written.
    """
    known = ("args.json", "history.jsonl", "genotype.json")
    here = [name for name in known if os.path.isfile(os.path.join(run_dir, name))]
    if not here:
        raise UserError(f"{run_dir} is not a run directory: it has none of {', '.join(known)}")
    missing = []
    try:
        args = read_json(os.path.join(run_dir, "args.json"))
        if not isinstance(args, dict) or not all(isinstance(args.get(key), dict) for key in ("args", "versions")):
            raise UserError("args.json does not hold the arguments of a run")
    except UserError as error:
        missing.append(f"Settings are left out: {error}.")
        args = {}
    rows = read_history(os.path.join(run_dir, "history.jsonl")) if "history.jsonl" in here else []
    step = step_of(rows) if rows else "epoch" if args.get("kind") == "eval" else "generation"
    rows = sorted({row[step]: row for row in rows}.values(), key=lambda row: row[step])
    if not rows:
        missing.append(f"history.jsonl has no {step} yet, so there are no curves.")

    flags, space = args.get("args", {}), str(args.get("space"))
    if space not in SPACES and rows:
        space = "s2" if isinstance(rows[-1].get("best_genotype"), str) else "s1"
    parts = [winner_section(run_dir, rows, missing)]
    if step == "generation" and not any(value is not None for value in column(rows, "fitness_best")):
        missing.append("Fitness was not measured in any generation.")
    if rows:
        parts.insert(len(parts) if step == "generation" else 0, training_section(rows))
        if step == "generation":
            parts.append(benchmark_section(rows) if space == "s2" else "")
            parts.append(population_section(run_dir, space, rows, missing))
        parts.append(time_section(rows))
    parts.append(settings_section(args) if args else "")
    if missing:
        notes = "".join(f"<li>{escape(note)}</li>" for note in missing)
        parts.insert(0, f"<div class='card missing'>Not in this report:<ul>{notes}</ul></div>")
    if rows:
        parts.insert(0, tiles(rows, flags.get("epochs", "?")))

    spaces = {"s1": "EvNAS search, DARTS space", "s2": "EvNAS search, NAS-Bench-201 space"}
    title = spaces.get(space, "EvNAS search") if step == "generation" else "EvNAS retraining"
    about = [flags.get("dataset"), args.get("started"), os.path.basename(os.path.abspath(run_dir))]
    about = escape(" · ".join(str(part) for part in about if part))
    page = PAGE.format(title=title, css=CSS + visualize.theme_css(), about=about, body="\n".join(parts))
    path = os.path.join(run_dir, "report.html")
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))  # names of files need not be Unicode
    return path
