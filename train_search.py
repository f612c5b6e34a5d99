"""Search for a cell in the DARTS space with EvNAS: a genetic algorithm over the shared weights of one supernet."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

import data
import encoding
import fast_search
import genotypes
import runs
import utils
from engine import measure_fitness, plain_fitness, plain_forward, train_one_epoch, unique
from evolution import VARIANTS, next_generation
from model_search import Network
from safeio import UserError, atomic_write
from utils import Parser, command, number


@dataclass
class SearchSpace:
    """What the loop needs to know of a search space; nas201 has its own."""

    name: str
    random_alphas: Callable  # (P, generator) -> raw (P, G, E, O)
    decode: Callable  # raw (P, G, E, O) -> decoded, same shape
    genotype: Callable  # raw (G, E, O) -> the discrete cell, as JSON has it
    save_genotype: Callable  # (raw (G, E, O), run directory)
    fast: object  # module with forward(network, x, alphas) and fitness(network, bn), see fast_search
    picture: Callable  # raw (G, E, O) -> what visualize draws
    report: Callable = lambda alphas, fitness: ({}, "")  # (sorted population, fitness) -> history fields, log text
    nesterov: bool = False


def save_genotype(alphas, folder):
    for name in ("genotype.json", "genotype.pickle"):
        genotypes.save(encoding.genotype(alphas), folder / name)


S1 = SearchSpace(
    name="s1",
    random_alphas=encoding.random_alphas,
    decode=encoding.decode,
    genotype=lambda alphas: genotypes.to_dict(encoding.genotype(alphas)),
    save_genotype=save_genotype,
    fast=fast_search,
    picture=encoding.genotype,
)


def search(args, space, network, train_loader, valid_loader, run):
    """The search loop of EvNAS (section 3), for any space. Returns the best raw alphas (G, E, O) and their fitness."""
    device = next(network.parameters()).device
    if args.plain:
        forward, fitness_of = plain_forward, plain_fitness
    else:
        forward = functools.partial(space.fast.forward, compile=args.compile)
        fitness_of = functools.partial(space.fast.fitness, compile=args.compile)
    optimizer = utils.make_sgd(network.parameters(), args, device, space.nesterov)
    breeding = torch.Generator().manual_seed(args.seed)
    generators = {"breeding": breeding, "train": train_loader.generator, "valid": valid_loader.generator}
    alphas = space.random_alphas(args.pop_size, generator=breeding)  # (P, G, E, O) raw
    fitness = torch.full((args.pop_size,), math.nan, dtype=torch.float64)  # (P,) percent

    def drawn():
        return {name: generator.get_state() for name, generator in generators.items()}

    def state():
        return {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "alphas": alphas,
            "fitness": fitness,
            "generators": drawn(),
        }

    if run.state:
        with run.restoring():
            network.load_state_dict(run.state["network"])
            optimizer.load_state_dict(run.state["optimizer"])
            alphas, fitness = run.state["alphas"], run.state["fitness"]
            for name, generator in generators.items():
                generator.set_state(run.state["generators"][name])
    else:
        run.save_checkpoint(0, state())

    for generation in range(run.completed + 1, args.epochs + 1):
        done = run.state.pop("partial", {})  # of a generation that a signal interrupted
        start = time.perf_counter() - done.get("seconds", 0)
        where = f"generation {generation}/{args.epochs}"
        if generation > 1 and not done:
            alphas = next_generation(
                alphas,
                fitness,
                num_elites=args.num_elites,
                tsize=args.tsize,
                mutate_rate=args.mutate_rate,
                generator=breeding,
                variant=args.variant,
            )
        begun = drawn()
        decoded = space.decode(alphas)
        trained = (alphas if args.variant in ("nd", "ndt") else decoded).to(device)
        measured = alphas if args.variant in ("nd", "ndf") else decoded

        def loss_of(step, x, y, trained=trained):
            logits = forward(network, x, trained[step % len(trained)])
            return F.cross_entropy(logits, y), logits

        def partial():
            """The state within this generation. It continues from its steps; fitness is measured anew."""
            return {**state(), "generators": begun, "partial": {**done, "seconds": time.perf_counter() - start}}

        lr = cosine(args.learning_rate, args.learning_rate_min, (generation - 1) / args.epochs)
        utils.set_learning_rate(optimizer, lr)
        network.train()
        entry = {"generation": generation, "lr": lr}
        with run.saving_when_interrupted(partial):
            entry |= train_one_epoch(
                loss_of, network, train_loader, optimizer, args, where=where, log=run.log, done=done
            )
        images = train_loader.size
        entry["distinct"], said = len(unique(decoded)[0]), ""
        if args.variant != "rand" or generation == args.epochs:
            with run.saving_when_interrupted(partial):
                fitness = measure_fitness(
                    network, measured, valid_loader, args.bn, fitness_of, amp=args.amp, where=f"{where}, fitness"
                )
            order = torch.sort(fitness, descending=True, stable=True).indices
            alphas, fitness = alphas[order], fitness[order]
            images += len(unique(measured)[0]) * valid_loader.size
            entry |= {
                "fitness_best": fitness[0].item(),
                "fitness_mean": fitness.mean().item(),
                "fitness_std": fitness.std(correction=0).item(),
                "best_genotype": space.genotype(alphas[0]),
            }
            fields, said = space.report(alphas, fitness)
            entry |= fields
        seconds = time.perf_counter() - start
        entry |= {
            "images_per_second": images / seconds,
            "seconds": seconds,
            "peak_memory_mb": utils.peak_memory_mb(device),
        }
        save_generation(space, network, alphas, fitness, entry, run)
        run.save_checkpoint(generation, state())
        run.log(summary(where, entry) + said)
    return alphas[0], fitness[0].item()


def cosine(high, low, progress):
    """The cosine schedule from `high` to `low`, `progress` in [0, 1)."""
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def save_generation(space, network, alphas, fitness, entry, run):
    if not run.writes:
        return
    (run.path / "population").mkdir(exist_ok=True)
    with atomic_write(run.path / "population" / f"{entry['generation']:03d}.npz") as file:
        np.savez(file, alphas=alphas.numpy(), fitness=fitness.numpy())
    run.save_weights(network, "weights.pt", {"space": space.name})
    if "best_genotype" in entry:
        space.save_genotype(alphas[0], run.path)
    run.record(entry["generation"], entry)


def summary(where, entry):
    text = f"{where}: loss {entry['train_loss']:.4f}, train top-1 {entry['train_top1']:.2f} %"
    if "fitness_best" in entry:
        text += f", fitness best {entry['fitness_best']:.2f} mean {entry['fitness_mean']:.2f}"
    return f"{text}, {entry['distinct']} distinct, {entry['seconds']:.1f} s"


# ---- command line, shared with nas201.train_search


def search_parser(prog, description, datasets, **defaults):
    """The flags both spaces have, in groups; the defaults are the paper's."""
    parser = Parser(prog=prog, description=description)
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="../data", help="where the data set lies or is downloaded to")
    group.add_argument("--dataset", default="cifar10", choices=datasets, help="folder: own images in DATA/train/CLASS/")
    group.add_argument("--train_samples", type=number(int, 1), help="train on this many images only, drawn per class")
    group.add_argument("--valid_samples", type=number(int, 1), help="measure on this many images only, drawn per class")
    group.add_argument("--cutout", action="store_true", help="cut a square out of each augmented image")
    group.add_argument("--cutout_length", type=number(int, 1), default=16, help="side of that square, pixels")
    group.add_argument(
        "--valid_transform", choices=["train", "test"], default="train", help="augmentation of the validation images"
    )
    group = parser.add_argument_group("genetic algorithm")
    group.add_argument("--epochs", type=number(int, 1), default=50, help="generations")
    group.add_argument("--pop_size", type=number(int, 1), default=50, help="individuals")
    group.add_argument("--tsize", type=number(int, 1), default=10, help="individuals in a tournament")
    group.add_argument("--num_elites", type=number(int, 0), default=1, help="best individuals kept unchanged")
    group.add_argument("--mutate_rate", type=number(float, 0, 1), default=0.1, help="probability for each edge")
    group.add_argument("--variant", choices=VARIANTS, default="evnas", help="the paper's ablations")
    group.add_argument(
        "--bn", choices=["batch", "running"], default="batch", help="BatchNorm statistics while fitness is measured"
    )
    group = parser.add_argument_group("training of the shared weights")
    group.add_argument("--batch_size", type=number(int, 1), default=64, help="training batch")
    group.add_argument("--valid_batch_size", type=number(int, 1), default=1024, help="validation batch")
    group.add_argument("--learning_rate", type=number(float, 0), default=0.025, help="at the first generation")
    group.add_argument("--learning_rate_min", type=number(float, 0), default=0.001, help="the cosine schedule's end")
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD")
    group.add_argument("--weight_decay", type=number(float, 0), default=3e-4, help="of SGD, on every parameter")
    group.add_argument("--grad_clip", type=number(float, above=0), default=5.0, help="largest gradient norm")
    group.add_argument("--init_channels", type=number(int, 1), default=16, help="channels of the first cells")
    group = parser.add_argument_group("run")
    group.add_argument("--dir", default=".", help="the run directory is made in here")
    group.add_argument("--run_name", help="name of the run directory (default: search-TIME)")
    group.add_argument("--resume", metavar="RUN_DIR", help="continue this run; its arguments are the defaults")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=18, help="of every random number")
    utils.add_device_arguments(group)
    utils.add_speed_arguments(group)
    group.add_argument("--plain", action="store_true", help="compute with the readable reference network: slower")
    group.add_argument("--report_freq", type=number(int, 1), default=50, help="steps between reports")
    parser.set_defaults(**defaults)
    return parser


