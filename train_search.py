"""Search for a cell in the DARTS space with EvNAS: a genetic algorithm over the shared weights of one supernet."""

from support.cli import MOST, Parser, command, file_name, number  # first: it ends Ctrl-C in one line

# isort: split

import functools
import math
import re
import time

import numpy as np
import torch
from torch.nn import functional as F

import baselines
import datasets
import encoding
import fast_search
import genotype_files
import genotypes
import loaders
import memory
import shared_flags
import splits
import utils
from costs import REPETITIONS, Costs, s1_table
from engine import PlainEvaluator, TrainingState, measure_fitness, plain_forward, train_one_epoch, unique
from evolution import VARIANTS, merit, next_generation, non_dominated
from model import NetworkCIFAR
from model_search import Network
from recipes import CIFAR
from reporting import report
from support import devices, distributed, runs, seeds, self_check
from support.files import UserError, atomic_write, make_folder

SMALLEST_BUDGET = 1e-6  # one parameter, one mult-add, a picosecond; a denormal number would make an infinite excess
ARCHIVED = 100  # individuals of the generations' fronts of fitness and costs


class SearchSpace:
    """What the loop needs to know of a search space."""

    name: str
    encoding: object  # module with random_alphas(P, generator) and decode(alphas)
    fast: object  # module with forward(network, x, alphas) and Evaluator(network, bn), see fast_search
    genotype_files: tuple
    nesterov = False

    def cell(self, alphas):
        """Return the discrete cell of one raw individual (G, E, O): a Genotype or an arch string."""
        raise NotImplementedError

    def network(self, args, cell, classes):
        """Return the network of a cell that would be retrained."""
        raise NotImplementedError

    def cost_table(self, args, classes, image_shape):
        """Return what `network` costs: see `costs.s1_table`."""
        raise NotImplementedError

    def retraining(self, args, image_shape):
        """Return the words that `train.py --dir RUN` needs beside the data set, to retrain as the paper does."""
        return []

    def worth(self, groups):
        """Return fields, and a text, on {name: (alphas (N, G, E, O), fitness (N,), parameters (N,))}, the winner first.

        What a benchmark knows of them goes in here.
        """
        return {}, ""

    def report(self, alphas, fitness):
        """Return history fields, and a text for the log, on a population (P, G, E, O), best first, and its fitness."""
        return {}, ""


class S1(SearchSpace):
    """The DARTS space."""

    name, encoding, fast, genotype_files = "s1", encoding, fast_search, genotype_files.FILES

    def cell(self, alphas):
        return encoding.genotype(alphas)

    def network(self, args, cell, classes):
        return NetworkCIFAR(args.target_channels, classes, args.target_layers, False, cell)

    def cost_table(self, args, classes, image_shape):
        return s1_table(args.target_channels, args.target_layers, classes, image_shape)

    def retraining(self, args, image_shape):
        size = ["--init_channels", args.target_channels, "--layers", args.target_layers]
        auxiliary = image_shape[1:] == (32, 32) and args.target_layers > 1  # what its head needs
        return ["--cutout", *(["--auxiliary"] if auxiliary else []), *size]


