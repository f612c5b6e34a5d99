"""The description of a search space, and `SearchSetup`, which holds everything that a search works with.

`train_search.S1` describes the DARTS space and `nas201.train_search.S2` describes NAS-Bench-201. To
add a search space, write another subclass of `SearchSpace`.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from costs import Costs
from fitness import PlainEvaluator, measure_fitness
from genotypes import Cell
from recipes import Recipe
from reporting.views import SpaceView
from support.clock import Clock
from support.runs import Run
from training import plain_forward


class Remarks(NamedTuple):
    """What a search space adds to the description of a population or of a result, such as true accuracies."""

    fields: dict  # for the history, or for baselines.json
    text: str  # continues a line of the log, so it begins with "; " unless it is empty


class Group(NamedTuple):
    """Individuals that are measured together with the final weights."""

    alphas: torch.Tensor  # (N, G, E, O) raw
    fitness: torch.Tensor  # (N,) percent
    parameters: torch.Tensor  # (N,) parameters of the retrained networks, in millions


class SearchSpace:
    """Everything that a search needs to know about its search space. Each subclass describes one search space."""

    view: SpaceView  # the name of the search space, and how drawings and reports show its cells
    encoding: ModuleType  # has random_alphas(P, generator) and decode(alphas)
    fast: ModuleType  # has forward(network, x, alphas) and Evaluator(network, statistics), see fast_search.py
    genotype_files: tuple[str, ...]  # the files of a run that hold the best cell
    recipe: Recipe  # with which `train.py` retrains the best cell
    nesterov = False  # whether the shared weights train with Nesterov momentum

    def cell(self, alphas: torch.Tensor) -> Cell:
        """Return the discrete cell of one raw individual (G, E, O)."""
        raise NotImplementedError

    def network(self, args: argparse.Namespace, cell: Cell, classes: int) -> nn.Module:
        """Return the network that would be retrained with this cell."""
        raise NotImplementedError

    def cost_table(
        self, args: argparse.Namespace, classes: int, image_shape: tuple[int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cost table of the networks that `network` makes, in the form of `costs.s1_table`."""
        raise NotImplementedError

    def retraining_flags(self, args: argparse.Namespace, image_shape: tuple[int, int, int]) -> list:
        """Return the flags with which `train.py` retrains as in the paper.

        The flags that name the cell and the data are not included.
        """
        return []

    def accuracy_names(self) -> list[str]:
        """Return the names of what `true_accuracies` returns."""
        return []

    def true_accuracies(self, cell: Cell) -> list[float | None]:
        """Return what a benchmark knows of a cell, in percent, None where it has no figure."""
        return []

    def remarks_on_population(self, alphas: torch.Tensor, fitness: torch.Tensor) -> Remarks:
        """Return the remarks on a population `alphas` (P, G, E, O), best first, with its fitness (P,)."""
        return Remarks({}, "")

    def remarks_on_result(self, groups: dict[str, Group]) -> Remarks:
        """Return the remarks on the result. `groups` are the last population and random architectures."""
        return Remarks({}, "")

    @classmethod
    def files_at_the_end(cls, args: argparse.Namespace) -> list[str]:
        """Return the names of the files that `finish` writes."""
        return []

    def finish(self, setup: "SearchSetup", run: Run) -> None:
        """Do what is left after a search has written its results. Raises Interrupted after a signal."""


@dataclass
class SearchSetup:
    """Everything that a search works with."""

    args: argparse.Namespace
    space: SearchSpace
    network: nn.Module  # the supernet
    train_loader: Any
    valid_loader: Any
    clock: Clock | None = None  # estimates the time left; `search_clock` makes it
    first_population: torch.Tensor | None = None  # (P, G, E, O) raw; random if there is none
    costs: Costs = field(init=False)

    def __post_init__(self) -> None:
        classes = self.network.classifier.out_features
        self.costs = Costs(self.args, self.space, classes, self.valid_loader.image_shape, self.device)

    @property
    def device(self) -> torch.device:
        """The device of the supernet."""
        return next(self.network.parameters()).device

    def forward(self, *, compile: bool) -> Callable:
        """Return the function forward(network, x, alphas) that computes the supernet in training.

        With --plain it is the reference, otherwise the fast path of the search space.
        """
        if self.args.plain:
            return plain_forward
        return functools.partial(self.space.fast.forward, compile=compile, checkpoint=self.args.checkpoint)

    def measure(self, alphas: torch.Tensor, where: str) -> torch.Tensor:
        """Return the fitness (P,) of `alphas` (P, G, E, O), see `measure_fitness`."""
        args = self.args
        make_evaluator = PlainEvaluator
        if not args.plain:
            make_evaluator = functools.partial(self.space.fast.Evaluator, compile=args.compile, triton=args.triton)
        settings = {"amp": args.amp, "cuda_graph": args.cuda_graph, "where": where, "clock": self.clock}
        return measure_fitness(self.network, alphas, self.valid_loader, args.bn, make_evaluator, **settings)
