"""Code that the searches of both search spaces share.

It contains the flags, the loaders, the set-up of a run, and the last steps of a finished search.
"""

from support.cli import Parser, file_name, number

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import baselines
import datasets
import individuals
import loaders
import populations
import remembered
import seed_roles
import shared_flags
import utils
from augment import Augmentation
from costs import COSTS
from evolution import VARIANTS
from reporting import report
from run_settings import SETTINGS
from search_space import SearchSetup, SearchSpace
from shared_flags import MOST
from splits import Images, counts_text
from support import devices, distributed, resume_args, runs, seeds, self_check
from support.files import UserError

# The smallest budget that the flags accept: one parameter, one mult-add or one nanosecond. A much
# smaller (denormal) budget could make the violation infinite.
SMALLEST_BUDGET = 1e-6


# ---- flags


def search_parser(prog: str, description: str, **defaults: object) -> Parser:
    """Make a parser with the flags that both search spaces have, in groups. The defaults are the paper's.

    `defaults` has the defaults that are different in one search space.
    """
    parser = Parser(prog=prog, description=description)
    add_data_flags(parser.add_argument_group("data"), prog)
    add_evolution_flags(parser.add_argument_group("genetic algorithm"))
    add_training_flags(parser.add_argument_group("training of the shared weights"))
    add_run_flags(parser.add_argument_group("run"))
    parser.set_defaults(**defaults)
    return parser


def add_data_flags(group: argparse._ArgumentGroup, prog: str) -> None:
    """Add the flags that say which images the search `prog` uses."""
    datasets.add_data_arguments(group, prog, folder="../data")
    shared_flags.add_training_image_arguments(group)
    text = "measure fitness on this many validation images, drawn from each class in proportion (default: all)"
    group.add_argument("--valid_samples", type=number(int, 1), metavar="N", help=text)
    text = "transform of the validation images: train augments them at random as in training, test does not"
    group.add_argument("--valid_transform", choices=["train", "test"], default="train", help=text)


def add_evolution_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the genetic algorithm, of fitness and of the comparison at the end."""
    shared_flags.add_genetic_algorithm(group)
    text = "variant of the paper's ablation study; evnas is the full method (see docs/method.md)"
    group.add_argument("--variant", choices=VARIANTS, default="evnas", help=text)
    for cost in COSTS:
        group.add_argument(f"--{cost.flag}", type=number(float, SMALLEST_BUDGET), metavar="BUDGET", help=cost.help)
    text = "number of random architectures that the winner is compared with, on the final weights; 0 for none"
    group.add_argument("--baselines", type=number(int, 0, MOST.individuals), default=50, metavar="N", help=text)
    text = "BatchNorm statistics while fitness is measured: of the validation batch, or the running ones of training"
    group.add_argument("--bn", choices=["batch", "running"], default="batch", help=text)


def add_training_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the training of the shared weights."""
    text = "images in a training batch, for all processes together"
    group.add_argument("--batch_size", type=number(int, 1), default=64, metavar="N", help=text)
    text = "images in a validation batch; smaller batches need less memory, but change fitness with --bn batch"
    group.add_argument("--valid_batch_size", type=number(int, 1), default=1024, metavar="N", help=text)
    text = "learning rate of the first generation"
    group.add_argument("--learning_rate", type=number(float, 0), default=0.025, metavar="LR", help=text)
    text = "learning rate at which the cosine schedule ends"
    group.add_argument("--learning_rate_min", type=number(float, 0), default=0.001, metavar="LR", help=text)
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, metavar="M", help="momentum of SGD")
    text = "weight decay of SGD, on every parameter"
    group.add_argument("--weight_decay", type=number(float, 0), default=3e-4, metavar="WD", help=text)
    text = "largest norm of the gradient; larger gradients are scaled down to it"
    group.add_argument("--grad_clip", type=number(float, above=0), default=5.0, metavar="NORM", help=text)
    shared_flags.add_init_channels(group, "channels of the supernet's first cells", low=1, default=16)


def add_run_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a run directory, seeds, device and speed."""
    group.add_argument("--dir", default=".", help="folder in which the run directory is made")
    text = "begin with the weights and the last population of this search, for instance to search on with other flags"
    group.add_argument("--init_from", metavar="RUN_DIR", help=text)
    text = "name of the run directory (default: search-TIME)"
    group.add_argument("--run_name", type=file_name, metavar="NAME", help=text)
    shared_flags.add_run_arguments(group, seed=18, report_freq=50)
    text = "compute with the readable reference network: slower, with the same results up to rounding"
    group.add_argument("--plain", action="store_true", help=text)
    text = "on a GPU with --amp, measure fitness with Triton kernels if they compute the right values there"
    group.add_argument("--triton", action=argparse.BooleanOptionalAction, default=True, help=text)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse a command line. With --resume or --init_from, the settings of that search are the defaults.

    Raises UserError for settings that contradict each other or that search.
    """
    args = resume_args.parse(parser, remembered.with_settings_of_search(parser, argv), SETTINGS)
    check_search(args)
    return args


