"""Seeds: every random stream of a run has one of its own, derived from the run's --seed and what it is for."""

import zlib

import numpy as np
import torch

# What each stream is for. Scheme 1, of older runs, seeded it with `factor * seed + offset`: several streams shared a
# seed there (weights and population), also across runs (training of seed 18 and population of seed 19).
ROLES = {  # role: (factor, offset) of scheme 1
    "split": (1, 0),  # which images train and which validate
    "weights": (1, 0),
    "population": (1, 0),  # the first population, and breeding
    "training images": (1, 1),  # order and augmentation
    "validation images": (1, 2),
    "drop path": (1_000_000_007, 0),
    "random architectures": (1, 0),  # that a search's winner is compared with
    "final validation images": (1, 0),  # on which that is done
}
SCHEMES = (1, 2)


def add_seed_scheme(group):
    """Add the argument that records, with a run, how its seeds were derived."""
    text = "how random streams are seeded: 2, each by SEED and its purpose; 1, as older versions did, to repeat a run"
    group.add_argument("--seed_scheme", type=int, choices=SCHEMES, default=2, help=text)


def derive(seed: int, role: str, scheme: int) -> int:
    """Return the seed of a stream, a number that torch accepts; in scheme 2 it is in [0, 2**63).

    Raises KeyError for a role that is not in ROLES.
    """
    factor, offset = ROLES[role]
    if scheme == 1:
        return factor * seed + offset
    # A spawn key, unlike more entropy, cannot be mistaken for a part of a large seed.
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(role.encode()),))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def generator(args, role: str) -> torch.Generator:
    """Return a CPU generator for one role of the run with these arguments."""
    return torch.Generator().manual_seed(derive(args.seed, role, args.seed_scheme))
