"""The report of a run: one self-contained HTML page, drawn from the files of the run directory.

It needs no network and no script: charts are SVG written here, every chart has its numbers in a table below it.
"""

import json
import math
import os
from html import escape

import visualize
from safeio import UserError, atomic_write, read_bytes, read_json
from visualize import COLOUR, NAS201_OPERATIONS, paint

# True accuracy in percent on NAS-Bench-201 (200 epochs), {data set: [(valid, test) by NAS201_HEAD]}.
NAS201_HEAD = ["EvNAS, published", "Best there is", "RSPS", "GDAS"]
NAS201_PUBLISHED = {
    "cifar10": [(88.98, 92.18), (91.61, 94.37), (84.16, 87.66), (90.00, 93.51)],
    "cifar100": [(66.35, 66.74), (73.49, 73.51), (59.00, 58.33), (71.14, 70.61)],
    "ImageNet16-120": [(39.61, 39.00), (46.77, 47.31), (31.56, 31.14), (41.70, 41.84)],
}
NAS201_SPREAD = {"cifar10": (1.40, 1.11), "cifar100": (2.59, 3.08), "ImageNet16-120": (0.72, 0.44)}
NAS201_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}

SPACES = {"s1": (2, 14, 8), "s2": (1, 6, 5)}  # (G, E, O) of the alphas
NUMBERS = (
    "train_loss train_top1 test_loss test_top1 test_top5 best_top1 fitness_best fitness_mean fitness_std "
    "distinct lr images_per_second seconds peak_memory_mb kendall_tau spearman_rho"
).split()

CSS = """
:root{color-scheme:light dark;--page:#f3f5f8;--card:#fff;--ink:#1b1f27;--soft:#5a6270;--rule:#dde1e7}
@media(prefers-color-scheme:dark){:root{--page:#0e1015;--card:#171a20;--ink:#eceff4;--soft:#a9b1bf;--rule:#343a45}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 FONT}
main{max-width:1240px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}h2{font-size:18px;margin:32px 0 12px}p{margin:0 0 12px}
.soft,figcaption small,caption{color:var(--soft)}
.tiles,.charts,.settings{display:grid;gap:12px}
.tiles{grid-template-columns:repeat(auto-fill,minmax(min(100%,150px),1fr));margin:16px 0 0}
.tiles>div,figure,.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;min-width:0}
.tiles>div{padding:10px 14px}
.tiles dt{color:var(--soft);font-size:13px}.tiles dd{margin:0;font-size:21px;font-weight:600}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,345px),1fr))}
.card,figure{margin:0;padding:14px}figcaption{font-weight:600;margin-bottom:6px}figcaption small{font-weight:400}
figure svg.chart{display:block;width:100%;height:auto}
.key{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;margin:6px 0 0;padding:0;font-size:13px}
.key svg{width:18px;height:10px;margin-right:5px}
.wide{overflow-x:auto;border-radius:8px}.wide+.wide{margin-top:12px}.wide>svg{display:block}
details{margin-top:8px;font-size:13px}summary{cursor:pointer;color:var(--soft)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child{text-align:left}thead th{white-space:normal;vertical-align:bottom;color:var(--soft)}
caption{text-align:left;padding-bottom:4px}
td.own{font-weight:700}details .wide{max-height:320px;overflow-y:auto}
.settings{grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr));gap:0 24px;margin:0}
.settings div{display:flex;justify-content:space-between;gap:12px;border-bottom:1px solid var(--rule);padding:3px 0}
.settings dt{color:var(--soft)}.settings dd{margin:0;text-align:right;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 12px;font-size:13px}
.hint{display:none;font-size:13px}
@media(max-width:700px){.hint{display:block}th,td{padding:4px 6px}.card table{font-size:13px}th{white-space:normal}}
.card+.charts{margin-top:12px}
.missing{margin-top:16px;border-left:4px solid #c96a00}.missing ul{margin:4px 0 0;padding-left:20px}
""".replace("FONT", visualize.FONT)

