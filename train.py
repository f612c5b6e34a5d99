"""Retrain a cell from scratch, with the paper's recipe or NAS-Bench-201's, and test it after each epoch.

The images can be CIFAR-10, CIFAR-100, ImageNet, ImageNet16-120, your own image folder or
scikit-learn's digits.

  python train.py --arch EvNASA --auxiliary --cutout --dir runs             the paper's first cell on CIFAR-10
  python train.py --dir runs/search-20260101-120000 --auxiliary --cutout    the cell of a search
  torchrun --nproc_per_node=4 train.py --arch EvNASA --dir runs ...         on four GPUs
"""

from support.cli import Parser, Published, command, file_name, number

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import baselines
import class_results
import datasets
import genotype_files
import image_folder
import loaders
import memory
import remembered
import retrained
import seed_roles
import shared_flags
import utils
from augment import Augmentation
from genotypes import Cell
from nas201.genotypes import PRIMITIVES, from_arch_string
from recipes import CIFAR, IMAGENET, NAS201, RECIPES
from reporting import report
from reporting.views import view_of
from retrained import CellChoice, Loader, NetworkSettings
from run_settings import SETTINGS
from shared_flags import MOST
from splits import Files, Split, check_alike, counts_text, describe, subsample
from support import agreement, devices, distributed, resume_args, runs, seeds, self_check
from support.clock import Clock, Work, duration
from support.files import UserError
from training import (
    FORWARD,
    TrainingSettings,
    TrainingState,
    evaluate,
    make_optimizer,
    set_learning_rate,
    train_one_epoch,
)
from views import VIEWS

# Numbers of epochs: the linear schedule falls slowly in its last 5, and warm-up takes the first 5.
TAIL = WARMUP = 5
LARGE_BATCH = 256  # images; the published ImageNet script warms up if the batch is larger


# ---- command line


