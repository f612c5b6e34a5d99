"""How drawings and reports show a search space.

A script passes them the views that it has; no space is known here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from genotypes import Cell
from support.files import UserError

if TYPE_CHECKING:
    import torch  # importing it takes seconds


class Edge(NamedTuple):
    """An operation between two nodes of a cell, which are given by name."""

    source: str
    target: str
    operation: str


class Drawing(NamedTuple):
    """What the drawing of a cell shows."""

    title: str
    edges: Sequence[Edge]  # target by target, in topological order
    colours: Mapping[str, str]  # {operation: name in PALETTE}; other operations are drawn in grey
    concat: Sequence[str] = ()  # the nodes whose concatenation is the output c_{k}
    inputs: Sequence[str] = ()  # nodes that are drawn even if no edge uses them


def no_section(rows: list[dict], searched: str | None) -> str:
    """Return no HTML: the space has no section of its own in a report."""
    return ""


def no_tables(result: dict) -> str:
    """Return no HTML: the space has nothing of its own in baselines.json."""
    return ""


@dataclass(frozen=True)
class SpaceView:
    """How drawings and reports show one search space."""

    name: str  # of the space, in args.json and next to the weights
    title: str  # of the report of a search
    cell_type: type  # Genotype or str
    cell_names: tuple[str, ...]  # in the order of the alphas' first axis
    operations: Sequence[str]  # in the order of the alphas' last axis
    colours: Mapping[str, str]  # {operation: name in PALETTE}; charts list operations in this order
    decode: "Callable[[torch.Tensor], torch.Tensor]"  # raw alphas (P, G, E, O) to one-hot alphas
    drawings: Callable[[Cell, str], dict[str, Drawing]]  # a cell and a name for the titles to {file name: drawing}
    section: Callable[[list[dict], str | None], str] = no_section  # history and searched data set to HTML
    tables: Callable[[dict], str] = no_tables  # the content of baselines.json to HTML


Views = Mapping[str, SpaceView]  # {name of the space: its view}


def view_of(cell: Cell, views: Views) -> SpaceView:
    """Return the view of the space that a cell belongs to.

    Raises UserError if it is not in `views`.
    """
    for view in views.values():
        if isinstance(cell, view.cell_type):
            return view
    raise UserError(f"cannot draw {str(cell)[:80]}: it is not a cell of a search space that this command knows")


def drawings_of(cell: Cell, views: Views, name: str = "") -> dict[str, Drawing]:
    """Return {file name without suffix: drawing} of a cell; titles begin with `name`.

    A Genotype has "cell_normal" and "cell_reduce", an arch string has "cell".
    Raises UserError for an invalid arch string, and for a cell of a space that is not in `views`.
    """
    return view_of(cell, views).drawings(cell, name)


def title_of(name: str, words: str) -> str:
    """Return the title "NAME: WORDS"; characters that XML does not allow become "?"."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return f"{name}: {words}" if name else words.capitalize()
