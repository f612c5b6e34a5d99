"""Retrain a cell from scratch: the paper's recipe for CIFAR-10, CIFAR-100, ImageNet, own image folders and the digits.

One process, or several on one or more machines: torchrun --nproc_per_node=N train.py ...
"""

from support.cli import MOST, Parser, Published, command, file_name, number  # first: it ends Ctrl-C in one line

# isort: split

import argparse
import functools
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import baselines
import datasets
import genotype_files
import image_folder
import loaders
import memory
import nas201.report  # noqa: F401, registers arch strings with the drawings and the report
import shared_flags
import splits
import utils
from engine import TrainingState, evaluate, train_one_epoch
from nas201.genotypes import PRIMITIVES, from_arch_string
from recipes import CIFAR, IMAGENET, NAS201, RECIPES
from reporting import report
from retrained import ARCH, choose_augmentation, choose_genotype, choose_recipe, make_network
from support import devices, distributed, runs, seeds, self_check
from support.files import UserError


def make_parser():
    def default(name):
        values = (getattr(recipe, name) for recipe in (CIFAR, IMAGENET, NAS201))
        return "(default: {}; imagenet: {}; arch strings: {})".format(*values)

    parser = Parser(prog="train.py", description=__doc__)
    group = parser.add_argument_group("cell: one of")
    group.add_argument("--arch", help=ARCH)
    group.add_argument("--genotype", help="a genotype.json or genotype.pickle")
    text = "a run directory with one of these, which goes before --arch; the new run is made in it"
    group.add_argument("--dir", help=text)
    text = "retrain the N-th architecture of the front in DIR/pareto.json, the fittest first, instead of the winner"
    group.add_argument("--pick", type=number(int, 1), metavar="N", help=text)
    group = parser.add_argument_group("data")
    datasets.add_data_arguments(group, parser.prog)
    group.add_argument("--tmp_data_dir", action=Published, instead="--data {}/imagenet")
    shared_flags.add_training_image_arguments(group)
    shared_flags.add_workers(group)
    group = parser.add_argument_group("network")
    small = f"cifar for images of at most {image_folder.SMALL} pixels"
    text = f"the family of networks (default: {small}, nas201 for arch strings)"
    group.add_argument("--recipe", choices=RECIPES, help=text)
    text = f"channels of the first cells; more make a larger, slower network {default('init_channels')}"
    shared_flags.add_init_channels(group, text, low=2)
    group.add_argument("--layers", type=number(int, 1, MOST.cells), help=f"cells {default('layers')}, in each stage")
    group.add_argument("--auxiliary", action="store_true", help="train with the auxiliary head")
    group.add_argument("--auxiliary_weight", type=number(float, 0), default=0.4, help="of its loss")
    group.add_argument("--drop_path_prob", type=number(float, 0, 0.99), help=f"at the end {default('drop_path_prob')}")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=number(int, 1, MOST.epochs), help=default("epochs"))
    group.add_argument("--batch_size", type=number(int, 1), help=f"of all processes together {default('batch_size')}")
    group.add_argument("--learning_rate", type=number(float, 0), help=default("learning_rate"))
    group.add_argument("--lr_scheduler", choices=["cosine", "linear"], help=default("lr_scheduler"))
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD")
    text = f"momentum {default('nesterov')}"
    group.add_argument("--nesterov", action=argparse.BooleanOptionalAction, help=text)
    group.add_argument("--weight_decay", type=number(float, 0), help=default("weight_decay"))
    group.add_argument("--grad_clip", type=number(float, above=0), help=f"largest gradient norm {default('grad_clip')}")
    group.add_argument("--label_smooth", type=number(float, 0, 1), help=default("label_smooth"))
    group = parser.add_argument_group("run")
    group.add_argument("--save", type=file_name, default="EXP", help="the run directory is called eval-SAVE-TIME")
    group.add_argument("--note", action=Published, instead="--save {}")
    group.add_argument("--pop_num", "--model_path", "--ga", action=Published)
    text = "train on all GPUs, in a process for each: start them with torchrun"
    group.add_argument("--parallel", action="store_true", default=argparse.SUPPRESS, help=text)
    notes = dict(seed_note=default("seed"), report_note=default("report_freq"))
    shared_flags.add_run_arguments(group, seed=None, report_freq=None, **notes)
    return parser