# The policy makes browsers hold the page to its word: no script, no network.
PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel=icon href="data:,"><title>{title}</title><style>{css}</style></head>
<body><main><h1>{title}</h1><p class=soft>{about}</p>
{body}
</main></body></html>
"""

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
        if not isinstance(row, dict) or not ("generation" in row or "epoch" in row):
            raise UserError(f"{where} is not an object with a generation or an epoch")
        for key in NUMBERS:
            if key in row and row[key] is not None and type(row[key]) not in (int, float):
                raise UserError(f'{where}: "{key}" is {str(row[key])[:60]!r}, not a number')
        step = row.get("generation", row.get("epoch"))
        if type(step) is not int or not 0 < step < 10**6:
            raise UserError(f"{where}: generation or epoch {step!r} is not a positive whole number")
        if rows and ("generation" in row) != ("generation" in rows[0]):
            raise UserError(f"{where} mixes generations and epochs")
        rows.append(row)
    return rows


def number(value):
    """A finite float, or None."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e15 else None


def column(rows, key):
    return [number(row.get(key)) for row in rows]


def true_column(rows, data_set, split):
    """True accuracies by generation of an S2 search, None where there are none."""
    values = []
    for row in rows:
        value = row.get("true_accuracy")
        for key in (data_set, split):
            value = value.get(key) if isinstance(value, dict) else None
        values.append(number(value))
    return values


def operation_shares(path, space):
    """How often each operation occurs in a saved population, decoded: G lists of O percentages. Raises UserError."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            alphas = file["alphas"]  # (P, G, E, O)
    except Exception as error:  # zipfile and numpy raise nearly any exception on damaged files
        raise UserError(f"{path} is not a saved population: {type(error).__name__}: {error}") from error
    if alphas.dtype.kind != "f" or alphas.shape[1:] != SPACES[space] or not len(alphas):
        expected = ", ".join(map(str, SPACES[space]))
        raise UserError(f"{path}: alphas are {alphas.dtype} {alphas.shape}, not float (P, {expected})")
    if space == "s1":
        import torch

        from encoding import decode

        chosen = decode(torch.from_numpy(alphas.astype("float32"))).numpy()
    else:
        chosen = np.eye(alphas.shape[-1])[alphas.argmax(-1)]
    counts = chosen.sum((0, 2))  # (G, O)
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


def ticks(low, high, whole=False, count=5):
    """About `count` round numbers within [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    step = max(round(step), 1) if whole else step
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def table(caption, head, rows, own=None):
    """An HTML table that scrolls by itself; the first column is the rows' header; column `own` is set bold."""
    lines = (
        f"<tr><th scope=row>{escape(str(row[0]))}</th>"
        + "".join(f"<td{' class=own' * (i == own)}>{escape(str(v))}</td>" for i, v in enumerate(row[1:], start=1))
        + "</tr>"
        for row in rows
    )
    heads = "".join(f"<th scope=col>{escape(str(h))}</th>" for h in head)
    body = f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class=wide tabindex=0 role=region aria-label="{escape(caption)}"><table>{body}</table></div>'


def figure(title, note, body, described, keys, step, steps, columns):
    """A chart in its frame: caption, SVG with a text alternative, key, and the numbers as a table."""
    swatches = "".join(
        f'<li><svg viewBox="0 0 18 10" aria-hidden=true><path d="M0 5H18" stroke-width="{w}"{dash} '
        f"{paint(stroke=c)}/></svg>{escape(label)}</li>"
        for label, c, w, dash in keys
    )
    rows = [[s, *(show(v, 3) for v in values)] for s, *values in zip(steps, *columns.values(), strict=True)]
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>"
        f'<svg class=chart viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" font-size="12">'
        f"<title>{escape(title)}</title><desc>{escape(described)}</desc>{body}</svg>"
        f"<ul class=key>{swatches}</ul><details><summary>Numbers</summary>"
        f"{table(f'{title} by {step}', [step, *columns], rows)}</details></figure>"
    )


def axes(low, high, first, last, step):
    """(SVG of axes and grid, x of a step, y of a value)."""

    def x(value):
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - first) / (last - first)

    def y(value):
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    out = []
    for tick in ticks(low, high):
        out.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" {paint(stroke="rule")}/>')
        place = f'x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end"'
        out.append(f"<text {place} {paint(fill='soft')}>{tick:,.6g}</text>")
    for tick in ticks(first, last, whole=True, count=6):
        if tick >= 1:
            place = f'x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle"'
            out.append(f"<text {place} {paint(fill='soft')}>{tick}</text>")
    middle = f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle"'
    out.append(f"<text {middle} {paint(fill='soft')}>{step}</text>")
    return "".join(out), x, y


