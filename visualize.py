"""Draw cells as SVG or PNG, and rebuild the report of a run. matplotlib draws, without a display."""

from support.cli import command  # first: it ends Ctrl-C in one line

# isort: split

import argparse
import os
import sys

import genotype_files
import genotypes
from reporting import cells, report
from support.files import UserError, emit
from views import VIEWS


def resolve(target):
    """Return (architecture, name, folder for its drawings) of what the command line names. Raises UserError."""
    if target.lstrip().startswith("|"):
        return target.strip(), "", "."
    if os.path.isdir(target):
        return cells.load_cell(genotype_files.file_in(target), VIEWS), "", target
    if os.sep in target or target.endswith((".json", ".pickle")):
        return cells.load_cell(target, VIEWS), os.path.splitext(os.path.basename(target))[0], "."
    return genotypes.get(target), target, "."


@command
def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Draw cells, or rebuild the report of a run.")
    what = "a named cell such as EvNASA, a genotype file, a run directory or a NAS-Bench-201 arch string"
    parser.add_argument("target", nargs="?", metavar="NAME|FILE|RUN_DIR|ARCH", help=what)
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="of the drawings (default: svg)")
    parser.add_argument("--output", metavar="DIR", help="folder for the drawings (default: the run directory, or .)")
    parser.add_argument("--report", metavar="RUN_DIR", help="rebuild the report of a search or a retraining")
    args = parser.parse_args(argv)
    if (args.target is None) == (args.report is None):
        raise UserError(f"give either {what}, or --report RUN_DIR")
    if args.report is not None:
        paths = [report.write_report(args.report, VIEWS)]
    else:
        architecture, name, folder = resolve(args.target)
        paths = cells.write_cell(args.output or folder, architecture, VIEWS, args.format, name)
    for path in paths:
        emit(path, sys.stdout)


if __name__ == "__main__":
    main()
