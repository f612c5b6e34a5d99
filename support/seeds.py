"""Seeds: each random stream of a run has its own seed, made from --seed and the stream's role."""

import argparse
import zlib
from typing import NamedTuple

import numpy as np
import torch

SCHEMES = (1, 2)


class Role(NamedTuple):
    """What a random stream is for.

    Scheme 2 derives the seed of a stream from the run's seed and the role's name. Scheme 1 is for
    older runs and computes `factor * seed + offset`. With scheme 1, two roles can share a stream,
    and so can two runs with neighbouring seeds.
    """

    name: str
    factor: int = 1
    offset: int = 0


def add_seed_scheme(group: argparse._ArgumentGroup) -> None:
    """Add --seed_scheme, which records with a run how its seeds were derived."""
    text = (
        "how the seed of each random stream is derived: 2 hashes --seed with the stream's purpose; "
        "1 is the rule of earlier versions, only needed to repeat a run of such a version"
    )
    group.add_argument("--seed_scheme", type=int, choices=SCHEMES, default=2, help=text)


def derive(seed: int, role: Role, scheme: int) -> int:
    """Return the seed of a stream, a number that torch accepts.

    In scheme 2 the seed is in [0, 2**63).
    """
    if scheme == 1:
        return role.factor * seed + role.offset
    # The role is the spawn key, not part of the entropy. SeedSequence([seed, role]) could be the
    # same as SeedSequence of one large seed.
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(role.name.encode()),))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def generator(args: argparse.Namespace, role: Role) -> torch.Generator:
    """Return a CPU generator for one role in the run with these arguments."""
    return torch.Generator().manual_seed(derive(args.seed, role, args.seed_scheme))