def line_chart(title, note, step, steps, series, band=None, levels=(), zero=False):
    """A chart of lines, or nothing where no value is known.

    series: [(label, colour, values)], None where not measured. band: (label, colour, lower, upper).
    levels: [(label, colour, value)], dashed lines across. zero: begin the axis at 0.
    """
    series = [s for s in series if any(v is not None for v in s[2])]
    if not series:
        return ""
    known = [v for _, _, values in series for v in values if v is not None] + [v for _, _, v in levels]
    if band:
        known += [v for values in band[2:] for v in values if v is not None]
    low, high = min(known + [0] * zero), max(known)
    pad = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    low, high = low if zero and low == 0 else low - pad, high + pad
    alone = 0.5 if len(steps) == 1 else 0
    body, x, y = axes(low, high, steps[0] - alone, steps[-1] + alone, step)
    keys, columns = [], {}
    if band:
        points = [(s, lo, hi) for s, lo, hi in zip(steps, band[2], band[3], strict=True) if lo is not None]
        outline = [(s, hi) for s, _, hi in points] + [(s, lo) for s, lo, _ in reversed(points)]
        corners = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in outline)
        body += f'<polygon points="{corners}" fill-opacity=".18" stroke-opacity=".18" '
        body += f"{paint(fill=band[1], stroke=band[1])}/>"
        keys.append((band[0], band[1], 9, ' stroke-opacity=".25"'))
    for label, colour, value in levels:
        body += f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke-dasharray="5 4" stroke-width="1.5" '
        body += f"{paint(stroke=colour)}/>"
        keys.append((f"{label} {show(value)}", colour, 2, ' stroke-dasharray="5 3"'))
    said = []
    for label, colour, values in series:
        path, pen = "", "M"  # a gap where a value is missing
        for s, v in zip(steps, values, strict=True):
            path += f"{pen}{x(s):.1f} {y(v):.1f}" if v is not None else ""
            pen = "M" if v is None else "L"
        body += f'<path d="{path}" fill="none" stroke-width="2" stroke-linejoin="round" {paint(stroke=colour)}/>'
        if len(steps) <= 60:  # dots, each with its value on hover
            body += "".join(
                f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="{3 if len(steps) <= 25 else 2}" {paint(fill=colour)}>'
                f"<title>{escape(f'{label}, {step} {s}: {show(v, 3)}')}</title></circle>"
                for s, v in zip(steps, values, strict=True)
                if v is not None
            )
        found = [(v, s) for s, v in zip(steps, values, strict=True) if v is not None]
        said.append(
            f"{label}: {show(found[0][0])} at first, {show(found[-1][0])} at last; lowest {show(min(found)[0])}, "
            f"highest {show(max(found)[0])}."
        )
        keys.append((f"{label} {show(found[-1][0])}", colour, 3, ""))
        columns[label] = values
    return figure(title, note, body, " ".join(said), keys, step, steps, columns)


def bar_chart(title, note, step, steps, operations, shares):
    """Stacked bars of how often each operation occurs; shares: [O percentages], None where not known."""
    body, x, y = axes(0, 100, steps[0] - 0.6, steps[-1] + 0.6, step)
    width = min(0.8 * (x(1) - x(0)), 48)
    drawn = [o for o in range(len(operations)) if any(row and row[o] for row in shares)]
    for s, row in zip(steps, shares, strict=True):
        base = 0
        for o in drawn if row else ():
            top = base + row[o]
            size = f'width="{width:.2f}" height="{y(base) - y(top):.2f}"'
            body += (
                f'<rect x="{x(s) - width / 2:.1f}" y="{y(top):.2f}" {size} {paint(fill=COLOUR[operations[o]])}>'
                f"<title>{operations[o]}, {step} {s}: {row[o]:.1f} %</title></rect>"
            )
            base = top
    last = next(row for row in reversed(shares) if row)
    said = f"In the last {step}: " + ", ".join(f"{operations[o]} {last[o]:.1f} percent" for o in drawn) + "."
    keys = [(f"{operations[o]} {show(last[o], 1)} %", COLOUR[operations[o]], 9, "") for o in reversed(drawn)]
    columns = {operations[o]: [row[o] if row else None for row in shares] for o in drawn}
    return figure(title, note, body, said, keys, step, steps, columns)