def make_parser() -> Parser:
    """Return the parser. Defaults that depend on the recipe are None; `load_splits` fills them in later."""

    def default(name: str) -> str:
        small, imagenet, nas201 = [getattr(recipe, name) for recipe in (CIFAR, IMAGENET, NAS201)]
        return f"(default: {small}; recipe imagenet: {imagenet}; recipe nas201: {nas201})"

    parser = Parser(prog="train.py", description=__doc__)
    add_cell_arguments(parser.add_argument_group("cell to retrain"))

    group = parser.add_argument_group("images")
    datasets.add_data_arguments(group, parser.prog)
    group.add_argument("--tmp_data_dir", action=Published, instead="--data {}/imagenet")
    shared_flags.add_training_image_arguments(group)
    shared_flags.add_workers(group)

    group = parser.add_argument_group("network")
    text = (
        f"network and defaults: cifar for images of up to {image_folder.SMALL} pixels a side, imagenet for larger "
        "ones, nas201 for arch strings (default: the one that fits the cell and the images)"
    )
    group.add_argument("--recipe", choices=RECIPES, help=text)
    text = f"channels of the first cells; more make a larger and slower network {default('init_channels')}"
    shared_flags.add_init_channels(group, text, low=2)
    text = f"cells of the network; for arch strings, cells in each of its three stages {default('layers')}"
    group.add_argument("--layers", type=number(int, 1, MOST.cells), metavar="N", help=text)
    text = "train with the auxiliary head, as the paper does; needs 32x32 pixels (224x224 for the recipe imagenet)"
    group.add_argument("--auxiliary", action="store_true", help=text)
    text = "weight of the auxiliary head's loss"
    group.add_argument("--auxiliary_weight", type=number(float, 0), default=0.4, metavar="WEIGHT", help=text)
    text = f"drop path probability, which grows linearly from 0 to this value {default('drop_path_prob')}"
    group.add_argument("--drop_path_prob", type=number(float, 0, 0.99), metavar="P", help=text)

    group = parser.add_argument_group("training")
    text = f"epochs to train; for a quick trial take 1 {default('epochs')}"
    group.add_argument("--epochs", type=number(int, 1, MOST.epochs), metavar="N", help=text)
    text = f"images in a training batch, over all processes; lower it if memory runs out {default('batch_size')}"
    group.add_argument("--batch_size", type=number(int, 1), metavar="N", help=text)
    text = f"learning rate at the beginning; lower it if the loss is not finite {default('learning_rate')}"
    group.add_argument("--learning_rate", type=number(float, 0), metavar="LR", help=text)
    text = f"how the learning rate falls to 0 over the epochs {default('lr_scheduler')}"
    group.add_argument("--lr_scheduler", choices=["cosine", "linear"], help=text)
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, metavar="M", help="momentum of SGD")
    text = f"use Nesterov momentum {default('nesterov')}"
    group.add_argument("--nesterov", action=argparse.BooleanOptionalAction, help=text)
    text = f"weight decay of SGD, on every parameter {default('weight_decay')}"
    group.add_argument("--weight_decay", type=number(float, 0), metavar="DECAY", help=text)
    text = f"clip gradients to this norm {default('grad_clip')}"
    group.add_argument("--grad_clip", type=number(float, above=0), metavar="NORM", help=text)
    text = f"label smoothing of the training loss {default('label_smooth')}"
    group.add_argument("--label_smooth", type=number(float, 0, 1), metavar="EPS", help=text)

    group = parser.add_argument_group("run")
    text = (
        "begin with these weights, such as weights/weights.pt of another retraining of the same cell and size; "
        "a classifier of other classes starts anew"
    )
    group.add_argument("--init_weights", metavar="FILE", help=text)
    text = "name of this retraining: its run directory is eval-NAME-TIME"
    group.add_argument("--save", type=file_name, default="EXP", metavar="NAME", help=text)
    group.add_argument("--note", action=Published, instead="--save {}")
    group.add_argument("--pop_num", "--model_path", "--ga", action=Published)
    text = "require that all GPUs are used: if there are several, stop and show the torchrun command that uses them"
    group.add_argument("--parallel", action="store_true", default=argparse.SUPPRESS, help=text)
    shared_flags.add_run_arguments(
        group, seed=None, seed_note=default("seed"), report_freq=None, report_note=default("report_freq")
    )
    return parser


