"""Flags that several commands share: images, size of the network, resuming, seeds, device and reports."""

from support.cli import Published, number

import argparse
import os

from torch import nn

from support import devices, distributed, seeds, weights
from support.files import UserError

# The largest values that flags accept. They are far above usual values, but such networks are still
# built in seconds.
MOST = argparse.Namespace(channels=4096, cells=200, individuals=10_000, epochs=10**6 - 1, workers=1024, pixels=4096)

IMAGE_SIZE = (
    "resize and crop the images of a folder to this many pixels a side, a multiple of 4; "
    "use it for images of different sizes, or to make large images small"
)


def add_image_size(group: argparse._ArgumentGroup, text: str = IMAGE_SIZE) -> None:
    """Add --image_size."""
    group.add_argument("--image_size", type=number(int, 4, MOST.pixels), metavar="PIXELS", help=text)


def add_training_image_arguments(group: argparse._ArgumentGroup) -> None:
    """Add --image_size, --train_samples and the two flags of cutout."""
    add_image_size(group)
    text = "train on this many images, drawn from each class in proportion; for quick trials (default: all)"
    group.add_argument("--train_samples", type=number(int, 1), metavar="N", help=text)
    text = "erase a random square of each augmented image, as the paper does; only for small images in memory"
    group.add_argument("--cutout", action="store_true", help=text)
    text = "side of the square that --cutout erases, in pixels"
    group.add_argument("--cutout_length", type=number(int, 1), default=16, metavar="PIXELS", help=text)


def add_workers(group: argparse._ArgumentGroup) -> None:
    """Add --workers, for the image files of the ImageNet recipe."""
    text = "processes that read large image files; use more if the GPU waits for images, or 0 for the main process"
    group.add_argument(
        "--workers", type=number(int, 0, MOST.workers), default=min(4, os.cpu_count() or 1), metavar="N", help=text
    )


def add_init_channels(group: argparse._ArgumentGroup, text: str, *, low: int, default: int | None = None) -> None:
    """Add --init_channels, with at least `low` channels, and --init_channel, its name in the published commands."""
    group.add_argument("--init_channels", type=number(int, low, MOST.channels), default=default, metavar="C", help=text)
    group.add_argument("--init_channel", action=Published, instead="--init_channels {}")


def add_genetic_algorithm(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the genetic algorithm, with the paper's defaults."""
    text = "number of generations; each trains the shared weights for one epoch"
    group.add_argument("--epochs", type=number(int, 1, MOST.epochs), default=50, metavar="N", help=text)
    text = "number of individuals in the population"
    group.add_argument("--pop_size", type=number(int, 1, MOST.individuals), default=50, metavar="P", help=text)
    text = "number of individuals in a tournament; the fittest one becomes a parent"
    group.add_argument("--tsize", type=number(int, 1), default=10, metavar="N", help=text)
    text = "number of best individuals that enter the next generation unchanged"
    group.add_argument("--num_elites", type=number(int, 0), default=1, metavar="N", help=text)
    text = "probability that an edge of a child gets new random values"
    group.add_argument("--mutate_rate", type=number(float, 0, 1), default=0.1, metavar="RATE", help=text)


def check_genetic_algorithm(args: argparse.Namespace) -> None:
    """Raise UserError for a tournament, or elites, that are larger than the population."""
    for name in ("tsize", "num_elites"):
        if getattr(args, name) > args.pop_size:
            raise UserError(f"--{name} {getattr(args, name)} is larger than --pop_size {args.pop_size}")


def begin_with_weights(network: nn.Module, path: str | os.PathLike) -> None:
    """Load the weights that a new run begins with, and say where they are from.

    A classifier of other classes, and an auxiliary head that the file does not have, keep the
    network's fresh values. Raises UserError if other weights do not fit.
    """
    kept = weights.load_as_beginning(network, path, fresh=("classifier.", "auxiliary_head."))
    parts = dict.fromkeys(name.split(".")[0] for name in kept)
    note = f"; fresh because they do not fit: {', '.join(parts)}" if parts else ""
    distributed.say(f"begins with the weights {path}{note}")


def add_run_arguments(
    group: argparse._ArgumentGroup,
    *,
    seed: int | None,
    report_freq: int | None,
    seed_note: str = "",
    report_note: str = "",
) -> None:
    """Add the flags of a run: resume, seeds, device, speed, reports.

    If the default of a flag depends on the recipe, the default is None here, and the flag's note
    names the default of each recipe.
    """
    text = "continue the run in this directory; its saved arguments are the defaults"
    group.add_argument("--resume", metavar="RUN_DIR", help=text)
    text = f"seed of every random number; change it to repeat an experiment independently {seed_note}".rstrip()
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=seed, metavar="N", help=text)
    seeds.add_seed_scheme(group)
    devices.add_device_arguments(group)
    devices.add_speed_arguments(group)
    text = f"steps between two reports of the loss; fewer reports cost less time {report_note}".rstrip()
    group.add_argument("--report_freq", type=number(int, 1), default=report_freq, metavar="STEPS", help=text)
