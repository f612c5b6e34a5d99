"""What a search's result is worth: the front of fitness and costs, and random architectures, on the final weights."""

import contextlib
import statistics

import torch

import seed_roles
from engine import unique
from evolution import non_dominated
from genotype_files import from_json, to_json
from support import distributed, seeds
from support.files import UserError, read_json, write_json
from support.provenance import shell_command

FILES = ("pareto.json", "baselines.json")  # in the order in which they are written
SEED = 2021  # of the random architectures and of the images' order and augmentation: the same whatever the run's seed


def generator(args, role: str) -> torch.Generator:
    """Return the generator of one role; unlike a run's own ones it does not depend on --seed."""
    return torch.Generator().manual_seed(seeds.derive(SEED, role, args.seed_scheme))


def conclude(args, space, costs, state, measure, run):
    """Write pareto.json and baselines.json; log in a sentence what the winner is worth, and how to retrain it.

    The last population, the fronts of all generations and `args.baselines` random architectures go to `measure`, which
    returns their fitness (N,), in one call, so on the same images. Raises Interrupted.
    """
    searched = torch.cat([state.alphas, *(alphas[None] for alphas in reversed(state.archive.values()))])
    index = unique(space.encoding.decode(searched))[1].tolist()
    searched = searched[[index.index(i) for i in range(max(index) + 1)]]  # each cell once, the winner first
    last = max(index[: len(state.alphas)]) + 1  # distinct cells of the last population
    drawn = space.encoding.random_alphas(args.baselines, generator=generator(args, seed_roles.RANDOM_ARCHITECTURES))
    alphas = torch.cat([searched, drawn])
    fitness = measure(alphas if args.variant in ("nd", "ndf") else space.encoding.decode(alphas))

    pareto = front_of(space, costs, searched, fitness[: len(searched)], state.latency)
    winner = pareto["individuals"][0] | {"genotype": to_json(space.cell(searched[0]))}
    random = fitness[len(searched) :].tolist()
    result = {"winner": winner, "feasible": state.violation[0].item() == 0}
    result |= {"random_fitness": random, "random_seed": SEED}
    text = "the winner's network has {parameters_M:.2f} M parameters, {mult_adds_M:.1f} M mult-adds".format(**winner)
    if random:
        better = sum(value < winner["fitness"] for value in random)
        result |= {"better_than": better, "random_mean": statistics.fmean(random), "random_best": max(random)}
        text = f"better than {better} of {len(random)} random architectures on the shared weights; {text}"
    parameters = costs.counts(alphas)[:, 0]
    parts = {"last population": slice(last), "random architectures": slice(len(searched), None)}
    fields, remarks = space.worth({name: (alphas[i], fitness[i], parameters[i]) for name, i in parts.items()})
    words = ["--dir", run.path, "--dataset", args.dataset, "--data", args.data]
    words += ["--image_size", args.image_size] if args.image_size else []
    command = shell_command("train.py", *words, *space.retraining(args, costs.image_shape))
    result |= fields | {"sentence": text + remarks, "retrain": command}
    if run.writes:
        write_json(run.path / "pareto.json", pareto)
        write_json(run.path / "baselines.json", result)
    run.log(result["sentence"])
    run.log(f"to retrain the winner: {command}")


def are_there(run) -> bool:
    """Tell, in every process, whether `conclude` has already been done for this run; if so, it is not done again."""
    there = False
    if run.writes:
        with contextlib.suppress(UserError):
            there = all(isinstance(read_json(run.path / name), dict) for name in FILES)
    return bool(distributed.sum_over_ranks(torch.tensor(float(there))).item())


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
    path = f"{run_dir}/pareto.json"
    content = read_json(path)
    front = content.get("front") if isinstance(content, dict) else None
    if not isinstance(front, list) or not all(isinstance(entry, dict) for entry in front):
        raise UserError(f"{path} holds no front of a search")
    if number > len(front):
        raise UserError(f"--pick {number}: the front in {path} has {len(front)} architectures")
    where = f"{path}, front, number {number}"
    return from_json(front[number - 1].get("genotype"), where), where