def check_search(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other."""
    shared_flags.check_genetic_algorithm(args)
    if args.plain and (args.compile or args.checkpoint):
        raise UserError("--plain computes with the reference network: leave --compile and --checkpoint out")
    if args.batch_size < distributed.world_size():
        raise UserError(
            f"--batch_size {args.batch_size} is too small for {distributed.world_size()} processes: "
            "each needs at least one image"
        )


# ---- set-up


def search_loaders(
    args: argparse.Namespace,
    train: Images,
    valid: Images,
    augmentation: Augmentation,
    device: torch.device,
) -> tuple[loaders.Loader, loaders.Loader]:
    """Return the training and the validation loader.

    Each has a random number generator of its own. Raises UserError for a split that is empty or too
    small for its batches.
    """
    loaders.check_batch(args.batch_size, train)
    if not len(valid):
        raise UserError("the validation split is empty: use more images, or a smaller share of them for training")
    if args.bn == "batch":
        loaders.check_statistics("--valid_batch_size", min(args.valid_batch_size, len(valid)), valid)
    cutout = args.cutout and args.cutout_length
    train_loader = loaders.make_loader(
        train,
        args.batch_size,
        augmentation,
        device,
        generator=seeds.generator(args, seed_roles.TRAINING_IMAGES),
        cutout=cutout,
        augment=True,
    )
    valid_loader = loaders.make_loader(
        valid,
        args.valid_batch_size,
        augmentation,
        device,
        generator=seeds.generator(args, seed_roles.VALIDATION_IMAGES),
        cutout=cutout,
        augment=args.valid_transform == "train",
        shared=False,  # processes divide the individuals, so each process needs every validation image
    )
    return train_loader, valid_loader


def check_training_step(setup: SearchSetup) -> str:
    """Check the kernels of a training step, and return a line for the log.

    support/self_check.py explains the check. Raises UserError if a kernel is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    alphas = setup.space.encoding.random_alphas(1, generator=generator)[0]  # (G, E, O)
    alphas = alphas.to(setup.device)

    def loss(network: nn.Module, x: torch.Tensor, y: torch.Tensor, compile: bool) -> torch.Tensor:
        return F.cross_entropy(setup.forward(compile=compile)(network, x, alphas), y)

    loader = setup.train_loader
    images = loader.full_batch
    classes = setup.network.classifier.out_features
    return self_check.self_check(setup.network, loss, images, loader.image_shape, classes, setup.args)


def is_finished(args: argparse.Namespace, space: type[SearchSpace]) -> bool:
    """Return whether --resume names a finished search, and print a line if it does.

    Raises UserError for a run that cannot be read.
    """
    files = [
        *space.files_at_the_end(args),
        "weights/weights.pt",
        "weights/weights.json",
        f"population/{args.epochs:03d}.npz",
    ]
    finished = runs.is_finished(
        args,
        SETTINGS,
        completed=args.epochs,
        files=[*files, *space.genotype_files, individuals.NAME, *baselines.FILES],
        last_file="report.html",
    )
    if finished:
        distributed.say(f"{args.resume} is finished")
    return finished


def begin_from(setup: SearchSetup, run_dir: str) -> None:
    """Give a new search the weights and the last population of the search in `run_dir`.

    Raises UserError if they do not fit this search.
    """
    last = populations.last_file(run_dir)
    shape = (setup.args.pop_size, *setup.space.encoding.random_alphas(1).shape[1:])
    alphas = torch.from_numpy(populations.load(last).alphas)
    if alphas.shape != shape:
        raise UserError(
            f"{last}: the population is {tuple(alphas.shape)}, but this search needs {shape}. Use the space and the "
            "--pop_size of that search"
        )
    if not ((alphas >= 0) & (alphas < 1)).all():
        raise UserError(f"{last}: not a saved population, because values are outside [0, 1)")
    shared_flags.begin_with_weights(setup.network, Path(run_dir) / "weights" / "weights.pt")
    setup.first_population = alphas
    distributed.say(f"begins with the population {last}")


def run_search(search: Callable, setup: SearchSetup, prog: str, inputs: dict) -> None:
    """Open the run directory, call search(setup, run), and write the files of a finished search.

    `prog` is the script or module of the command line. `inputs` holds everything that must be the
    same when the run is resumed, such as its data. Raises UserError.
    """
    setup.costs.check()
    if setup.args.init_from and not setup.args.resume:
        begin_from(setup, setup.args.init_from)
    checked = None
    if self_check.is_needed(setup.args, setup.device):  # before the run directory is made
        checked = check_training_step(setup)
    with open_run(setup, prog, {"kind": "search", "space": setup.space.view.name, **inputs}) as run:
        run.log(f"{devices.device_text(setup.device)}; run directory {run.path}")
        run.log(counts_text(inputs["data"]))
        if checked:
            run.log(checked)
        state = search(setup, run)
        best = setup.space.cell(state.alphas[0])
        run.log(f"best fitness {state.fitness[0]:.2f} %, with the cell")
        for line in utils.cell_lines(best):
            run.log(line)
        if state.violation[0] > 0:
            run.log("no individual of the last generation meets the budget: the best one exceeds it the least")
        if not baselines.are_there(run):
            # All runs measure the final weights on the same images, so that their results can be
            # compared.
            setup.valid_loader.generator = baselines.generator(setup.args, seed_roles.FINAL_VALIDATION_IMAGES)
            measure = functools.partial(setup.measure, where="the final weights")
            with run.saving_when_interrupted(state.state_dict):
                baselines.conclude(setup, state, measure, run)
        with run.saving_when_interrupted(state.state_dict):
            setup.space.finish(setup, run)
        report.finish_run(run, best, setup.space.view)


def open_run(setup: SearchSetup, prog: str, inputs: dict) -> runs.Run:
    """Make the run directory, or open the one that --resume names. Raises UserError."""
    args = setup.args
    if args.resume:
        return runs.Run.resume(args.resume, args, SETTINGS, inputs=inputs)
    name = args.run_name or f"search-{time.strftime('%Y%m%d-%H%M%S')}"
    return runs.Run.create(args.dir, name, args, prog, SETTINGS, inputs=inputs, new_name=not args.run_name)