# ---------------------------------------------------------------------------------------------------------------
# Sections: each returns HTML, or nothing, and adds to `missing` what it could not find


def section(title, *charts, card=""):
    """A heading, a card of other content, and charts side by side; nothing where there is nothing."""
    card = f"<div class=card>{card}</div>" if card else ""
    charts = f"<div class=charts>{''.join(charts)}</div>" if any(charts) else ""
    return f"<section><h2>{title}</h2>{card}{charts}</section>" if card or charts else ""


def fitness_section(rows, steps, missing):
    best, mean, std = (column(rows, f"fitness_{key}") for key in ("best", "mean", "std"))
    if not any(v is not None for v in best):
        missing.append("Fitness was not measured in any generation.")
    spread = [(None, None) if None in (m, s) else (m - s, m + s) for m, s in zip(mean, std, strict=True)]
    band = ("mean ± one deviation", "blue", *zip(*spread, strict=True)) if any(m for m, _ in spread) else None
    lines = [("best", "red", best), ("mean", "blue", mean)]
    loss, top1 = [("loss", "purple", column(rows, "train_loss"))], [("top-1", "green", column(rows, "train_top1"))]
    return section(
        "Fitness and training",
        line_chart("Fitness", "top-1 on the validation split, %", "generation", steps, lines, band),
        line_chart("Training accuracy", "shared weights, %", "generation", steps, top1),
        line_chart("Training loss", "shared weights", "generation", steps, loss),
    )


def population_section(run_dir, space, rows, steps, missing):
    found = {}
    folder = os.path.join(run_dir, "population")
    for s in steps if space else ():
        path = os.path.join(folder, f"{s:03d}.npz")
        if os.path.exists(path):
            try:
                found[s] = operation_shares(path, space)
            except UserError as error:
                missing.append(f"A population is unreadable: {error}")
    absent = [s for s in steps if s not in found]
    if absent:
        listed = f"{', '.join(map(str, absent[:8]))}{' ...' if len(absent) > 8 else ''}"
        missing.append(f"Operation counts lack generation {listed}: no readable population/NNN.npz.")
    charts = []
    if found:
        from genotypes import PRIMITIVES

        operations = PRIMITIVES if space == "s1" else NAS201_OPERATIONS
        for g, name in enumerate(("normal cell", "reduction cell") if space == "s1" else ("cell",)):
            shares = [found[s][g] if s in found else None for s in steps]
            title, note = f"Operations, {name}", "share of the edges, %"
            charts.append(bar_chart(title, note, "generation", steps, operations, shares))
    distinct = [("distinct architectures", "orange", column(rows, "distinct"))]
    charts.append(line_chart("Distinct architectures", "in the population", "generation", steps, distinct, zero=True))
    return section("Population", *charts)


def winner_section(run_dir, rows, missing):
    """The cells of genotype.json, else of the last line of the history."""
    import genotypes

    path = os.path.join(run_dir, "genotype.json")
    architecture = None
    try:
        if os.path.exists(path):
            architecture = visualize.load_architecture(path)
        elif rows and (last := rows[-1].get("best_genotype")):
            architecture = last if isinstance(last, str) else genotypes.from_dict(last, "history.jsonl, last line")
            missing.append("genotype.json is missing; the cells are those of the last line of history.jsonl.")
        else:
            missing.append("There is no genotype.json yet, so no cells are drawn.")
            return ""
        svgs = [
            f"<div class=wide tabindex=0 role=region aria-label='{visualize.title_of(file)}'>"
            f"{visualize.cell_svg(title=visualize.title_of(file), standalone=False, **cell)}</div>"
            for file, cell in visualize.cells(architecture).items()
        ]
    except UserError as error:
        missing.append(f"The cells cannot be drawn: {error}")
        return ""
    text = architecture if isinstance(architecture, str) else json.dumps(genotypes.to_dict(architecture))
    title = "Winning architecture" if rows and "generation" in rows[-1] else "Architecture"
    hint = "<p class='soft hint'>The drawings are wider than the screen: swipe them sideways.</p>"
    text = f"<details><summary>As text</summary><pre>{escape(text)}</pre></details>"
    return section(title, card=hint + "".join(svgs) + text)