class SearchState(TrainingState):
    """Shared weights and population: alphas (P, G, E, O), raw, and fitness (P,), percent, NaN until measured.

    violation (P,) says by how much individuals exceed the budgets; latency {cell: ms} is what has been measured of it;
    archive {cell: raw alphas} has the newest individuals that were not dominated in their own generation.
    """

    saved = ("alphas", "fitness", "violation", "latency", "archive")

    def __init__(self, args, space, network, train_loader, valid_loader):
        device = next(network.parameters()).device
        optimizer = utils.make_sgd(network.parameters(), args, device, space.nesterov)
        self.breeding = seeds.generator(args, "population")
        super().__init__(network, optimizer, train_loader, breeding=self.breeding, valid=valid_loader.generator)
        self.alphas = space.encoding.random_alphas(args.pop_size, generator=self.breeding)
        self.fitness = torch.full((args.pop_size,), math.nan, dtype=torch.float64)
        self.violation, self.latency, self.archive = torch.zeros(args.pop_size, dtype=torch.float64), {}, {}

    def load_state_dict(self, state):
        new = {name: getattr(self, name) for name in ("violation", "latency", "archive")}  # not in older checkpoints
        super().load_state_dict(new | state)
        for alphas in [*self.alphas, *self.archive.values()]:
            if runs.kind(alphas) != runs.kind(self.alphas[0]) or not ((alphas >= 0) & (alphas < 1)).all():
                raise ValueError("an individual of another shape, or with genes outside [0, 1)")
        if ((self.fitness < 0) | (self.fitness > 100)).any():
            raise ValueError("fitness outside 0 to 100 %")
        costs = [*self.latency.values(), *self.violation.tolist()]
        if not all(type(value) is float and 0 <= value < math.inf for value in costs):
            raise ValueError("a latency or an excess over the budgets that is no number of at least 0")

    def set_fitness(self, fitness, costs):
        """Sort the population by `merit`, best first; among equals the earlier individual stays ahead."""
        amounts = costs.of(self.alphas, self.latency)
        violation = costs.violation(amounts)
        order = torch.sort(merit(fitness, violation), descending=True, stable=True).indices
        self.alphas, self.fitness, self.violation = self.alphas[order], fitness[order], violation[order]
        best = non_dominated(torch.cat([-fitness.unsqueeze(1).to(amounts), amounts], dim=1)[order])
        for alphas in self.alphas[best].flip(0):  # the fittest last: they are kept longest
            cell = str(costs.space.cell(alphas))
            self.archive.pop(cell, None)
            self.archive[cell] = alphas.clone()
        self.archive = dict(list(self.archive.items())[-ARCHIVED:])


def search(args, space, network, train_loader, valid_loader, costs, run):
    """Run the search loop of EvNAS (section 3); return the last state, whose first individual is the best."""
    state = SearchState(args, space, network, train_loader, valid_loader)
    run.restore(state)
    if run.state:
        restore_results(args, run, space, state)
    breeding = {name: getattr(args, name) for name in ("num_elites", "tsize", "mutate_rate", "variant")}
    for generation in range(run.completed + 1, args.epochs + 1):
        if generation > 1 and state.partial is None:
            breeding |= {"generator": state.breeding, "violation": state.violation}
            state.alphas = next_generation(state.alphas, state.fitness, **breeding)
        state.begin_epoch()
        where = f"generation {generation}/{args.epochs}"
        lr = cosine(args.learning_rate, args.learning_rate_min, (generation - 1) / args.epochs)
        decoded = space.encoding.decode(state.alphas)
        trained = state.alphas if args.variant in ("nd", "ndt") else decoded
        measured = state.alphas if args.variant in ("nd", "ndf") else decoded
        entry = {"generation": generation, "lr": lr}
        images, remarks = train_loader.size, ""
        with run.saving_when_interrupted(state.unfinished_state_dict):
            entry |= train_generation(args, space, state, trained, lr, train_loader, where=where, log=run.log)
            entry["distinct"] = len(unique(decoded)[0])
            if args.variant != "rand" or generation == args.epochs:
                fitness = measure(args, space, network, measured, valid_loader, where=f"{where}, fitness")
                state.set_fitness(fitness, costs)
                images += len(unique(measured)[0]) * valid_loader.size
                fields, remarks = describe_population(space, state, costs)
                entry |= fields
        entry |= utils.cost(images, state.progress.start, next(network.parameters()).device)
        save_generation(run, space, state, entry, where, remarks)
    return state


def train_generation(args, space, state, alphas, lr, loader, *, where, log):
    """Train the shared weights for one epoch: batch t belongs to individual t mod P of `alphas` (P, G, E, O)."""
    forward = forward_of(args, space, args.compile)
    network, optimizer = state.network, state.optimizer
    alphas = alphas.to(next(network.parameters()).device)

    def loss_of(x, y, individual):
        logits = forward(network, x, individual)
        return F.cross_entropy(logits, y), logits

    def inputs_of(step):
        return (alphas[step % len(alphas)],)

    optimizer.param_groups[0]["lr"] = lr
    network.train()
    return train_one_epoch(loss_of, inputs_of, network, loader, optimizer, args, state.progress, where=where, log=log)