def learning_rate(args, epoch, warmup):
    """Return the learning rate of `epoch` (from 0): cosine to 0, or linear in two slopes; warm-up multiplies it."""
    lr, E, e = args.learning_rate, args.epochs, epoch
    if args.lr_scheduler == "cosine":
        lr *= (1 + math.cos(math.pi * e / E)) / 2
    elif E - e > 5:
        lr *= (E - 5 - e) / (E - 5)
    else:
        lr *= (E - e) / (5 * max(E - 5, 1))
    return lr * (e + 1) / 5 if warmup and e < 5 else lr


def load_splits(args, genotype):
    """Read (train, test), and fill in the defaults that depend on the data. Raises UserError.

    Returns them with their Augmentation.
    """
    if args.recipe and (args.recipe == "nas201") != isinstance(genotype, str):
        raise UserError(
            f"--recipe {args.recipe} is not for this cell: nas201 is for arch strings, and for nothing else"
        )
    args.data = datasets.find_folder(args.dataset, args.data)
    recipe = "nas201" if isinstance(genotype, str) else args.recipe
    if datasets.stays_on_disk(args.dataset, args.image_size, recipe):
        read = functools.partial(datasets.list_files, image_size=args.image_size)
    else:
        read = functools.partial(datasets.load_images, image_size=args.image_size, cache=args.image_cache)
    train = read(args.dataset, args.data, "train")
    test = read(args.dataset, args.data, "test")
    large = isinstance(train, splits.Files)
    args.recipe = args.recipe or choose_recipe(genotype, train)
    if args.recipe != "imagenet":
        image_folder.check_in_memory(train)
    of_train = splits.describe(train=train)
    of_test = splits.describe(test=test)
    splits.check_alike("the training images", of_train, f"the test images of {args.data}", of_test)
    for name, value in vars(RECIPES[args.recipe]).items():
        if name != "name" and getattr(args, name) is None:
            setattr(args, name, value)
    augment = choose_augmentation(genotype, args.dataset, train)
    train = splits.subsample(train, args.train_samples, seeds.generator(args, "split"))
    loaders.check_batch(args.batch_size, train, args.auxiliary and not large)
    if args.cutout and large:
        raise UserError("--cutout is for small images in memory; the ImageNet recipe has none")
    if args.drop_path_prob and args.recipe == "nas201":
        raise UserError("--drop_path_prob is not for arch strings: the benchmark's networks have no drop path")
    return train, test, augment


def estimate_memory(genotype, image_size, args):
    """Return the memory.Estimate of the network that `make_network` makes, without making it."""
    pixels = math.prod(image_size)
    if args.recipe == "nas201":
        operations = tuple(PRIMITIVES[index] for index in from_arch_string(genotype))
        return memory.estimate("s2", memory.s2_cells(args.init_channels, args.layers, pixels, operations), args)
    pixels //= 64 if args.recipe == "imagenet" else 1  # behind the stem
    normal, reduce = (tuple(name for name, _ in pairs) for pairs in (genotype.normal, genotype.reduce))
    return memory.estimate("s1", memory.s1_cells(args.init_channels, args.layers, pixels, normal, reduce), args)


class RetrainingState(TrainingState):
    saved = ("best_top1",)
    best_top1 = 0.0  # percent, on the test images


