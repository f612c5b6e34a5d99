"""The views of both search spaces: how drawings and reports show their cells.

Importing this module does not import torch.
"""

from typing import TYPE_CHECKING

from genotypes import PRIMITIVES, Genotype
from nas201.report import NAS_BENCH_201
from reporting.views import Drawing, Edge, SpaceView, Views, title_of

if TYPE_CHECKING:
    import torch

COLOURS = {
    "none": "grey", "skip_connect": "green", "max_pool_3x3": "orange", "avg_pool_3x3": "yellow",
    "sep_conv_3x3": "blue", "sep_conv_5x5": "sky", "dil_conv_3x3": "red", "dil_conv_5x5": "pink",
    "sep_conv_7x7": "purple", "conv_7x1_1x7": "purple",
}  # fmt: skip


def decode(alphas: "torch.Tensor") -> "torch.Tensor":
    """Return `encoding.decode(alphas)`.

    `encoding` imports torch, which takes seconds. So `encoding` is imported only when a report
    needs it.
    """
    import encoding

    return encoding.decode(alphas)


def drawings(genotype: Genotype, name: str) -> dict[str, Drawing]:
    """Return the drawings of the two cells of a Genotype, by file name."""
    return {
        "cell_normal": drawing(genotype.normal, genotype.normal_concat, title_of(name, "normal cell")),
        "cell_reduce": drawing(genotype.reduce, genotype.reduce_concat, title_of(name, "reduction cell")),
    }


def drawing(pairs: list[tuple[str, int]], concat: list[int], title: str) -> Drawing:
    """Return the drawing of a cell with these (operation, input) pairs, two for each node."""
    nodes = ["c_{k-2}", "c_{k-1}", *(str(i) for i in range(len(pairs) // 2))]
    edges = [Edge(nodes[source], nodes[2 + i // 2], operation) for i, (operation, source) in enumerate(pairs)]
    return Drawing(title, edges, COLOURS, concat=[nodes[i] for i in concat], inputs=nodes[:2])


DARTS = SpaceView(
    name="s1",
    title="EvNAS search, DARTS space",
    cell_type=Genotype,
    cell_names=("normal cell", "reduction cell"),
    operations=PRIMITIVES,
    colours=COLOURS,
    decode=decode,
    drawings=drawings,
)
VIEWS: Views = {view.name: view for view in (DARTS, NAS_BENCH_201)}
