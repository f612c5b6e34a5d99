"""The state of a search, and what each generation writes into the run directory."""

import functools
import math
import re

import torch

import baselines
import genotype_files
import individuals
import populations
import seed_roles
import utils
from costs import Costs
from evolution import VARIANTS, next_generation, non_dominated, ranks
from search_space import SearchSetup, SearchSpace
from support import checkpoints, devices, distributed, runs, seeds
from support.clock import DAY, Clock, Work, duration
from training import FORWARD, TrainingSettings, TrainingState, make_optimizer

ARCHIVED = 100  # most individuals that the archive keeps from the generations' fronts of fitness and costs


class SearchState(TrainingState):
    """The state of a search: the shared weights, the population, and what has been measured.

    - `alphas` (P, G, E, O) is the raw population. Once it is measured, the best individual is first.
    - `fitness` (P,) is in percent, and NaN until it is measured.
    - `violation` (P,) says by how much individuals exceed the budgets; 0 means that they are met.
    - `latency` {cell: ms} holds the cells that have been timed.
    - `archive` {cell: raw alphas (G, E, O)} holds the newest individuals that were not dominated in
      their own generation.
    """

    saved = ("alphas", "fitness", "violation", "latency", "archive")

    def __init__(self, setup: SearchSetup):
        args = setup.args
        self.breeding = seeds.generator(args, seed_roles.POPULATION)
        super().__init__(
            setup.network,
            make_optimizer(setup.network.parameters(), args, nesterov=setup.space.nesterov),
            setup.train_loader,
            TrainingSettings.of(args),
            breeding=self.breeding,
            valid=setup.valid_loader.generator,
        )
        self.alphas = setup.space.encoding.random_alphas(args.pop_size, generator=self.breeding)
        if setup.first_population is not None:
            self.alphas = setup.first_population
        self.fitness = torch.full((args.pop_size,), math.nan, dtype=torch.float64)
        self.violation = torch.zeros(args.pop_size, dtype=torch.float64)
        self.latency: dict[str, float] = {}
        self.archive: dict[str, torch.Tensor] = {}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned.

        If `state` is not a state of this search, raises ValueError, or an error of dict or torch.
        """
        super().load_state_dict(state)
        for alphas in [*self.alphas, *self.archive.values()]:
            same_shape = checkpoints.shape_of(alphas) == checkpoints.shape_of(self.alphas[0])
            if not same_shape or not ((alphas >= 0) & (alphas < 1)).all():
                raise ValueError("an individual has another shape, or genes outside [0, 1)")
        if ((self.fitness < 0) | (self.fitness > 100)).any():
            raise ValueError("a fitness is outside 0 to 100 %")
        for value in [*self.latency.values(), *self.violation.tolist()]:
            if not (type(value) is float and 0 <= value < math.inf):
                raise ValueError("a latency or a violation is not a number of at least 0")

    def breed(self, setup: SearchSetup) -> None:
        """Replace the population by the next generation; see `next_generation`."""
        args = setup.args
        self.alphas = next_generation(
            self.alphas,
            self.fitness,
            num_elites=args.num_elites,
            tsize=args.tsize,
            mutate_rate=args.mutate_rate,
            generator=self.breeding,
            variant=args.variant,
            violation=self.violation,
        )

    def set_fitness(self, fitness: torch.Tensor, costs: Costs) -> None:
        """Sort the population by `ranks`, best first, and archive its front.

        Individuals of equal rank keep their order. The front holds the individuals that are not
        dominated in fitness and costs.
        """
        amounts = costs.amounts(self.alphas, self.latency)
        violation = costs.violation(amounts)
        order = torch.sort(ranks(fitness, violation), descending=True, stable=True).indices
        self.alphas = self.alphas[order]
        self.fitness = fitness[order]
        self.violation = violation[order]
        points = torch.cat([-self.fitness.unsqueeze(1).to(amounts), amounts[order]], dim=1)
        front = self.alphas[non_dominated(points)]
        for alphas in front.flip(0):  # the best are added last, so the archive keeps them longest
            cell = str(costs.space.cell(alphas))
            self.archive.pop(cell, None)  # so that the cell moves to the end of the archive
            self.archive[cell] = alphas.clone()
        self.archive = dict(list(self.archive.items())[-ARCHIVED:])


def population_fields(setup: SearchSetup, state: SearchState) -> tuple[dict, str]:
    """Return the fields of the history that describe a sorted population, and a text for the log.

    The text says how many individuals meet the budget, and adds the remarks of the search space.
    """
    costs = setup.costs
    fields = {
        "fitness_best": state.fitness[0].item(),
        "fitness_mean": state.fitness.mean().item(),
        "fitness_std": state.fitness.std(correction=0).item(),
        "best_genotype": genotype_files.to_json(setup.space.cell(state.alphas[0])),
    }
    remarks = setup.space.remarks_on_population(state.alphas, state.fitness)
    fields |= remarks.fields
    text = remarks.text
    if any(costs.limits.values()):
        fields["feasible"] = int((state.violation == 0).sum())
        text = f", {fields['feasible']} meet the budget{text}"
    amounts = costs.amounts(state.alphas[:1], state.latency)[0].tolist()
    fields |= dict(zip(costs.names, amounts, strict=True))
    return fields, text


# ---- the time left


def search_clock(setup: SearchSetup, run: runs.Run, state: SearchState) -> Clock:
    """Return the clock of a search: "training" counts steps, "fitness" individuals times batches.

    What the checkpoint counts is not left any more.
    """
    args = setup.args
    steps = len(setup.train_loader)
    done = run.completed * steps + (state.partial.steps if state.partial else 0)
    images = setup.valid_loader.size / max(len(setup.valid_loader), 1)  # in a batch
    weight = FORWARD * images / args.batch_size
    when_known = functools.partial(tell_duration, setup, run)
    clock = Clock(when_known, training=Work(args.epochs * steps - done), fitness=Work(0, weight))
    plan_fitness(setup, clock, args.pop_size, args.epochs - run.completed)
    return clock


def plan_fitness(setup: SearchSetup, clock: Clock, distinct: int, generations: int) -> None:
    """Set how many measurements are left: `generations` of `distinct` individuals, and the last measurement."""
    args = setup.args
    measured = generations if VARIANTS[args.variant].selection else min(generations, 1)
    individuals = measured * distinct + distinct + args.baselines
    clock.work["fitness"].left = individuals * len(setup.valid_loader) / distributed.world_size()


def tell_duration(setup: SearchSetup, run: runs.Run, seconds: float) -> None:
    """Log how long the search will take and, if that is days on a CPU, how to make it shorter."""
    args = setup.args
    memory = devices.peak_memory_mb(setup.device)
    text = f"{'the rest of ' if args.resume else ''}the search will take about {duration(seconds)}"
    if memory:
        text += f", and has used {memory:,.0f} MB of memory so far"
    run.log(text)
    if setup.device.type == "cpu" and seconds > DAY:
        share = DAY / seconds
        train = max(int(share * setup.train_loader.size), 1)
        valid = max(int(share * setup.valid_loader.size), 1)
        advice = f"--train_samples {train} --valid_samples {valid}"
        if share * args.epochs >= 2:
            advice = f"--epochs {int(share * args.epochs)}, or {advice}"
        run.log(f"to finish in a day on this machine, use for example {advice}; or use a GPU")


# ---- files


def save_generation(setup: SearchSetup, run: runs.Run, state: SearchState, row: dict, where: str, remarks: str) -> None:
    """Save the history, the checkpoint and the results of a generation, and log it.

    `row` is the generation's row of the history.
    """
    generation = row["generation"]
    run.record(generation, row)
    run.save_checkpoint(generation, state.state_dict())
    save_results(run, setup.space, state)
    individuals.append_generation(setup, run, state)
    text = f"{where}: loss {row['train_loss']:.4f}, train top-1 {row['train_top1']:.2f} %"
    if "fitness_best" in row:
        text += f", fitness best {row['fitness_best']:.2f} mean {row['fitness_mean']:.2f}"
    left = f"; {state.clock.text()}" if state.clock.text() else ""
    run.log(f"{text}, {row['distinct']} distinct, {row['seconds']:.1f} s{remarks}{left}")


def save_results(run: runs.Run, space: SearchSpace, state: SearchState) -> None:
    """Save the population, the best cell and the weights of a generation."""
    if run.writes:
        population = populations.Population(state.alphas.numpy(), state.fitness.numpy())
        populations.save(run.path, run.completed, population)
        if "best_genotype" in run.rows[-1]:
            for name in space.genotype_files:
                genotype_files.save(space.cell(state.alphas[0]), run.path / name)
    run.save_weights(state.network, "weights.pt", {"space": space.view.name})


def restore_results(setup: SearchSetup, run: runs.Run, state: SearchState) -> None:
    """Make the files of a resumed run agree with its checkpoint.

    Populations of later generations are removed. If the checkpoint was saved after a generation,
    the files of this generation are written again. If the checkpoint was saved within a generation,
    nothing is written. The files of the last whole generation exist already, and the state is ahead
    of them.
    """
    if not run.writes:
        return
    for path in (run.path / "population").glob("*.npz"):
        if re.fullmatch(r"\d+", path.stem) and int(path.stem) > run.completed:
            path.unlink()
    if run.completed and state.partial is None:
        save_results(run, setup.space, state)
    if run.completed < setup.args.epochs or not baselines.is_complete(run.path):
        for name in baselines.FILES:
            (run.path / name).unlink(missing_ok=True)
        individuals.write(setup, run, state)


def speed_fields(setup: SearchSetup, state: SearchState, measured: int) -> dict[str, float]:
    """Return the fields of the history that describe the speed and memory of a generation.

    `measured` is the number of individuals whose fitness was measured.
    """
    images = setup.train_loader.size + measured * setup.valid_loader.size
    return utils.speed_and_memory(images, state.progress.start, setup.device)
