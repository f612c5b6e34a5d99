"""How drawings and reports show NAS-Bench-201. Importing this module does not import torch."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from nas201.genotypes import EDGES, PRIMITIVES, from_arch_string
from nas201.published import PUBLISHED
from reporting.charts import (
    Level,
    Line,
    Marks,
    chart,
    column,
    format_number,
    of_group,
    points,
    scatter,
    section,
    table,
)
from reporting.views import Drawing, Edge, SpaceView, title_of

if TYPE_CHECKING:
    import torch

COLOURS = {
    "none": "grey",
    "skip_connect": "green",
    "avg_pool_3x3": "yellow",
    "nor_conv_1x1": "sky",
    "nor_conv_3x3": "blue",
}
NODES = ("0 (input)", "1", "2", "3 (output)")
ABOUT = (
    "True accuracy is what the benchmark measured: top-1 accuracy in percent after 200 epochs of training, averaged "
    "over the benchmark's seeds. “This run” is the best architecture of the last generation. “EvNAS, published” is the "
    "mean and standard deviation of three searches; RSPS is random search with parameter sharing. Published figures "
    "are only given for the data set that was searched."
)
ABOUT_TAU = (
    "The rank correlations say how well fitness ranks architectures by their true accuracy: 1 is the same order, 0 is "
    "chance, -1 is the opposite order. They compare the distinct cells of each population."
)
HEADS = ("Data set", "This run", "EvNAS, published", "Best of the space", "RSPS", "GDAS")


def decode(alphas: "torch.Tensor") -> "torch.Tensor":
    """Return `nas201.encoding.decode(alphas)`.

    nas201.encoding imports torch, so it is only imported when this function is called.
    """
    from nas201 import encoding

    return encoding.decode(alphas)


def drawings(arch: str, name: str) -> dict[str, Drawing]:
    """Return the drawing of an arch string as {file name: drawing}.

    Raises UserError if the arch string is not valid.
    """
    edges = []
    for (target, source), operation in zip(EDGES, from_arch_string(arch), strict=True):
        edges.append(Edge(NODES[source], NODES[target], PRIMITIVES[operation]))
    return {"cell": Drawing(title_of(name, "cell"), edges, COLOURS)}


def accuracy_section(rows: list[dict], searched: str | None) -> str:
    """Return the section with the true accuracies of each generation's best cell.

    The optimum and published accuracies are shown for comparison. The section is limited to the
    data set of this search, `searched`, and to the one whose true accuracies fitness is compared
    with. Accuracies of published searches are only shown for `searched`.
    """
    charts = []
    body = []
    compared = str(rows[-1].get("truth")).split(" ")[0]
    relevant = [name for name in PUBLISHED if name in (searched, compared)] or list(PUBLISHED)
    for dataset in relevant:
        published = PUBLISHED[dataset]
        name = dataset.replace("cifar", "CIFAR-")
        for split, figures in published.items():
            found = format_number(column(rows, f"true_accuracy/{dataset}/{split}")[-1])
            evnas = "–"
            rsps = "–"
            gdas = "–"
            if dataset == searched:
                evnas = f"{figures.evnas:.2f} ± {figures.evnas_std:.2f}"
                rsps = f"{figures.rsps:.2f}"
                gdas = f"{figures.gdas:.2f}"
            body.append([f"{name} {split}", f"<b>{found}</b>", evnas, f"{figures.best:.2f}", rsps, gdas])
        lines = [
            Line("validation", "sky", f"true_accuracy/{dataset}/valid"),
            Line("test", "blue", f"true_accuracy/{dataset}/test"),
        ]
        levels = [Level("best of the space, test", "grey", published["test"].best)]
        if dataset == searched:
            levels.append(Level("EvNAS, test", "orange", published["test"].evnas))
        charts.append(chart(rows, f"True accuracy, {name}", "of each generation's best, %", lines, levels=levels))
    lines = [Line("Kendall's tau", "purple", "kendall_tau"), Line("Spearman's rho", "green", "spearman_rho")]
    charts.append(chart(rows, "Rank correlation", "of fitness and true accuracy", lines))
    card = f"<p>{ABOUT}</p><p>{ABOUT_TAU}</p>" + table("True accuracy, %", HEADS, body)
    return section("NAS-Bench-201", *charts, card=card if any(charts) else "")


def result_tables(result: dict) -> str:
    """Return two tables: accuracies of the winner and others, and rank correlations of fitness.

    `result` is the content of baselines.json. Accuracies are limited to the data set whose true
    accuracies fitness is compared with, if there is one.
    """
    html = ""
    if accuracies := result.get("accuracy"):
        columns = {
            "accuracy": "winner",
            "beaten_by": "architectures that beat it",
            "mean": "random, mean",
            "std": "random, std",
            "best_of_10": "best of 10",
            "best_of_50": "best of 50",
            "most_parameters": "six 3x3 convolutions",
        }
        compared = str(result.get("truth")).split(" ")[0].replace("-", "_")
        accuracies = {name: row for name, row in accuracies.items() if name.startswith(f"{compared}_")} or accuracies
        caption = "True accuracy, %. Best of n: the expected best of n random architectures"
        html += table(caption, ["Data set", *columns.values()], body_of(accuracies, columns))
    if taus := result.get("kendall_tau"):
        columns = {"architectures": "architectures", "fitness": "of fitness", "parameters": "of parameters"}
        caption = f"Kendall's tau with {result.get('truth')} accuracy"
        html += table(caption, ["", *columns.values()], body_of(taus, columns))
    return html


def result_charts(result: dict, final: Sequence[dict]) -> list[str]:
    """Return a chart of fitness against true accuracy, if the benchmark has it.

    `result` is the content of baselines.json, `final` are the rows of individuals.csv that were
    measured with the final weights.
    """
    truth = result.get("truth")
    taus = result.get("kendall_tau")
    if not truth or not taus:
        return []
    key = truth.replace("-", "_").replace(" ", "_")  # "ImageNet16-120 test" is the column ImageNet16_120_test
    groups = []
    notes = []
    for name, colour, style in (("random architectures", "yellow", "x"), ("last population", "blue", "o")):
        found = points(of_group(final, name), key)
        groups.append(Marks(f"{name}: {len(found)}", colour, style, found))
        notes.append(f"tau {format_number(column([taus], f'{name}/fitness')[0])} of the {name}")
    winner = points(of_group(final, "last population")[:1], key)
    groups.append(Marks("winner", "red", "*", winner))
    if not any(group.points for group in groups):
        return []
    known = [row for row in final if row.get(key) is not None]
    body = [[escape(row["cell"]), format_number(row[key]), format_number(row["fitness"])] for row in known]
    title = "Fitness against true accuracy"
    numbers = table(title, ["Architecture", f"{truth} accuracy, %", "fitness, %"], body)
    return [scatter(title, f"on the final weights; {'; '.join(notes)}", f"true accuracy, {truth}, %", groups, numbers)]


def body_of(figures: dict[str, dict], columns: dict[str, str]) -> list[list[str]]:
    """Return the lines of a table from `figures`, {name: {key: number}}.

    Each name gets a line with the numbers of the keys in `columns`.
    """
    body = []
    for name, numbers in figures.items():
        body.append([escape(name), *(format_number(column([numbers], key)[0]) for key in columns)])
    return body


NAS_BENCH_201 = SpaceView(
    name="s2",
    title="EvNAS search, NAS-Bench-201 space",
    cell_type=str,
    cell_names=("cell",),
    operations=PRIMITIVES,
    colours=COLOURS,
    decode=decode,
    drawings=drawings,
    section=accuracy_section,
    tables=result_tables,
    result_charts=result_charts,
)