def add_cell_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags that name a cell."""
    group.add_argument("--arch", metavar="CELL", help=retrained.ARCH)
    group.add_argument("--genotype", metavar="FILE", help=retrained.GENOTYPE)
    text = (
        "directory of a search: retrain the cell of this search, even if --arch is given too, and put the new run "
        "into this directory; its images are the default (default for the new run: the current directory)"
    )
    group.add_argument("--dir", metavar="RUN_DIR", help=text)
    text = "retrain the N-th cell of the Pareto front in RUN_DIR/pareto.json, fittest first, instead of the winner"
    group.add_argument("--pick", type=number(int, 1), metavar="N", help=text)


def cell_to_retrain(args: argparse.Namespace) -> CellChoice:
    """Return the cell that the command line asks for. Raises UserError."""
    if args.resume:
        # We read the run's own copy of the cell, because the search may have continued and found
        # another one.
        with resume_args.required_file():
            source = Path(args.resume) / "genotype.json"
            return CellChoice(genotype_files.load(source), source)
    if args.pick:
        if not args.dir or args.genotype:
            raise UserError("--pick takes a cell from a search: name it with --dir RUN_DIR, and leave --genotype out")
        return CellChoice(*baselines.pick(args.dir, args.pick))
    return retrained.choose_cell(args, dir_first=True)


def check_parallel(device: torch.device) -> None:
    """Raise UserError if there are several GPUs but only one process. The message says how to use all GPUs."""
    if "RANK" in os.environ:  # torchrun has started this process
        return
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count > 1:
        raise UserError(
            f"--parallel: one process uses one of the {count} GPUs. Start a process for each with "
            f"torchrun --nproc_per_node={count} train.py ..., or leave --parallel out"
        )
    distributed.say(
        "note: --parallel has no effect with one device; for N processes use torchrun --nproc_per_node=N train.py",
        file=sys.stderr,
    )


# ---- images


class Splits(NamedTuple):
    """The images of a retraining, and how they are augmented."""

    train: Split
    test: Split
    augmentation: Augmentation


def load_splits(args: argparse.Namespace, cell: Cell) -> Splits:
    """Read the training and test images, and fill in the arguments that depend on cell and images.

    Raises UserError for images that do not fit the arguments.
    """
    if args.recipe and (args.recipe == "nas201") != isinstance(cell, str):
        raise UserError(
            f"--recipe {args.recipe} does not fit this cell: arch strings need nas201, and other cells cannot use it"
        )
    args.data = datasets.find_folder(args.dataset, args.data)
    recipe = "nas201" if isinstance(cell, str) else args.recipe
    if datasets.stays_on_disk(args.dataset, args.image_size, recipe):
        read = functools.partial(datasets.list_files, image_size=args.image_size)
    else:
        read = functools.partial(datasets.load_images, image_size=args.image_size, cache=args.image_cache)
    train = read(args.dataset, args.data, "train")
    test = read(args.dataset, args.data, "test")

    args.recipe = args.recipe or retrained.choose_recipe(cell, train)
    if args.recipe != "imagenet":
        image_folder.check_in_memory(train)
    train_description = describe(train=train)
    test_description = describe(test=test)
    check_alike("the training images", train_description, f"the test images of {args.data}", test_description)
    fill_in_recipe(args)

    augmentation = retrained.choose_augmentation(cell, args.dataset, train)
    train = subsample(train, args.train_samples, seeds.generator(args, seed_roles.SPLIT))
    large = isinstance(train, Files)
    loaders.check_batch(args.batch_size, train, args.auxiliary and not large)
    if args.cutout and large:
        raise UserError("--cutout is not part of the ImageNet recipe, which these images need: leave it out")
    if args.drop_path_prob and args.recipe == "nas201":
        raise UserError("--drop_path_prob is not for arch strings, whose networks have no drop path: leave it out")
    return Splits(train, test, augmentation)


def fill_in_recipe(args: argparse.Namespace) -> None:
    """Set the arguments that were not given to the values of the recipe."""
    for name, value in vars(RECIPES[args.recipe]).items():
        if name != "name" and getattr(args, name) is None:
            setattr(args, name, value)


def make_loaders(args: argparse.Namespace, splits: Splits, device: torch.device) -> tuple[Loader, Loader]:
    """Return the loader of the training images, which augments them, and the loader of the test images."""
    train_loader = loaders.make_loader(
        splits.train,
        args.batch_size,
        splits.augmentation,
        device,
        generator=seeds.generator(args, seed_roles.TRAINING_IMAGES),
        augment=True,
        cutout=args.cutout and args.cutout_length,
        workers=args.workers,
    )
    test_loader = loaders.make_loader(splits.test, args.batch_size, splits.augmentation, device, workers=args.workers)
    return train_loader, test_loader


def estimate_memory(settings: NetworkSettings, args: argparse.Namespace) -> memory.Estimate:
    """Estimate the memory that it takes to train the network, without making the network."""
    cell = settings.cell
    pixels = math.prod(settings.image_size)
    if settings.recipe == "nas201":
        operations = tuple(PRIMITIVES[index] for index in from_arch_string(cell))
        return memory.estimate("s2", memory.s2_cells(settings.init_channels, settings.layers, pixels, operations), args)
    if settings.recipe == "imagenet":
        pixels //= 64  # the stem divides height and width by 8
    normal = tuple(operation for operation, _ in cell.normal)
    reduce = tuple(operation for operation, _ in cell.reduce)
    return memory.estimate("s1", memory.s1_cells(settings.init_channels, settings.layers, pixels, normal, reduce), args)


# ---- training


def learning_rate(args: argparse.Namespace, epoch: int, warmup: bool) -> float:
    """Return the learning rate of `epoch`, counted from 0.

    With lr = args.learning_rate, E = args.epochs and e = epoch:
      cosine: lr (1 + cos(pi e / E)) / 2
      linear: lr (E - 5 - e) / (E - 5) while more than 5 epochs remain, then lr (E - e) / (5 (E - 5))
    With `warmup`, the learning rate of the first 5 epochs is multiplied by (e + 1) / 5.
    """
    remaining = args.epochs - epoch
    if args.lr_scheduler == "cosine":
        factor = (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    elif remaining > TAIL:
        factor = (remaining - TAIL) / (args.epochs - TAIL)
    else:
        factor = remaining / (TAIL * max(args.epochs - TAIL, 1))  # a run of up to 5 epochs consists of the tail
    rate = args.learning_rate * factor
    if warmup and epoch < WARMUP:
        rate = rate * (epoch + 1) / WARMUP
    return rate


class RetrainingState(TrainingState):
    """What a checkpoint of a retraining holds: the training state, and the best test accuracy so far."""

    saved = ("best_top1",)
    best_top1 = 0.0  # percent


def retrain(
    args: argparse.Namespace,
    network: nn.Module,
    train_loader: Loader,
    test_loader: Loader,
    warmup: bool,
    about: dict,
    run: runs.Run,
) -> None:
    """Train `network` for args.epochs epochs, and test it after each one.

    `about` is saved next to the weights. Every epoch writes a checkpoint, a line of the history and
    the weights. The last epoch also writes test.json, and a resumed run makes a lost one again.
    """
    device = next(network.parameters()).device
    optimizer = make_optimizer(network.parameters(), args, nesterov=args.nesterov)
    state = RetrainingState(network, optimizer, train_loader, TrainingSettings.of(args))
    run.restore(state)
    if run.completed and state.partial is None:
        save_weights(run, network, about)  # a crash may have come between the checkpoint and its weights files
    if distributed.world_size() > 1:
        state.trained = parallel(network, about["family"])
    state.clock = retraining_clock(args, run, state, test_loader)
    for epoch in range(run.completed, args.epochs):
        state.begin_epoch()
        where = f"epoch {epoch + 1}/{args.epochs}"
        lr = learning_rate(args, epoch, warmup)
        set_learning_rate(optimizer, lr)
        network.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        entry = {"epoch": epoch + 1, "lr": lr}
        with run.saving_when_interrupted(state.unfinished_state_dict):
            entry |= train_epoch(args, epoch, state, where=where, log=run.log)
            confusion = torch.zeros(len(about["classes"]), len(about["classes"]), dtype=torch.int64)
            more = {"confusion": confusion, "clock": state.clock}
            tested = evaluate(network, test_loader, args, log=run.log, where=f"{where}, test", **more)
        state.best_top1 = max(state.best_top1, tested["top1"])
        entry |= {f"test_{name}": value for name, value in tested.items()}
        entry |= {"best_top1": state.best_top1}
        entry |= utils.speed_and_memory(train_loader.size + test_loader.size, state.progress.start, device)
        run.record(epoch + 1, entry)
        run.save_checkpoint(epoch + 1, state.state_dict())
        save_weights(run, network, about)
        run.log(
            f"{where}: loss {entry['train_loss']:.4f}, train top-1 {entry['train_top1']:.2f} %, "
            f"test top-1 {tested['top1']:.2f} % (best {state.best_top1:.2f} %), {entry['seconds']:.1f} s"
            + (f"; {state.clock.text()}" if state.clock.text() else "")
        )
        if epoch + 1 == args.epochs:
            save_test(args, run, tested, about["classes"], confusion)
    lost = torch.tensor(float(run.writes and not (run.path / class_results.NAME).is_file()))
    if distributed.sum_over_ranks(lost).item():
        confusion = torch.zeros(len(about["classes"]), len(about["classes"]), dtype=torch.int64)
        with run.saving_when_interrupted(state.state_dict):
            tested = evaluate(network, test_loader, args, log=run.log, confusion=confusion)
        save_test(args, run, tested, about["classes"], confusion)


def save_test(
    args: argparse.Namespace, run: runs.Run, tested: dict[str, float], classes: list[str], confusion: Tensor
) -> None:
    """Write test.json, the test of the last epoch."""
    file = run.path / "weights" / "weights.pt"
    class_results.save(run.path, tested, classes, confusion, weights=file, dataset=args.dataset)


def retraining_clock(args: argparse.Namespace, run: runs.Run, state: RetrainingState, test_loader: Loader) -> Clock:
    """Return the clock of a retraining: "training" counts steps, "test" batches."""
    epochs = args.epochs - run.completed
    steps = epochs * len(state.train_loader) - (state.partial.steps if state.partial else 0)

    def tell_duration(seconds: float) -> None:
        run.log(f"{'the rest of ' if args.resume else ''}the retraining will take about {duration(seconds)}")

    return Clock(tell_duration, training=Work(steps), test=Work(epochs * len(test_loader), FORWARD))


def parallel(network: nn.Module, recipe: str) -> DistributedDataParallel:
    """Wrap `network` so that the processes train it together, each on its share of every batch."""
    device = next(network.parameters()).device
    trained = DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        # In an arch string, all edges out of a node can be `none`. The edges into that node get no
        # gradient.
        find_unused_parameters=recipe == "nas201",
    )
    # Each process keeps its own running statistics, and their mean is taken at the end of an epoch.
    # We set broadcast_buffers here, because torch 2.14 deprecates it as an argument of the
    # constructor.
    trained.broadcast_buffers = False
    return trained


def save_weights(run: runs.Run, network: nn.Module, about: dict) -> None:
    """Save the weights of the last epoch, and also as best_weights.pt if its test accuracy is the highest so far."""
    if not run.writes:
        return
    tested = [row.get("test_top1") or 0.0 for row in run.rows]  # percent, of each epoch
    about = about | {"epoch": len(tested), "test_top1": tested[-1]}
    if tested.index(max(tested)) == len(tested) - 1:
        run.save_weights(network, "best_weights.pt", about)
    run.save_weights(network, "weights.pt", about)


def training_loss(
    args: argparse.Namespace, network: nn.Module, x: Tensor, y: Tensor, compile: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the logits (B, classes), of images x (B, 3, H, W) and their classes y (B,).

    If the network has an auxiliary head, the loss includes the head's loss.
    """
    logits, logits_aux = network(x, compile=compile, checkpoint=args.checkpoint)
    loss = F.cross_entropy(logits, y, label_smoothing=args.label_smooth)
    if logits_aux is not None:
        loss = loss + args.auxiliary_weight * F.cross_entropy(logits_aux, y, label_smoothing=args.label_smooth)
    return loss, logits