def check_search(args):
    for name in ("tsize", "num_elites"):
        if getattr(args, name) > args.pop_size:
            raise UserError(f"--{name} {getattr(args, name)} is larger than --pop_size {args.pop_size}")
    if args.plain and args.compile:
        raise UserError("--plain runs the reference as it is written: leave --compile out")
    if args.batch_size < utils.world_size():
        raise UserError(f"--batch_size {args.batch_size} is too small for {utils.world_size()} processes")


def search_loaders(args, train, valid, augmentation, device):
    """The training and the validation loader, each with a generator of its own."""
    data.check_batch(args.batch_size, train)
    if not len(valid):
        raise UserError("the validation split is empty")
    cutout = args.cutout_length if args.cutout else 0
    return [
        data.make_loader(
            split,
            batch_size,
            augmentation,
            device,
            generator=torch.Generator().manual_seed(args.seed + offset),
            augment=augment,
            cutout=cutout,
            shared=offset == 1,  # individuals are shared out for fitness, so each process needs every validation image
        )
        for split, batch_size, offset, augment in (
            (train, args.batch_size, 1, True),
            (valid, args.valid_batch_size, 2, args.valid_transform == "train"),
        )
    ]


def run_search(args, space, network, loaders, device, prog):
    """Open the run directory, search, and write what a run ends with."""
    if args.resume:
        run = runs.Run.resume(args.resume)
    else:
        name = args.run_name or f"search-{time.strftime('%Y%m%d-%H%M%S')}"
        run = runs.Run.create(args.dir, name, args, prog, kind="search", space=space.name)
    try:
        run.log(f"{utils.describe_device(device)}; run directory {run.path}")
        best, fitness = search(args, space, network, *loaders, run)
        run.log(f"best fitness {fitness:.2f} %: {space.genotype(best)}")
        run.finish(space.picture(best))
    finally:
        run.close()


@command
def main(argv=None):
    parser = search_parser("train_search.py", __doc__, ["cifar10", "cifar100", "folder", "digits"])
    parser.add_argument("--layers", type=number(int, 1), default=8, help="cells of the supernet")
    share = number(float, above=0, high=1)
    parser.add_argument("--train_portion", type=share, default=0.5, help="of the images trains, the rest validates")
    args = runs.parse(parser, argv)
    check_search(args)
    device = utils.choose_device(args)
    train, valid, augmentation = data.search_splits(args)
    loaders = search_loaders(args, train, valid, augmentation, device)
    torch.manual_seed(args.seed)
    network = Network(args.init_channels, len(train.classes), args.layers)
    network = network.to(device, memory_format=torch.channels_last)
    run_search(args, S1, network, loaders, device, parser.prog)


if __name__ == "__main__":
    main()