def benchmark_section(rows, steps):
    """S2: the true accuracy of each generation's best, beside the published figures and the optimum."""
    charts, lines, any_true = [], [], False
    for data_set, published in NAS201_PUBLISHED.items():
        name = NAS201_NAMES.get(data_set, data_set)
        own = [true_column(rows, data_set, split) for split in ("valid", "test")]
        any_true = any_true or any(v is not None for v in own[0] + own[1])
        for i, split in enumerate(("valid", "test")):
            evnas, *others = (f"{row[i]:.2f}" for row in published)
            lines.append([f"{name} {split}", show(own[i][-1]), f"{evnas} ± {NAS201_SPREAD[data_set][i]:.2f}", *others])
        levels = [("best there is, test", "grey", published[1][1]), ("EvNAS, test", "orange", published[0][1])]
        curves = [("validation", "sky", own[0]), ("test", "blue", own[1])]
        note = "generation's best, %"
        charts.append(line_chart(f"True accuracy, {name}", note, "generation", steps, curves, levels=levels))
    curves = [(label, colour, column(rows, key)) for label, colour, key in
              (("Kendall's tau", "purple", "kendall_tau"), ("Spearman's rho", "green", "spearman_rho"))]  # fmt: skip
    charts.append(line_chart("Rank correlation", "fitness and true accuracy", "generation", steps, curves))
    note = (
        "Accuracy in percent after 200 epochs of training, mean over the benchmark's seeds. EvNAS, published: mean and "
        "standard deviation of three searches. RSPS: random search with shared weights."
    )
    head = ["Data set", "This run", *NAS201_HEAD]
    card = f"<p class=soft>{note}</p>" + table("True accuracy beside published figures", head, lines, own=1)
    return section("NAS-Bench-201", *charts, card=card if any_true else "")


def retraining_section(rows, steps):
    loss = [("training", "blue", column(rows, "train_loss")), ("test", "red", column(rows, "test_loss"))]
    top1 = [("best test so far", "orange", column(rows, "best_top1"))]
    top1 += [("training", "blue", column(rows, "train_top1")), ("test", "red", column(rows, "test_top1"))]
    top5 = [("test", "red", column(rows, "test_top5"))]
    return section(
        "Loss and accuracy",
        line_chart("Loss", "cross-entropy", "epoch", steps, loss),
        line_chart("Top-1 accuracy", "%", "epoch", steps, top1),
        line_chart("Top-5 accuracy", "%", "epoch", steps, top5),
    )


def cost_section(rows, step, steps):
    rate = [("images/s", "green", column(rows, "images_per_second"))]
    time = [("seconds", "blue", column(rows, "seconds"))]
    lr = [("learning rate", "purple", column(rows, "lr"))]
    return section(
        "Time",
        line_chart(f"Time of each {step}", "seconds", step, steps, time, zero=True),
        line_chart("Throughput", "images/s", step, steps, rate, zero=True),
        line_chart("Learning rate", "", step, steps, lr, zero=True),
    )


def settings_section(args):
    def pairs(values):
        shown = ((str(key), "–" if value in (None, "") else str(value)) for key, value in values.items())
        rows = (f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in shown)
        return f"<dl class=settings>{''.join(rows)}</dl>"

    flags = args.get("args") if isinstance(args.get("args"), dict) else {}
    versions = args.get("versions") if isinstance(args.get("versions"), dict) else {}
    other = {key: args[key] for key in ("git", "threads", "started") if key in args}
    body = f"<pre>{escape(str(args['command']))}</pre>" if args.get("command") else ""
    body += pairs(flags) if flags else ""
    body += f"<h3>Versions</h3>{pairs(versions | other)}" if versions or other else ""
    return section("Settings", card=body)