def train_epoch(
    args: argparse.Namespace, epoch: int, state: RetrainingState, *, where: str, log: Callable[[str], None]
) -> dict:
    """Train `state.trained` for one epoch, or for the rest of it; see `train_one_epoch`."""
    loader = state.train_loader
    full_batch = loader.full_batch
    first_seed = seeds.derive(args.seed, seed_roles.DROP_PATH, args.seed_scheme)

    def inputs_of(step: int) -> tuple[()]:
        # Drop path draws from the device's global generator. We seed this generator anew for each
        # step and process, so that a resumed run draws the same numbers.
        number = (epoch * len(loader) + step) * distributed.world_size() + distributed.rank()
        torch.manual_seed((first_seed + number) % 2**63)
        return ()

    def loss_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # The last batch can be smaller than the others. It is not worth the time to compile graphs
        # for it.
        return training_loss(args, state.trained, x, y, compile=args.compile and len(x) == full_batch)

    state.trained.train()
    return train_one_epoch(state, loss_of, inputs_of, where=where, log=log)


def check_training_step(args: argparse.Namespace, network: nn.Module, loader: Loader) -> str:
    """Check the kernels of a training step, and return a line for the log; see support/self_check.py."""

    def loss(network: nn.Module, x: Tensor, y: Tensor, compile: bool) -> Tensor:
        return training_loss(args, network, x, y, compile)[0]

    images = loader.full_batch
    classes = network.classifier.out_features
    return self_check.self_check(network, loss, images, loader.image_shape, classes, args)


