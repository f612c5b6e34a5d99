"""What a search's result is worth: the front of fitness and costs, and random architectures, on the final weights."""

import statistics

import torch

from engine import unique
from evolution import non_dominated
from genotypes import from_json, to_json
from support.files import UserError, read_json, write_json
from support.runs import shell_command

SEED = 2021  # of the random architectures and of the images' order and augmentation: the same whatever the run's seed
PARETO, FILE = "pareto.json", "baselines.json"  # in a run directory


def conclude(args, space, costs, state, measure, run):
    """Write pareto.json and baselines.json; log in a sentence what the winner is worth, and how to retrain it.

    `measure` returns the fitness (N,) of raw alphas (N, G, E, O). The last population, the fronts of all generations
    and `args.baselines` random architectures are measured in one call, on the same images. Raises Interrupted.
    """
    kept = torch.cat([state.alphas, *(alphas[None] for alphas in reversed(state.archive.values()))])
    _, index = unique(space.encoding.decode(kept))
    kept = kept[[index.tolist().index(i) for i in range(index.max() + 1)]]  # the winner first
    last = int(index[: len(state.alphas)].max()) + 1  # distinct individuals of the last population
    drawn = space.encoding.random_alphas(args.baselines, generator=torch.Generator().manual_seed(SEED))
    everyone = torch.cat([kept, drawn])
    fitness = measure(everyone)
    groups = {"last population": slice(last), "random architectures": slice(len(kept), None)}
    counts = costs.counts(everyone)
    groups = {name: (everyone[part], fitness[part], counts[part, 0]) for name, part in groups.items()}

    pareto = front_of(space, costs, kept, fitness[: len(kept)], state.latency)
    winner = pareto["individuals"][0] | {
        "genotype": to_json(space.cell(kept[0])),
        "feasible": state.violation[0].item() == 0,
    }
    random = groups["random architectures"][1].tolist()
    result = {"winner": winner, "random_fitness": random, "random_seed": SEED}
    text = (
        f"the winner's network has {winner['parameters_M']:.2f} M parameters, {winner['mult_adds_M']:.1f} M mult-adds"
    )
    if random:
        better = sum(value < winner["fitness"] for value in random)
        result |= {"better_than": better, "random_mean": statistics.fmean(random), "random_best": max(random)}
        text = f"better than {better} of {len(random)} random architectures on the shared weights; {text}"
    fields, remarks = space.worth(groups)
    words = ["--dir", run.path, "--dataset", args.dataset, "--data", args.data]
    words += ["--image_size", args.image_size] if args.image_size else []
    command = shell_command("train.py", *words, *space.retraining(args, costs.image_shape))
    result |= fields | {"sentence": text + remarks, "retrain": command}
    if run.writes:
        write_json(run.path / PARETO, pareto)
        write_json(run.path / FILE, result)
    run.log(result["sentence"])
    run.log(f"to retrain the winner: {command}")


def front_of(space, costs, alphas, fitness, latency):
    """Return what becomes pareto.json of individuals (N, G, E, O): all, and the non-dominated, fittest first."""
    of = costs.of(alphas, latency)
    names = ["fitness", *costs.names]
    values = torch.cat([fitness.unsqueeze(1), of], dim=1).tolist()
    individuals = [dict(zip(names, row, strict=True)) for row in values]
    best = non_dominated(torch.cat([-fitness.unsqueeze(1), of], dim=1)).nonzero().flatten().tolist()
    best = sorted(best, key=lambda i: -values[i][0])
    return {
        "about": "the last population and the front of each generation, measured again with the final weights",
        "individuals": individuals,
        "front": [individuals[i] | {"genotype": to_json(space.cell(alphas[i]))} for i in best],
    }


def pick(run_dir, number):
    """Return the cell that is `number`, from 1, in the front of a search, and where it stands. Raises UserError."""
    path = f"{run_dir}/{PARETO}"
    content = read_json(path)
    front = content.get("front") if isinstance(content, dict) else None
    if not isinstance(front, list) or not all(isinstance(entry, dict) for entry in front):
        raise UserError(f"{path} holds no front of a search")
    if number > len(front):
        raise UserError(f"--pick {number}: the front in {path} has {len(front)} architectures")
    where = f"{path}, front, number {number}"
    return from_json(front[number - 1].get("genotype"), where), where
