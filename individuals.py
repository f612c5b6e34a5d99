"""individuals.csv: every individual of a search in one table.

A search appends the population of each generation. At its end the individuals that were measured
again with the final weights follow, and the random architectures with them. Rows count from 0, as
in `pandas.read_csv`; pareto.json and baselines.json name rows by this number.
"""

import csv
import io
import json
from collections.abc import Sequence

import torch

import populations
from costs import COSTS
from genotype_files import to_json
from search_space import SearchSetup
from support.files import UserError, append_line, atomic_write
from support.runs import Run
from training import TrainingState

NAME = "individuals.csv"

# The groups of individuals that are measured with the final weights.
LAST_POPULATION = "last population"
FRONTS = "fronts of generations"
RANDOM = "random architectures"


def columns(setup: SearchSetup) -> list[str]:
    """Return the names of the columns.

    group: "population", or one of the groups above.
    weights: "generation" if fitness was measured with the shared weights of that generation,
        "final" if it was measured with those of the end.
    generation: empty for fronts and random architectures.
    rank: 1 is the best. In a generation budgets count first, then fitness; with the final weights
        only fitness counts. Empty if fitness was not measured.
    fitness: in percent, empty if it was not measured.
    cell: the genotype as JSON, or the arch string.
    Then the costs of the retrained network (latency is empty unless it has a budget), and the true
    accuracies that the search space knows, in percent.
    """
    names = ["group", "weights", "generation", "rank", "fitness", "cell", *(cost.name for cost in COSTS)]
    return [*names, *setup.space.accuracy_names()]


def rows_of(
    setup: SearchSetup,
    alphas: torch.Tensor,
    fitness: torch.Tensor,
    ranks: Sequence[int],
    latency: dict[str, float],
    places: Sequence[tuple[str, str, int | None]],
) -> list[list]:
    """Return the rows of raw individuals (N, G, E, O) with fitness (N,), NaN where not measured.

    `latency` holds the milliseconds of the cells that have been timed. `places` are the first three
    columns of each row: group, weights and generation.
    """
    rows = []
    counts = setup.costs.counts(alphas).tolist()
    for i, individual in enumerate(alphas):
        cell = setup.space.cell(individual)
        text = cell if isinstance(cell, str) else json.dumps(to_json(cell))
        measured = [None, None] if fitness[i].isnan() else [ranks[i], fitness[i].item()]
        costs = [*counts[i], latency.get(str(cell))]
        rows.append([*places[i], *measured, text, *costs, *setup.space.true_accuracies(cell)])
    return rows


def generation_rows(
    setup: SearchSetup, alphas: torch.Tensor, fitness: torch.Tensor, latency: dict[str, float], generation: int
) -> list[list]:
    """Return the rows of a generation's population (P, G, E, O), which is sorted, best first."""
    places = [("population", "generation", generation)] * len(alphas)
    return rows_of(setup, alphas, fitness, range(1, len(alphas) + 1), latency, places)


def csv_line(row: Sequence) -> str:
    """Return a row as a line of a CSV file, without its end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(row)
    return text.getvalue()


def append_generation(setup: SearchSetup, run: Run, state: TrainingState) -> None:
    """Append the population of the last generation. `state` is a search_state.SearchState."""
    if not run.writes:
        return
    path = run.path / NAME
    rows = generation_rows(setup, state.alphas, state.fitness, state.latency, run.completed)
    if not path.exists():  # a search that was resumed before its first generation already has the header
        rows = [columns(setup), *rows]
    for row in rows:
        append_line(path, csv_line(row))


def write(setup: SearchSetup, run: Run, state: TrainingState, final: Sequence[list] = ()) -> int:
    """Write the whole table: every generation, from the files in population/, and the rows `final`.

    Returns the row number of the first of `final`, 0 in a process that does not write. A generation
    whose file is missing or damaged is left out, and the log names it.
    """
    if not run.writes:
        return 0
    rows = [columns(setup)]
    for generation in range(1, run.completed + 1):
        try:
            population = populations.load(populations.path_of(run.path, generation))
            if population.alphas.shape[1:] != state.alphas.shape[1:]:
                raise UserError("its individuals have another shape")
        except UserError as error:
            run.log(f"note: {NAME} lacks generation {generation} ({error})")
            continue
        alphas = torch.from_numpy(population.alphas)
        rows += generation_rows(setup, alphas, torch.from_numpy(population.fitness), state.latency, generation)
    with atomic_write(run.path / NAME, "w") as file:
        file.writelines(f"{csv_line(row)}\n" for row in [*rows, *final])
    return len(rows) - 1  # without the header
