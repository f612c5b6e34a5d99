"""The files population/NNN.npz of a search: the population of each generation. No torch here."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.files import UserError, atomic_write, check_unpacked_size, make_folder, open_regular

MOST_BYTES = 64 << 20  # of a file, unpacked; 50 individuals have 45 KB


class Population(NamedTuple):
    """The individuals of one generation, best first if their fitness was measured."""

    alphas: np.ndarray  # (P, G, E, O) float32, raw
    fitness: np.ndarray  # (P,) float64 in percent, NaN where it was not measured


def path_of(run_dir: str | os.PathLike, generation: int) -> Path:
    """Return the path of a generation's file."""
    return Path(run_dir) / "population" / f"{generation:03d}.npz"


def last_file(run_dir: str | os.PathLike) -> Path:
    """Return the file of a search's last generation. Raises UserError if there is none."""
    paths = [path for path in Path(run_dir, "population").glob("*.npz") if path.stem.isdecimal()]
    if not paths:
        raise UserError(f"{run_dir}: holds no population of a search. Give the run directory of a search")
    return max(paths, key=lambda path: int(path.stem))


def save(run_dir: str | os.PathLike, generation: int, population: Population) -> None:
    """Write the file of a generation. Raises UserError."""
    path = path_of(run_dir, generation)
    make_folder(path.parent)
    with atomic_write(path) as file:
        np.savez(file, **population._asdict())


def load(path: str | os.PathLike) -> Population:
    """Read the file of a generation. Raises UserError, which names the file, if it is damaged."""
    try:
        with open_regular(path) as packed, np.load(packed, allow_pickle=False) as file:
            check_unpacked_size(file.zip, MOST_BYTES)
            population = Population(file["alphas"].astype("float32"), file["fitness"].astype("float64"))
        if population.alphas.ndim != 4 or population.fitness.shape != population.alphas.shape[:1]:
            raise ValueError(f"alphas have the shape {population.alphas.shape}")
        return population
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile and numpy raise nearly any exception for damaged files
        raise UserError(f"{path}: not a saved population ({type(error).__name__}: {error})") from error