def retrain(args, network, train_loader, test_loader, warmup, about, run):
    """Train `network` for args.epochs epochs, testing after each; `about` is saved beside the weights."""
    device = next(network.parameters()).device
    optimizer = utils.make_sgd(network.parameters(), args, device, args.nesterov)
    state = RetrainingState(network, optimizer, train_loader)
    run.restore(state)
    if run.completed and state.partial is None:  # within an epoch the weights have gone on from those that were saved
        save_weights(run, network, about)
    trained = network
    if distributed.world_size() > 1:
        # Each process keeps running statistics of its own; at the end of an epoch their mean is taken.
        own = [device] if device.type == "cuda" else None
        dead_ends = about["family"] == "nas201"  # an edge may lead to a node from which only `none` goes on
        trained = DistributedDataParallel(network, device_ids=own, find_unused_parameters=dead_ends)
        trained.broadcast_buffers = False  # as an argument it is deprecated in torch 2.14
    for epoch in range(run.completed, args.epochs):
        state.begin_epoch()
        where = f"epoch {epoch + 1}/{args.epochs}"
        lr = optimizer.param_groups[0]["lr"] = learning_rate(args, epoch, warmup)
        network.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        entry = {"epoch": epoch + 1, "lr": lr}
        with run.saving_when_interrupted(state.unfinished_state_dict):
            entry |= train_epoch(args, trained, epoch, train_loader, state, where=where, log=run.log)
            tested = evaluate(network, test_loader, args, log=run.log, where=f"{where}, test")
        state.best_top1 = max(state.best_top1, tested["top1"])
        entry |= {f"test_{name}": value for name, value in tested.items()}
        entry |= {"best_top1": state.best_top1}
        entry |= utils.cost(train_loader.size + test_loader.size, state.progress.start, device)
        run.record(epoch + 1, entry)
        run.save_checkpoint(epoch + 1, state.state_dict())
        save_weights(run, network, about)
        run.log(
            f"{where}: loss {entry['train_loss']:.4f}, train top-1 {entry['train_top1']:.2f} %, "
            f"test top-1 {tested['top1']:.2f} % (best {state.best_top1:.2f} %), {entry['seconds']:.1f} s"
        )


def save_weights(run, network, about):
    """Save the weights of the last epoch, and as the best ones where it was the first with this test accuracy."""
    if run.writes:
        tested = [row.get("test_top1") or 0.0 for row in run.rows]  # in percent
        about = about | {"epoch": len(tested), "test_top1": tested[-1]}
        is_best = tested.index(max(tested)) == len(tested) - 1
        for name in (*(["best_weights.pt"] if is_best else []), "weights.pt"):
            run.save_weights(network, name, about)


def training_loss(args, network, x, y, compile: bool):
    """Return the loss on images x (B, 3, H, W) of classes y (B,), the auxiliary head's included, and the logits."""
    logits, logits_aux = network(x, compile=compile, checkpoint=args.checkpoint)
    loss = F.cross_entropy(logits, y, label_smoothing=args.label_smooth)
    if logits_aux is not None:
        loss = loss + args.auxiliary_weight * F.cross_entropy(logits_aux, y, label_smoothing=args.label_smooth)
    return loss, logits


def check_training_step(args, network, loader) -> str:
    """Check the kernels of a training step, see support/self_check.py; return a line for the log."""

    def loss(network, x, y, compile):
        return training_loss(args, network, x, y, compile)[0]

    images = loader.full_batch
    classes = network.classifier.out_features
    return self_check.self_check(network, loss, images, loader.image_shape, classes, args)


def train_epoch(args, network, epoch, loader, state, *, where, log):
    """Train `network` (under torchrun wrapped in DistributedDataParallel) on every batch of `loader` once."""

    full_batch = loader.full_batch
    first_seed = seeds.derive(args.seed, "drop path", args.seed_scheme)

    def inputs_of(step):
        # Drop path draws from the device's global generator: seeded here, a resumed run draws the same.
        number = (epoch * len(loader) + step) * distributed.world_size() + distributed.rank()
        torch.manual_seed((first_seed + number) % 2**63)
        return ()

    def loss_of(x, y):
        # The last batch is smaller, and not worth graphs of its own.
        return training_loss(args, network, x, y, compile=args.compile and len(x) == full_batch)

    network.train()
    state_of = (state.optimizer, args, state.progress)
    return train_one_epoch(loss_of, inputs_of, network, loader, *state_of, where=where, log=log)


