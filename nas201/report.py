"""What reports and drawings show of NAS-Bench-201: arch strings, true accuracies, published figures.

Importing this module registers it with `reporting`.
"""

from html import escape

from nas201.genotypes import EDGES, PRIMITIVES, from_arch_string
from reporting import cells, report
from reporting.charts import chart, column, show, table
from reporting.report import section

# True accuracy in percent on NAS-Bench-201 (200 epochs), {data set: [(valid, test) by HEAD]}.
HEAD = ["EvNAS, published", "Best there is", "RSPS", "GDAS"]
PUBLISHED = {
    "cifar10": [(88.98, 92.18), (91.61, 94.37), (84.16, 87.66), (90.00, 93.51)],
    "cifar100": [(66.35, 66.74), (73.49, 73.51), (59.00, 58.33), (71.14, 70.61)],
    "ImageNet16-120": [(39.61, 39.00), (46.77, 47.31), (31.56, 31.14), (41.70, 41.84)],
}
SPREAD = {"cifar10": (1.40, 1.11), "cifar100": (2.59, 3.08), "ImageNet16-120": (0.72, 0.44)}
NOTE = (
    "Accuracy in percent after 200 epochs of training, mean over the benchmark's seeds. EvNAS, published: mean and "
    "standard deviation of three searches. RSPS: random search with shared weights. Published figures stand beside the "
    "data set that was searched."
)

cells.COLOUR |= {"nor_conv_1x1": "sky", "nor_conv_3x3": "blue"}


@cells.cells.register
def _(architecture: str, name=""):
    nodes = ("0 (input)", "1", "2", "3 (output)")
    operations = zip(EDGES, from_arch_string(architecture), strict=True)
    edges = [(nodes[source], nodes[target], PRIMITIVES[op]) for (target, source), op in operations]
    return {"cell": {"title": cells.title(name, "cell"), "edges": edges}}


def cells_of(rows, keys):
    """Return the rows of a table from {name: {key: number}}."""
    return [[escape(name), *(show(column([row], key)[0]) for key in keys)] for name, row in rows.items()]


class Space(report.Space):
    title = "EvNAS search, NAS-Bench-201 space"
    cells = ("cell",)
    cell_type = str

    def encoding(self):
        from nas201 import encoding

        return encoding.decode, PRIMITIVES

    def section(self, rows, searched):
        """Return each generation\'s true accuracy beside the optimum and what searches on `searched` published."""
        charts, lines = [], []
        for data_set, published in PUBLISHED.items():
            name = data_set.replace("cifar", "CIFAR-")
            keys = [f"true_accuracy/{data_set}/{split}" for split in ("valid", "test")]
            for i, key in enumerate(keys):
                figures = [f"{row[i]:.2f}" for row in published]
                figures[0] += f" ± {SPREAD[data_set][i]:.2f}"
                if data_set != searched:
                    figures = ["–", figures[1], "–", "–"]
                lines.append([f"{name} {'test' if i else 'valid'}", f"<b>{show(column(rows, key)[-1])}</b>", *figures])
            levels = [("best there is, test", "grey", published[1][1])]
            levels += [("EvNAS, test", "orange", published[0][1])] if data_set == searched else []
            curves = [("validation", "sky", keys[0]), ("test", "blue", keys[1])]
            charts.append(chart(rows, f"True accuracy, {name}", "generation's best, %", curves, levels=levels))
        card = f"<p>{NOTE}</p>" + table("True accuracy", ["Data set", "This run", *HEAD], lines)
        curves = [("Kendall's tau", "purple", "kendall_tau"), ("Spearman's rho", "green", "spearman_rho")]
        charts.append(chart(rows, "Rank correlation", "fitness and true accuracy", curves))
        return section("NAS-Bench-201", *charts, card=card if any(charts) else "")

    def baselines(self, worth):
        """Return tables: the winner beside chance and the most parameters, and how fitness ranks architectures."""
        html, rows = "", worth.get("accuracy") or {}
        if rows:
            heads = ["winner", "beaten by", "random, mean", "std", "best of 10", "best of 50", "six 3x3 convolutions"]
            keys = ["accuracy", "beaten_by", "mean", "std", "best_of_10", "best_of_50", "most_parameters"]
            html += table(
                "True accuracy, %; best of: expected, of so many random ones",
                ["Data set", *heads],
                cells_of(rows, keys),
            )
        if taus := worth.get("kendall_tau"):
            keys = ("architectures", "fitness", "parameters")
            caption = f"Kendall's tau with {worth.get('truth')} accuracy"
            html += table(caption, ["", *keys], cells_of(taus, keys))
        return html


report.SPACES["s2"] = Space()