def describe_weights(args: argparse.Namespace, cell: Cell, splits: Splits) -> dict:
    """Return the content of the JSON file next to the weights, which describes the network to test scripts."""
    large = isinstance(splits.train, Files)
    return {
        "family": args.recipe,
        "genotype": genotype_files.to_json(cell),
        "dataset": args.dataset,
        "classes": splits.train.classes,
        "image_size": splits.train.image_size,
        "resized": large or args.image_size is not None,
        "mean": splits.augmentation.mean,
        "std": splits.augmentation.std,
        "init_channels": args.init_channels,
        "layers": args.layers,
        "auxiliary": args.auxiliary,
    }


# ---- the whole command


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = resume_args.parse(parser, remembered.with_flags_of_run(parser, argv), SETTINGS)
    cell, source = cell_to_retrain(args)
    device = devices.choose_device(args)
    if vars(args).pop("parallel", False):
        check_parallel(device)
    agreement.check_arguments_alike(args, SETTINGS)

    splits = load_splits(args, cell)
    train_loader, test_loader = make_loaders(args, splits, device)
    settings = NetworkSettings(
        cell=cell,
        recipe=args.recipe,
        classes=len(splits.train.classes),
        image_size=splits.train.image_size,
        init_channels=args.init_channels,
        layers=args.layers,
        auxiliary=args.auxiliary,
    )
    memory.check_training(estimate_memory(settings, args), args, (train_loader, test_loader), device)
    torch.manual_seed(seeds.derive(args.seed, seed_roles.WEIGHTS, args.seed_scheme))
    network = retrained.make_network(settings)
    if args.init_weights and not args.resume:
        shared_flags.begin_with_weights(network, args.init_weights)
    network = network.to(device, memory_format=devices.memory_format(device))

    about = describe_weights(args, cell, splits)
    description = describe(train=splits.train, test=splits.test)
    inputs = {"kind": "eval", "cell": about["genotype"], "data": description}  # a resumed run must have the same
    checked = None
    if self_check.is_needed(args, device):  # before the run directory is made
        checked = check_training_step(args, network, train_loader)
    if args.resume:
        run = runs.Run.resume(args.resume, args, SETTINGS, inputs=inputs)
    else:
        name = f"eval-{args.save}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = runs.Run.create(args.dir or ".", name, args, "train.py", SETTINGS, inputs=inputs)
    with run:
        if run.writes and not run.state:
            genotype_files.save(cell, run.path / "genotype.json")
        run.log(f"{devices.device_text(device)}; run directory {run.path}")
        run.log(f"cell from {source}:")
        for line in utils.cell_lines(cell):
            run.log(line)
        parameters = utils.parameters_in_millions(network)
        run.log(f"parameters {parameters:.2f} M, {counts_text(description)}")
        if checked:
            run.log(checked)
        warmup = isinstance(splits.train, Files) and args.batch_size > LARGE_BATCH
        retrain(args, network, train_loader, test_loader, warmup, about, run)
        report.finish_run(run, cell, view_of(cell, VIEWS))


if __name__ == "__main__":
    main()