def forward_of(args, space, compile: bool):
    """Return forward(network, x, alphas), the supernet's pass in training, as the arguments say."""
    if args.plain:
        return plain_forward
    return functools.partial(space.fast.forward, compile=compile, checkpoint=args.checkpoint)


def check_training_step(args, space, network, loader) -> str:
    """Check the kernels of a training step, see support/self_check.py; return a line for the log."""
    generator = torch.Generator().manual_seed(0)
    alphas = space.encoding.random_alphas(1, generator=generator)[0]  # (G, E, O)
    alphas = alphas.to(next(network.parameters()).device)

    def loss(network, x, y, compile):
        return F.cross_entropy(forward_of(args, space, compile)(network, x, alphas), y)

    images = loader.full_batch
    classes = network.classifier.out_features
    return self_check.self_check(network, loss, images, loader.image_shape, classes, args)


def measure(args, space, network, alphas, loader, *, where):
    """Return the fitness (P,) of `alphas` (P, G, E, O), as the arguments say."""
    make_evaluator = PlainEvaluator if args.plain else functools.partial(space.fast.Evaluator, compile=args.compile)
    return measure_fitness(network, alphas, loader, args.bn, make_evaluator, amp=args.amp, where=where)


def describe_population(space, state, costs):
    """Return history fields on the sorted population, and what budgets and space have to say of it."""
    fields, remarks = space.report(state.alphas, state.fitness)
    if any(costs.limits.values()):
        fields |= {"feasible": int((state.violation == 0).sum())}
        remarks = f", {fields['feasible']} meet the budget{remarks}"
    fields |= dict(zip(costs.names, costs.of(state.alphas[:1], state.latency)[0].tolist(), strict=True))
    best, mean = state.fitness[0].item(), state.fitness.mean().item()
    own = {"fitness_best": best, "fitness_mean": mean, "fitness_std": state.fitness.std(correction=0).item()}
    own["best_genotype"] = genotype_files.to_json(space.cell(state.alphas[0]))
    return own | fields, remarks


def save_generation(run, space, state, entry, where, remarks):
    """Save the checkpoint with the history, then what follows from it."""
    generation = entry["generation"]
    run.record(generation, entry)
    run.save_checkpoint(generation, state.state_dict())
    save_results(run, space, state)
    text = f"{where}: loss {entry['train_loss']:.4f}, train top-1 {entry['train_top1']:.2f} %"
    if "fitness_best" in entry:
        text += f", fitness best {entry['fitness_best']:.2f} mean {entry['fitness_mean']:.2f}"
    run.log(f"{text}, {entry['distinct']} distinct, {entry['seconds']:.1f} s{remarks}")


def save_results(run, space, state):
    """Save what follows from the state after a generation: its population, its best cell, the weights."""
    if run.writes:
        make_folder(run.path / "population")
        with atomic_write(run.path / "population" / f"{run.completed:03d}.npz") as file:
            np.savez(file, alphas=state.alphas.numpy(), fitness=state.fitness.numpy())
        if "best_genotype" in run.rows[-1]:
            save_cell(run, space, state.alphas[0])
    run.save_weights(state.network, "weights.pt", {"space": space.name})


def restore_results(args, run, space, state):
    """Make the files of a resumed run those of its checkpoint.

    Within a generation the state has gone on from the last whole one, whose files were saved before it. Populations of
    earlier generations are in their files alone.
    """
    if not run.writes:
        return
    for path in (run.path / "population").glob("*.npz"):
        if re.fullmatch(r"\d+", path.stem) and int(path.stem) > run.completed:
            path.unlink()
    if run.completed < args.epochs:
        for name in baselines.FILES:
            (run.path / name).unlink(missing_ok=True)
    if run.completed and state.partial is None:
        save_results(run, space, state)


def save_cell(run, space, alphas):
    """Save the cell of one raw individual (G, E, O) in the formats of its space."""
    for name in space.genotype_files if run.writes else ():
        genotype_files.save(space.cell(alphas), run.path / name)


