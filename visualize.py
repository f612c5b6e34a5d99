"""Draw a cell as SVG or PNG, or rebuild the report of a run. No display is needed.

python visualize.py EvNASA --output runs                    draws the paper's first cell
python visualize.py runs/search-20260101-120000             draws the cell of a run
python visualize.py --report runs/search-20260101-120000    rebuilds its report
"""

from support.cli import Parser, command

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import genotype_files
import genotypes
from genotypes import Cell
from reporting import cells, report
from support.files import UserError, emit
from views import VIEWS

TARGET = "a named cell such as EvNASA, a genotype file, a run directory or an arch string of NAS-Bench-201"


class Target(NamedTuple):
    """A cell to draw."""

    cell: Cell
    name: str  # the file names of the drawings begin with this name; can be empty
    folder: str  # where the drawings go


def resolve(text: str) -> Target:
    """Return the cell that the command line names. Raises UserError."""
    if text.lstrip().startswith("|"):
        return Target(text.strip(), "", ".")
    if os.path.isdir(text):
        return Target(cells.load_cell(genotype_files.file_in(text), VIEWS), "", text)
    if os.sep in text or text.endswith((".json", ".pickle")):
        name = os.path.splitext(os.path.basename(text))[0]
        return Target(cells.load_cell(text, VIEWS), name, ".")
    return Target(genotypes.get(text), text, ".")


def make_parser() -> Parser:
    parser = Parser(prog="visualize.py", description=__doc__)
    parser.add_argument("target", nargs="?", metavar="CELL", help=f"cell to draw: {TARGET}")
    text = "file format of the drawings: svg for the web, png for slides"
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help=text)
    text = "folder for the drawings (default: the run directory, else the current directory)"
    parser.add_argument("--output", metavar="DIR", help=text)
    text = "rebuild report.html of this search or retraining, for instance while it is running"
    parser.add_argument("--report", metavar="RUN_DIR", help=text)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if (args.target is None) == (args.report is None):
        raise UserError(f"nothing or too much to draw: give either {TARGET}, or --report RUN_DIR")
    if args.report is not None:
        paths = [report.write_report(args.report, VIEWS)]
    else:
        target = resolve(args.target)
        paths = cells.write_cell(args.output or target.folder, target.cell, VIEWS, args.format, target.name)
    for path in paths:
        emit(path, sys.stdout)


if __name__ == "__main__":
    main()
