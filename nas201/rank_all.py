"""Measure the fitness of all architectures of NAS-Bench-201 on the final weights of a search (--rank_all).

This gives the exact rank correlation of fitness and true accuracy over the whole space, which a
population or a few random architectures only estimate. It takes hours on a CPU.
"""

import csv
import functools
import io
import itertools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import baselines
import seed_roles
from nas201 import encoding
from nas201.genotypes import EDGES, PRIMITIVES
from search_space import SearchSetup
from support import checkpoints, distributed
from support.clock import EveryMinute
from support.files import atomic_write, check_unpacked_size, open_regular, write_json
from support.runs import Run

PART = 125  # architectures between two saves
PARTIAL = "all_architectures.npz"  # the fitness that has been measured so far
TABLE = "all_architectures.csv"
RESULT = "all_architectures.json"
MOST_BYTES = 4 << 20  # of the partial file, unpacked; 15,625 figures have 125 KB


@functools.cache
def all_alphas() -> Tensor:
    """Return every architecture as decoded alphas (15625, 1, 6, 5)."""
    operations = torch.tensor(list(itertools.product(range(len(PRIMITIVES)), repeat=len(EDGES))))  # (15625, 6)
    return F.one_hot(operations, len(PRIMITIVES)).float().unsqueeze(1)


def saved_fitness(run: Run, weights: str, count: int) -> np.ndarray:
    """Return the fitness (count,) that an interrupted measurement has saved, NaN where it is not measured yet.

    A file that is damaged or belongs to other weights is ignored.
    """
    try:
        with open_regular(run.path / PARTIAL) as packed, np.load(packed, allow_pickle=False) as file:
            check_unpacked_size(file.zip, MOST_BYTES)
            if str(file["weights"]) == weights and file["fitness"].shape == (count,):
                return file["fitness"].astype(np.float64)
    except Exception:  # zipfile and numpy raise nearly any exception for damaged files
        pass
    return np.full(count, np.nan)


def rank_all(setup: SearchSetup, run: Run) -> None:
    """Measure all architectures, and write all_architectures.csv and all_architectures.json.

    Continues a measurement that was interrupted. Every architecture sees the same images. Raises
    Interrupted after a signal; at most PART architectures are then measured again.
    """
    alphas = all_alphas()
    weights = checkpoints.digest_of_tensors(setup.network.state_dict())
    fitness = np.zeros(len(alphas))
    if run.writes:
        fitness = saved_fitness(run, weights, len(alphas))
    fitness = distributed.sum_over_ranks(torch.from_numpy(fitness)).cpu().numpy()  # in all processes that of rank 0
    setup.clock.work["fitness"].left = np.isnan(fitness).sum() * len(setup.valid_loader)
    minute = EveryMinute()
    for start in range(0, len(alphas), PART):
        part = slice(start, start + PART)
        if np.isnan(fitness[part]).any():
            setup.valid_loader.generator = baselines.generator(setup.args, seed_roles.FINAL_VALIDATION_IMAGES)
            where = f"all architectures, {start} of {len(alphas)}"
            fitness[part] = setup.measure(alphas[part], where).numpy()
            if run.writes:
                with atomic_write(run.path / PARTIAL) as file:
                    np.savez(file, fitness=fitness, weights=weights)
            if minute.due():
                distributed.say(f"fitness of {np.isfinite(fitness).sum():,} architectures; {setup.clock.text()}")
    if run.writes:
        write_result(setup, run, fitness)


def write_result(setup: SearchSetup, run: Run, fitness: np.ndarray) -> None:
    """Write the table and, if the benchmark has true accuracies, the rank correlations; log them."""
    space = setup.space
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["cell", "fitness", *space.accuracy_names()])
    for individual, value in zip(all_alphas(), fitness.tolist(), strict=True):
        cell = encoding.arch_string(individual)
        table.writerow([cell, value, *space.true_accuracies(cell)])
    with atomic_write(run.path / TABLE) as file:
        file.write(text.getvalue().encode())
    correlations = space.rank_correlations_of(all_alphas(), fitness.tolist())
    write_json(run.path / RESULT, {"architectures": len(fitness), **correlations})
    (run.path / PARTIAL).unlink(missing_ok=True)
    tau = correlations.get("kendall_tau")
    told = "no true accuracy"
    if tau is not None:
        told = f"Kendall's tau with {correlations['truth']} accuracy {tau:.3f}"
    run.log(f"fitness of all {len(fitness):,} architectures on the final weights: {told}; see {run.path / TABLE}")