def check_parallel(device):
    """Stop if there are more GPUs than this one process uses; say how to start several. Raises UserError."""
    if "RANK" in os.environ:  # torchrun started this process
        return
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count > 1:
        raise UserError(
            f"--parallel: one process uses one of the {count} GPUs. Start a process for each with "
            f"torchrun --nproc_per_node={count} train.py ..., or leave --parallel out"
        )
    distributed.say(
        "note: --parallel changes nothing with one device; for N processes start torchrun --nproc_per_node=N train.py",
        file=sys.stderr,
    )


@command
def main(argv=None):
    args = runs.parse(make_parser(), argv)
    # A run has its own copy of the cell: the search that it came from may have gone on since.
    if args.resume:
        with runs.required_file():
            source = Path(args.resume) / "genotype.json"
            genotype = genotype_files.load(source)
    elif args.pick:
        if not args.dir or args.genotype:
            raise UserError("--pick needs --dir RUN_DIR, a search, and no --genotype")
        genotype, source = baselines.pick(args.dir, args.pick)
    else:
        genotype, source = choose_genotype(args, dir_first=True)
    device = devices.choose_device(args)
    if vars(args).pop("parallel", False):
        check_parallel(device)
    runs.check_arguments_alike(args)
    train, test, augmentation = load_splits(args, genotype)
    large = isinstance(train, splits.Files)
    warmup = large and args.batch_size > 256

    generator = seeds.generator(args, "training images")
    settings = dict(generator=generator, augment=True, cutout=args.cutout and args.cutout_length, workers=args.workers)
    train_loader = loaders.make_loader(train, args.batch_size, augmentation, device, **settings)
    test_loader = loaders.make_loader(test, args.batch_size, augmentation, device, workers=args.workers)
    needs = estimate_memory(genotype, train.image_size, args)
    memory.check_training(needs, args, (train_loader, test_loader), device)
    torch.manual_seed(seeds.derive(args.seed, "weights", args.seed_scheme))
    network = make_network(genotype, args.recipe, len(train.classes), train.image_size, args)
    network = network.to(device, memory_format=devices.memory_format(device))

    about = {  # what a test must know of the weights, saved beside them
        "family": args.recipe,
        "genotype": genotype_files.to_json(genotype),
        "dataset": args.dataset,
        "classes": train.classes,
        "image_size": train.image_size,
        "resized": large or args.image_size is not None,
        "mean": augmentation.mean,
        "std": augmentation.std,
        **{name: getattr(args, name) for name in ("init_channels", "layers", "auxiliary")},
    }
    bound = {"kind": "eval", "cell": about["genotype"], "data": splits.describe(train=train, test=test)}
    checked = None
    if self_check.is_needed(args, device):  # before there is a run directory
        checked = check_training_step(args, network, train_loader)
    if args.resume:
        run = runs.Run.resume(args.resume, args, **bound)
    else:
        name = f"eval-{args.save}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = runs.Run.create(args.dir or ".", name, args, "train.py", **bound)
    with run:
        if run.writes and not run.state:
            genotype_files.save(genotype, run.path / "genotype.json")
        run.log(f"{devices.describe_device(device)}; run directory {run.path}")
        run.log(f"the cell of {source}: {genotype}")
        parameters = utils.parameters_in_millions(network)
        run.log(f"parameters {parameters:.2f} M, {splits.counts_text(bound['data'])}")
        if checked:
            run.log(checked)
        retrain(args, network, train_loader, test_loader, warmup, about, run)
        report.finish(run, genotype)


if __name__ == "__main__":
    main()