def cosine(high, low, progress):
    """Return the value of the cosine schedule from `high` to `low` at `progress` in [0, 1)."""
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


# ---- command line, shared with nas201.train_search


def search_parser(prog, description, **defaults):
    """Make a parser with the flags both spaces have, in groups; the defaults are the paper's."""
    parser = Parser(prog=prog, description=description)
    group = parser.add_argument_group("data")
    datasets.add_data_arguments(group, prog, folder="../data")
    shared_flags.add_training_image_arguments(group)
    group.add_argument("--valid_samples", type=number(int, 1), help="measure on this many images only, drawn per class")
    group.add_argument("--valid_transform", choices=["train", "test"], default="train", help="of validation images")
    group = parser.add_argument_group("genetic algorithm")
    group.add_argument("--epochs", type=number(int, 1, MOST.epochs), default=50, help="generations")
    group.add_argument("--pop_size", type=number(int, 1, MOST.individuals), default=50, help="individuals")
    group.add_argument("--tsize", type=number(int, 1), default=10, help="individuals in a tournament")
    group.add_argument("--num_elites", type=number(int, 0), default=1, help="best individuals kept unchanged")
    group.add_argument("--mutate_rate", type=number(float, 0, 1), default=0.1, help="probability for each edge")
    group.add_argument("--variant", choices=VARIANTS, default="evnas", help="the paper's ablations")
    group.add_argument(
        "--max_params", type=number(float, SMALLEST_BUDGET), help="of the network to be retrained, millions"
    )
    group.add_argument("--max_mult_adds", type=number(float, SMALLEST_BUDGET), help="of it, millions an image")
    text = f"of it, ms: median of {REPETITIONS} forward passes of one image on this device, with these threads"
    group.add_argument("--max_latency", type=number(float, SMALLEST_BUDGET), help=text)
    text = "random architectures that the winner is compared with on the final weights; 0: none"
    group.add_argument("--baselines", type=number(int, 0, MOST.individuals), default=50, help=text)
    group.add_argument("--bn", choices=["batch", "running"], default="batch", help="BatchNorm statistics for fitness")
    group = parser.add_argument_group("training of the shared weights")
    group.add_argument("--batch_size", type=number(int, 1), default=64, help="training batch")
    group.add_argument("--valid_batch_size", type=number(int, 1), default=1024, help="validation batch")
    group.add_argument("--learning_rate", type=number(float, 0), default=0.025, help="at the first generation")
    group.add_argument("--learning_rate_min", type=number(float, 0), default=0.001, help="the cosine schedule's end")
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD")
    group.add_argument("--weight_decay", type=number(float, 0), default=3e-4, help="of SGD, on every parameter")
    group.add_argument("--grad_clip", type=number(float, above=0), default=5.0, help="largest gradient norm")
    shared_flags.add_init_channels(group, "channels of the supernet's first cells", low=1, default=16)
    group = parser.add_argument_group("run")
    group.add_argument("--dir", default=".", help="the run directory is made in here")
    group.add_argument("--run_name", type=file_name, help="name of the run directory (default: search-TIME)")
    shared_flags.add_run_arguments(group, seed=18, report_freq=50)
    group.add_argument("--plain", action="store_true", help="compute with the readable reference network: slower")
    parser.set_defaults(**defaults)
    return parser


def check_search(args):
    for name in ("tsize", "num_elites"):
        if getattr(args, name) > args.pop_size:
            raise UserError(f"--{name} {getattr(args, name)} is larger than --pop_size {args.pop_size}")
    if args.plain and (args.compile or args.checkpoint):
        raise UserError("--plain runs the reference as it is written: leave --compile and --checkpoint out")
    if args.batch_size < distributed.world_size():
        raise UserError(f"--batch_size {args.batch_size} is too small for {distributed.world_size()} processes")