def clock(seconds):
    """Seconds as people say them."""
    hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.1f} s"


def tiles(rows, total, step):
    """The figures to see first."""
    last = rows[-1]
    done = f"{last[step]} of {total}" if type(total) is int else str(last[step])
    found = {f"{step}s".capitalize(): done}
    for label, key in (("Best fitness, %", "fitness_best"), ("Mean fitness, %", "fitness_mean"),
                       ("Test top-1, %", "test_top1"), ("Best test top-1, %", "best_top1"),
                       ("Distinct cells", "distinct")):  # fmt: skip
        if (value := number(last.get(key))) is not None:
            found[label] = show(value)
    if (test := number(last.get("test_top1"))) is not None:
        found["Test error, %"] = show(100 - test)
    if seconds := [v for v in column(rows, "seconds") if v is not None]:
        found["Time"] = clock(sum(seconds))
    if rate := sorted(v for v in column(rows, "images_per_second") if v is not None):
        found["Images/s, median"] = show(rate[len(rate) // 2], 0)
    if memory := [v for v in column(rows, "peak_memory_mb") if v]:
        found["Peak memory"] = f"{show(max(memory), 0)} MB"
    return f"<dl class=tiles>{''.join(f'<div><dt>{k}</dt><dd>{v}</dd></div>' for k, v in found.items())}</dl>"


def write_report(run_dir):
    """Write RUN_DIR/report.html from whatever the run has saved so far; return its path.

    What is missing is said in the report. Raises UserError where `run_dir` is no run, for a malformed line of
    history.jsonl, and where the report cannot be written.
    """
    known = ("args.json", "history.jsonl", "genotype.json")
    if not any(os.path.isfile(os.path.join(run_dir, name)) for name in known):
        raise UserError(f"{run_dir} is not a run directory: it has none of {', '.join(known)}")
    missing, args, rows = [], {}, []
    try:
        args = read_json(os.path.join(run_dir, "args.json"))
        if not isinstance(args, dict):
            args = missing.append("args.json does not hold an object; settings are left out.") or {}
    except UserError as error:
        missing.append(f"Settings are left out: {error}.")
    history = os.path.join(run_dir, "history.jsonl")
    if os.path.exists(history):
        rows = read_history(history)
    is_search = "generation" in rows[0] if rows else args.get("kind") != "eval"
    step = "generation" if is_search else "epoch"
    rows = sorted({row[step]: row for row in rows}.values(), key=lambda row: row[step])
    steps = [row[step] for row in rows]
    if not rows:
        missing.append(f"history.jsonl has no {step} yet, so there are no curves.")

    flags = args.get("args") if isinstance(args.get("args"), dict) else {}
    space = next((name for name in SPACES if name == args.get("space")), None)
    if space is None and rows:
        space = "s2" if isinstance(rows[-1].get("best_genotype"), str) else "s1"
    parts = [winner_section(run_dir, rows, missing)]
    if rows and step == "generation":
        parts.append(fitness_section(rows, steps, missing))
        parts.append(benchmark_section(rows, steps) if space == "s2" else "")
        parts.append(population_section(run_dir, space, rows, steps, missing))
    elif rows:
        parts.insert(0, retraining_section(rows, steps))
    parts += [cost_section(rows, step, steps) if rows else "", settings_section(args)]

    title = "EvNAS search" if step == "generation" else "EvNAS retraining"
    title += {"s1": ", DARTS space", "s2": ", NAS-Bench-201 space"}.get(space, "") if step == "generation" else ""
    about = [flags.get("dataset"), args.get("started"), os.path.basename(os.path.abspath(run_dir))]
    about = " · ".join(str(part) for part in about if part)
    if missing:
        notes = "".join(f"<li>{escape(note)}</li>" for note in missing)
        parts.insert(0, f"<div class='card missing'>Not in this report:<ul>{notes}</ul></div>")
    if rows:
        parts.insert(0, tiles(rows, flags.get("epochs"), step))
    css = CSS + visualize.theme_css()
    page = PAGE.format(title=title, css=css, about=escape(about), body="\n".join(filter(None, parts)))
    path = os.path.join(run_dir, "report.html")
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))  # names of files need not be Unicode
    return path
