"""What a run directory says of its run, for its report."""

import os
from dataclasses import dataclass, field

from reporting.charts import step_of
from reporting.views import SpaceView, Views
from run_settings import SETTINGS
from support.files import UserError, read_history, read_json

FILES = ("args.json", "history.jsonl", "genotype.json")  # a run directory has at least one of them


@dataclass
class ReportedRun:
    """The content of a run directory, as a report needs it."""

    path: str
    about: dict  # the content of args.json, {} if it cannot be read
    rows: list[dict]  # the history, in order
    step: str  # what the rows count: "generation" in a search, "epoch" in a retraining
    view: SpaceView
    views: Views
    missing: list[str] = field(default_factory=list)  # what the report lacks, and why, as sentences

    @property
    def arguments(self) -> dict:
        """The run's command-line arguments by name, or {} if args.json cannot be read."""
        return self.about.get("args", {})

    @property
    def is_search(self) -> bool:
        """Whether the run is a search, not a retraining."""
        return self.step == "generation"

    def file(self, name: str) -> str:
        """Return the path of a file of the run."""
        return os.path.join(self.path, name)


def read_run(run_dir: str | os.PathLike, views: Views) -> ReportedRun:
    """Read the arguments and the history of a run. Raises UserError, see `write_report`."""
    if not any(os.path.isfile(os.path.join(run_dir, name)) for name in FILES):
        raise UserError(f"{run_dir} is not a run directory: it has none of {', '.join(FILES)}")
    missing = []
    try:
        about = read_about(os.path.join(run_dir, "args.json"))
    except UserError as error:
        missing.append(f"The settings: {error}.")
        about = {}
    rows = read_history(run_dir, SETTINGS)
    if rows:
        step = step_of(rows)
    else:
        step = "epoch" if about.get("kind") == "eval" else "generation"
    row_of_step = {row[step]: row for row in rows}  # the last row counts if a step was repeated after a crash
    rows = [row_of_step[number] for number in sorted(row_of_step)]
    view = views.get(str(about.get("space"))) or guessed_view(rows, views)
    return ReportedRun(os.fspath(run_dir), about, rows, step, view, views, missing)


def read_about(path: str) -> dict:
    """Return the content of args.json.

    Raises UserError if the file lacks the arguments or the versions.
    """
    about = read_json(path)
    if not isinstance(about, dict) or not all(isinstance(about.get(key), dict) for key in ("args", "versions")):
        raise UserError("args.json does not hold the arguments of a run")
    return about


def guessed_view(rows: list[dict], views: Views) -> SpaceView:
    """Return the view that fits the best cell in a history's last row, or the first view."""
    best = rows[-1].get("best_genotype") if rows else None
    for view in views.values():
        if isinstance(best, view.cell_type):
            return view
    return next(iter(views.values()))
