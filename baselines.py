"""Judge the result of a search with the final shared weights.

`conclude` compares the winner with random architectures, and finds the Pareto front of fitness and
costs. It writes pareto.json and baselines.json into the run directory.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import individuals
import seed_roles
from costs import Costs
from evolution import VARIANTS, non_dominated
from fitness import unique
from genotype_files import from_json, to_json
from search_space import Group, SearchSetup, SearchSpace
from support import distributed, seeds
from support.files import UserError, read_json, write_json
from support.provenance import shell_command
from support.runs import Run
from training import TrainingState

FILES = ("pareto.json", "baselines.json")  # in the order in which `conclude` writes them
# Seed of the random architectures, and of the order and augmentation of the validation images. It
# is the same in every run, so that the results of runs can be compared.
SEED = 2021


def generator(args: argparse.Namespace, role: seeds.Role) -> torch.Generator:
    """Return the random number generator of one role. Unlike other generators, it ignores --seed."""
    return torch.Generator().manual_seed(seeds.derive(SEED, role, args.seed_scheme))


def conclude(setup: SearchSetup, state: TrainingState, measure: Callable, run: Run) -> None:
    """Measure the candidates again with the final weights, and write the results.

    The candidates are the last population, the archived fronts of the generations, and --baselines
    random architectures. The results go into individuals.csv, pareto.json, baselines.json and one
    sentence of the log.

    `measure(alphas)` returns the fitness (N,) of individuals. All candidates are measured in one
    call, so that all of them see the same images. `state` is a search_state.SearchState.
    Raises Interrupted after a signal.
    """
    start = time.perf_counter()
    args = setup.args
    space = setup.space
    costs = setup.costs
    searched, last = distinct_cells(space, state)
    drawn = space.encoding.random_alphas(args.baselines, generator=generator(args, seed_roles.RANDOM_ARCHITECTURES))
    alphas = torch.cat([searched, drawn])  # (N, G, E, O)
    decoded = VARIANTS[args.variant].decoded_in_fitness
    fitness = measure(space.encoding.decode(alphas) if decoded else alphas)
    parameters = costs.counts(alphas)[:, 0]
    count = len(searched)
    groups = {
        "last population": Group(alphas[:last], fitness[:last], parameters[:last]),
        "random architectures": Group(alphas[count:], fitness[count:], parameters[count:]),
    }

    first_row = write_table(setup, run, state, alphas, fitness, last, count)
    pareto = front_of(space, costs, searched, fitness[:count], state.latency, first_row)
    winner = pareto["individuals"][0] | {"genotype": to_json(space.cell(searched[0]))}
    result, sentence = compare(winner, fitness[count:].tolist(), feasible=state.violation[0].item() == 0)
    remarks = space.remarks_on_result(groups)
    sentence += remarks.text
    command = retrain_command(setup, run.path)
    result["random_rows"] = list(range(first_row + count, first_row + len(alphas)))
    result |= remarks.fields | {"sentence": sentence, "retrain": command, "seconds": time.perf_counter() - start}
    if run.writes:
        write_json(run.path / "pareto.json", pareto)
        write_json(run.path / "baselines.json", result)
    run.log(sentence)
    run.log(f"to retrain the winner: {command}")


def distinct_cells(space: SearchSpace, state: TrainingState) -> tuple[torch.Tensor, int]:
    """Return the distinct cells of the last population and of the archived fronts.

    Returns raw individuals (N, G, E, O), and how many of them are from the last population. The
    last population comes first, beginning with the winner. The fronts follow, newest first.
    """
    archived = [alphas.unsqueeze(0) for alphas in reversed(state.archive.values())]
    searched = torch.cat([state.alphas, *archived])
    distinct = unique(space.encoding.decode(searched))
    last = sum(position < len(state.alphas) for position in distinct.first)
    return searched[distinct.first], last


def write_table(
    setup: SearchSetup,
    run: Run,
    state: TrainingState,
    alphas: torch.Tensor,
    fitness: torch.Tensor,
    last: int,
    count: int,
) -> int:
    """Write individuals.csv with the individuals (N, G, E, O) that were measured again.

    `last` of them are the last population's, those up to `count` are of fronts, the others random.
    Returns the row number of the first of them.
    """
    places = [(individuals.LAST_POPULATION, "final", run.completed)] * last
    places += [(individuals.FRONTS, "final", None)] * (count - last)
    places += [(individuals.RANDOM, "final", None)] * (len(alphas) - count)
    order = torch.sort(fitness, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1)
    rows = individuals.rows_of(setup, alphas, fitness, rank.tolist(), state.latency, places)
    return individuals.write(setup, run, state, rows)


def compare(winner: dict, random_fitness: list[float], *, feasible: bool) -> tuple[dict, str]:
    """Compare the winner with random architectures.

    Returns the fields for baselines.json and the sentence for the log. `winner` holds the winner's
    fitness and costs. `feasible` says whether the winner meets the budgets.
    """
    fields = {"winner": winner, "feasible": feasible, "random_fitness": random_fitness, "random_seed": SEED}
    size = f"{winner['parameters_M']:.2f} M parameters, {winner['mult_adds_M']:.1f} M mult-adds"
    sentence = f"the winner's network has {size}"
    if random_fitness:
        better = sum(value < winner["fitness"] for value in random_fitness)
        fields["better_than"] = better
        fields["random_mean"] = statistics.fmean(random_fitness)
        fields["random_best"] = max(random_fitness)
        number = len(random_fitness)
        again = f"fitness {winner['fitness']:.2f} %, measured again with the final weights"
        sentence = f"{again}: better than {better} of {number} random architectures; {sentence}"
    return fields, sentence


def retrain_command(setup: SearchSetup, path: Path) -> str:
    """Return the shell command that retrains the winner of the search in `path`.

    `train.py --dir` knows the images of the search. The recipe's batch is made smaller if the
    search had fewer images.
    """
    words = setup.space.retraining_flags(setup.args, setup.costs.image_shape)
    images = setup.train_loader.size
    if images < setup.space.recipe.batch_size:
        words += ["--batch_size", max(2, images // 4)]
    return shell_command("train.py", "--dir", path, *words)


def is_complete(path: Path) -> bool:
    """Return whether a run directory has everything that `conclude` writes."""
    with contextlib.suppress(UserError):
        there = all(isinstance(read_json(path / name), dict) for name in FILES)
        return there and (path / individuals.NAME).is_file()
    return False


def are_there(run: Run) -> bool:
    """Return whether the files that `conclude` writes exist for this run. All processes get the same answer."""
    there = run.writes and is_complete(run.path)
    return bool(distributed.sum_over_ranks(torch.tensor(float(there))).item())


def front_of(
    space: SearchSpace,
    costs: Costs,
    alphas: torch.Tensor,
    fitness: torch.Tensor,
    latency: dict[str, float],
    first_row: int,
) -> dict:
    """Return the content of pareto.json for individuals (N, G, E, O).

    The content lists all individuals, and then their Pareto front with the fittest first. `first_row` is the
    row of the first one in individuals.csv; the others follow.
    """
    amounts = costs.amounts(alphas, latency)  # (N, costs)
    names = ["fitness", *costs.names]
    values = torch.cat([fitness.unsqueeze(1), amounts], dim=1).tolist()
    measured = [dict(zip(names, row, strict=True)) | {"row": first_row + i} for i, row in enumerate(values)]
    points = torch.cat([-fitness.unsqueeze(1), amounts], dim=1)
    front = non_dominated(points).nonzero().flatten().tolist()
    front.sort(key=lambda i: -measured[i]["fitness"])
    return {
        "about": "the last population and the front of each generation, measured again with the final weights",
        "individuals": measured,
        "front": [measured[i] | {"genotype": to_json(space.cell(alphas[i]))} for i in front],
    }


def pick(run_dir: str | Path, number: int) -> tuple:
    """Return cell `number`, counted from 1, of a search's front, and a text that says where it is from.

    Raises UserError if the front cannot be read or has fewer cells.
    """
    path = f"{run_dir}/pareto.json"
    content = read_json(path)
    front = content.get("front") if isinstance(content, dict) else None
    if not isinstance(front, list) or not all(isinstance(entry, dict) for entry in front):
        raise UserError(f"{path} does not hold the front of a search; resume the search to write it again")
    if number > len(front):
        raise UserError(f"--pick {number}: there are only {len(front)} on the front in {path}")
    where = f"{path}, front, number {number}"
    return from_json(front[number - 1].get("genotype"), where), where