def search_loaders(args, train, valid, augmentation, device):
    """Return the training and the validation loader, each with a generator of its own."""
    loaders.check_batch(args.batch_size, train)
    if not len(valid):
        raise UserError("the validation split is empty")
    if args.bn == "batch":
        loaders.check_statistics("--valid_batch_size", min(args.valid_batch_size, len(valid)), valid)
    cutout = args.cutout and args.cutout_length
    first = dict(generator=seeds.generator(args, "training images"), cutout=cutout, augment=True)
    # Individuals are shared out for fitness, so each process needs every validation image.
    second = dict(generator=seeds.generator(args, "validation images"), cutout=cutout, shared=False)
    second["augment"] = args.valid_transform == "train"
    train_loader = loaders.make_loader(train, args.batch_size, augmentation, device, **first)
    return train_loader, loaders.make_loader(valid, args.valid_batch_size, augmentation, device, **second)


def is_finished(args, space):
    """Tell whether the search that is to be resumed has come to its end, and say so."""
    files = ["weights/weights.pt", "weights/weights.json", f"population/{args.epochs:03d}.npz"]
    finished = runs.is_finished(args, [*files, *space.genotype_files, *baselines.FILES])
    if finished:
        distributed.say(f"{args.resume} is finished")
    return finished


def run_search(args, space, network, loaders, device, prog, bound):
    """Open the run directory, search, and write what a run ends with; `bound` is what must be the same on resume."""
    bound = {"kind": "search", "space": space.name, **bound}
    costs = Costs(args, space, network.classifier.out_features, loaders[1].image_shape, device)
    costs.check()
    checked = None
    if self_check.is_needed(args, device):  # before there is a run directory
        checked = check_training_step(args, space, network, loaders[0])
    if args.resume:
        run = runs.Run.resume(args.resume, args, **bound)
    else:
        name = args.run_name or f"search-{time.strftime('%Y%m%d-%H%M%S')}"
        run = runs.Run.create(args.dir, name, args, prog, new_name=not args.run_name, **bound)
    with run:
        run.log(f"{devices.describe_device(device)}; run directory {run.path}")
        run.log(splits.counts_text(bound["data"]))
        if checked:
            run.log(checked)
        state = search(args, space, network, *loaders, costs, run)
        best = space.cell(state.alphas[0])
        run.log(f"best fitness {state.fitness[0]:.2f} %: {best}")
        if state.violation[0] > 0:
            run.log("no individual of the last generation meets the budget: this one misses it by the least")
        save_cell(run, space, state.alphas[0])
        loaders[1].generator = baselines.generator(args, "final validation images")
        measure_again = functools.partial(measure, args, space, network, loader=loaders[1], where="the final weights")
        if not baselines.are_there(run):
            with run.saving_when_interrupted(state.state_dict):
                baselines.conclude(args, space, costs, state, measure_again, run)
        report.finish(run, best)


@command
def main(argv=None):
    parser = search_parser("train_search.py", __doc__)
    parser.add_argument("--layers", type=number(int, 1, MOST.cells), default=8, help="cells of the supernet")
    parser.add_argument(
        "--target_channels",
        type=number(int, 2, MOST.channels),
        default=CIFAR.init_channels,
        help="of the network to be retrained",
    )
    parser.add_argument("--target_layers", type=number(int, 1, MOST.cells), default=CIFAR.layers, help="its cells")
    share = number(float, above=0, high=1)
    parser.add_argument("--train_portion", type=share, default=0.5, help="of the images trains, the rest validates")
    args = runs.parse(parser, argv)
    check_search(args)
    if is_finished(args, S1):
        return
    device = devices.choose_device(args)
    runs.check_arguments_alike(args)
    train, valid, augmentation = datasets.search_splits(args)
    loaders = search_loaders(args, train, valid, augmentation, device)
    everything = tuple(genotypes.PRIMITIVES) * 14
    cells = memory.s1_cells(args.init_channels, args.layers, math.prod(train.image_size), everything, everything)
    memory.check_search(memory.supernet("s1", cells, args), args, loaders, device, 2 * len(everything))
    torch.manual_seed(seeds.derive(args.seed, "weights", args.seed_scheme))
    network = Network(args.init_channels, len(train.classes), args.layers)
    network = network.to(device, memory_format=devices.memory_format(device))
    run_search(args, S1(), network, loaders, device, parser.prog, {"data": splits.describe(train=train, valid=valid)})


if __name__ == "__main__":
    main()
