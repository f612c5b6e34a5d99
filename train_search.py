"""Search for a cell in the DARTS space (S1) with EvNAS.

EvNAS is a genetic algorithm over the shared weights of one supernet.
"""

from support.cli import command, number

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

import datasets
import encoding
import fast_search
import genotype_files
import genotypes
import memory
import search_cli
import seed_roles
from costs import s1_table
from evolution import VARIANTS
from fitness import unique
from model import NetworkCIFAR
from model_search import Network
from recipes import CIFAR
from run_settings import SETTINGS
from search_space import SearchSetup, SearchSpace
from search_state import (
    SearchState,
    plan_fitness,
    population_fields,
    restore_results,
    save_generation,
    search_clock,
    speed_fields,
)
from shared_flags import MOST
from splits import describe
from support import agreement, devices, runs, seeds
from training import set_learning_rate, train_one_epoch
from views import DARTS


def search(setup: SearchSetup, run: runs.Run) -> SearchState:
    """Run the search loop of EvNAS (paper, section 3).

    Returns the last state, whose first individual is the best. Both search spaces use this loop. A
    resumed run continues after the last generation or the last training step in its checkpoint.
    """
    args = setup.args
    variant = VARIANTS[args.variant]
    state = SearchState(setup)
    run.restore(state)
    if run.state:
        restore_results(setup, run, state)
    setup.clock = state.clock = search_clock(setup, run, state)
    for generation in range(run.completed + 1, args.epochs + 1):
        where = f"generation {generation}/{args.epochs}"
        if generation > 1 and state.partial is None:
            state.breed(setup)
        state.begin_epoch()
        decoded = setup.space.encoding.decode(state.alphas)
        trained = decoded if variant.decoded_in_training else state.alphas
        measured = decoded if variant.decoded_in_fitness else state.alphas
        lr = cosine(args.learning_rate, args.learning_rate_min, (generation - 1) / args.epochs)
        row = {"generation": generation, "lr": lr}
        remarks = ""
        individuals_measured = 0
        with run.saving_when_interrupted(state.unfinished_state_dict):
            row |= train_generation(setup, state, trained, lr, where, run)
            row["distinct"] = len(unique(decoded).first)
            if variant.selection or generation == args.epochs:
                fitness = setup.measure(measured, f"{where}, fitness")
                state.set_fitness(fitness, setup.costs)
                individuals_measured = len(unique(measured).first)
                plan_fitness(setup, state.clock, individuals_measured, args.epochs - generation)
                fields, remarks = population_fields(setup, state)
                row |= fields
        row |= speed_fields(setup, state, individuals_measured)
        save_generation(setup, run, state, row, where, remarks)
    return state


def train_generation(
    setup: SearchSetup, state: SearchState, alphas: torch.Tensor, lr: float, where: str, run: runs.Run
) -> dict[str, float]:
    """Train the shared weights for one epoch.

    Batch t is computed with individual t mod P of `alphas` (P, G, E, O).
    """
    forward = setup.forward(compile=setup.args.compile)
    alphas = alphas.to(setup.device)

    def inputs_of(step: int) -> tuple[torch.Tensor]:
        return (alphas[step % len(alphas)],)

    def loss_of(x: torch.Tensor, y: torch.Tensor, individual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = forward(state.network, x, individual)  # (B, classes)
        return F.cross_entropy(logits, y), logits

    set_learning_rate(state.optimizer, lr)
    state.network.train()
    return train_one_epoch(state, loss_of, inputs_of, where=where, log=run.log)


def cosine(high: float, low: float, progress: float) -> float:
    """Return the value of the cosine schedule from `high` to `low` at `progress` in [0, 1)."""
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


# ---- the command for the DARTS space


class S1(SearchSpace):
    """The DARTS search space (S1)."""

    view = DARTS
    encoding = encoding
    fast = fast_search
    genotype_files = genotype_files.FILES
    recipe = CIFAR

    def cell(self, alphas: torch.Tensor) -> genotypes.Genotype:
        """Return the Genotype of one raw individual (2, 14, 8)."""
        return encoding.genotype(alphas)

    def network(self, args: argparse.Namespace, cell: genotypes.Genotype, classes: int) -> nn.Module:
        """Return the network that `train.py` would train with the CIFAR recipe.

        The network has --target_channels and --target_layers, and no auxiliary head.
        """
        return NetworkCIFAR(args.target_channels, classes, args.target_layers, False, cell)

    def cost_table(
        self, args: argparse.Namespace, classes: int, image_shape: tuple[int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cost table of the networks that `network` makes: see `costs.s1_table`."""
        return s1_table(args.target_channels, args.target_layers, classes, image_shape)

    def retraining_flags(self, args: argparse.Namespace, image_shape: tuple[int, int, int]) -> list:
        """Return the paper's --cutout and --auxiliary, and the flags for the size of the network.

        As in the paper, cutout erases a square of half the image's side.
        """
        flags = ["--cutout"]
        if image_shape[1] < 32:
            flags += ["--cutout_length", image_shape[1] // 2]
        if image_shape[1:] == (32, 32) and args.target_layers > 1:  # the auxiliary head needs both
            flags.append("--auxiliary")
        return [*flags, "--init_channels", args.target_channels, "--layers", args.target_layers]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command, with the flags that both search spaces have and those of the DARTS space."""
    parser = search_cli.search_parser("train_search.py", __doc__)
    group = parser.add_argument_group("DARTS space")
    group.add_argument(
        "--layers", type=number(int, 1, MOST.cells), default=8, metavar="N", help="cells of the supernet"
    )
    text = "channels of the retrained network's first cells; costs and budgets are those of the retrained network"
    channels = number(int, 2, MOST.channels)
    group.add_argument("--target_channels", type=channels, default=CIFAR.init_channels, metavar="C", help=text)
    text = "cells of the retrained network"
    group.add_argument("--target_layers", type=number(int, 1, MOST.cells), default=CIFAR.layers, metavar="N", help=text)
    text = "share of the training images used for training; the rest validates"
    group.add_argument("--train_portion", type=number(float, above=0, high=1), default=0.5, metavar="SHARE", help=text)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Search in the DARTS space."""
    parser = make_parser()
    args = search_cli.parse(parser, argv)
    if search_cli.is_finished(args, S1):
        return
    device = devices.choose_device(args)
    agreement.check_arguments_alike(args, SETTINGS)
    train, valid, augmentation = datasets.search_splits(args)
    train_loader, valid_loader = search_cli.search_loaders(args, train, valid, augmentation, device)
    candidates = tuple(genotypes.PRIMITIVES) * 14  # in a cell of the supernet: every operation on each of 14 edges
    cells = memory.s1_cells(args.init_channels, args.layers, math.prod(train.image_size), candidates, candidates)
    needs = memory.supernet("s1", cells, args)
    memory.check_search(needs, args, [train_loader, valid_loader], device, 2 * len(candidates))
    torch.manual_seed(seeds.derive(args.seed, seed_roles.WEIGHTS, args.seed_scheme))
    network = Network(args.init_channels, len(train.classes), args.layers)
    network = network.to(device, memory_format=devices.memory_format(device))
    inputs = {"data": describe(train=train, valid=valid)}
    setup = SearchSetup(args, S1(), network, train_loader, valid_loader)
    search_cli.run_search(search, setup, parser.prog, inputs)


if __name__ == "__main__":
    main()
