"""How drawings and reports show NAS-Bench-201. Importing this module does not import torch."""

from html import escape
from typing import TYPE_CHECKING

from nas201.genotypes import EDGES, PRIMITIVES, from_arch_string
from nas201.published import PUBLISHED
from reporting.charts import Level, Line, chart, column, format_number, table
from reporting.report import section
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

    The optimum and published accuracies are shown for comparison. Accuracies of published searches
    are only shown for `searched`, the data set of this search.
    """
    charts = []
    body = []
    for dataset, published in PUBLISHED.items():
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
    card = f"<p>{ABOUT}</p>" + table("True accuracy, %", HEADS, body)
    return section("NAS-Bench-201", *charts, card=card if any(charts) else "")


def result_tables(result: dict) -> str:
    """Return two tables: accuracies of the winner and others, and rank correlations of fitness.

    `result` is the content of baselines.json.
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
        caption = "True accuracy, %. Best of n: the expected best of n random architectures"
        html += table(caption, ["Data set", *columns.values()], body_of(accuracies, columns))
    if taus := result.get("kendall_tau"):
        columns = {"architectures": "architectures", "fitness": "of fitness", "parameters": "of parameters"}
        caption = f"Kendall's tau with {result.get('truth')} accuracy"
        html += table(caption, ["", *columns.values()], body_of(taus, columns))
    return html


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
)
