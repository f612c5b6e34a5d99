"""How drawings and reports show a search space.

This package knows no particular search space: each script passes in the views of its spaces.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from genotypes import Cell
from support.files import UserError

if TYPE_CHECKING:
    import torch  # importing torch takes seconds


class Edge(NamedTuple):
    """An operation between two nodes of a cell. The nodes are given by name."""

    source: str
    target: str
    operation: str


class Drawing(NamedTuple):
    """What the drawing of a cell shows."""

    title: str
    edges: Sequence[Edge]  # sorted by target, targets in topological order
    colours: Mapping[str, str]  # {operation: name in PALETTE}; other operations are drawn in grey
    concat: Sequence[str] = ()  # the nodes whose concatenation is the output c_{k}
    inputs: Sequence[str] = ()  # nodes that are drawn even if no edge uses them


def no_section(rows: list[dict], searched: str | None) -> str:
    """Return "": this is the default for a search space without its own section in reports."""
    return ""


def no_tables(result: dict) -> str:
    """Return "": this is the default for a search space that adds nothing to baselines.json."""
    return ""


def no_charts(result: dict, final: Sequence[dict]) -> list[str]:
    """Return no charts: the space knows nothing of its individuals besides fitness and costs."""
    return []


@dataclass(frozen=True)
class SpaceView:
    """How drawings and reports show one search space."""

    name: str  # name of the space, as in args.json and in the JSON files next to weights
    title: str  # title of a search's report
    cell_type: type  # Genotype or str
    cell_names: tuple[str, ...]  # in the order of axis G of the alphas (P, G, E, O)
    operations: Sequence[str]  # in the order of axis O of the alphas
    colours: Mapping[str, str]  # {operation: name in PALETTE}; charts list operations in this order
    decode: "Callable[[torch.Tensor], torch.Tensor]"  # raw alphas (P, G, E, O) -> one-hot alphas
    drawings: Callable[[Cell, str], dict[str, Drawing]]  # (cell, name for titles) -> {file name: drawing}
    section: Callable[[list[dict], str | None], str] = no_section  # (history, searched data set) -> HTML
    tables: Callable[[dict], str] = no_tables  # content of baselines.json -> HTML
    # The content of baselines.json, and the rows of individuals.csv on the final weights, to charts.
    result_charts: Callable[[dict, Sequence[dict]], list[str]] = no_charts


Views = Mapping[str, SpaceView]  # {name of the space: its view}


def view_of(cell: Cell, views: Views) -> SpaceView:
    """Return the view of the space that a cell belongs to.

    Raises UserError if no view in `views` is for this kind of cell.
    """
    for view in views.values():
        if isinstance(cell, view.cell_type):
            return view
    raise UserError(f"cannot draw {str(cell)[:80]}: this command does not know the cell's search space")


def drawings_of(cell: Cell, views: Views, name: str = "") -> dict[str, Drawing]:
    """Return {file name without suffix: drawing} of a cell; titles begin with `name`.

    The file names are "cell_normal" and "cell_reduce" for a Genotype, and "cell" for an arch
    string. Raises UserError for an invalid arch string, and for a cell of a space that is not in
    `views`.
    """
    return view_of(cell, views).drawings(cell, name)


def title_of(name: str, words: str) -> str:
    """Return the title "NAME: WORDS"; characters that XML does not allow become "?"."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return f"{name}: {words}" if name else words.capitalize()
