"""Search for a cell of NAS-Bench-201 (S2) with EvNAS.

With a benchmark table, the search also reports the true accuracy of each generation's best cell.
"""

from support.cli import Published, command, number

import argparse
import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

import memory
import search_cli
import seed_roles
from augment import inside
from loaders import Loader
from nas201 import benchmark, data, encoding, fast_search, model, rank_all
from nas201.genotypes import EDGES, PRIMITIVES
from nas201.model_search import Network
from nas201.report import NAS_BENCH_201
from nas201.sources import COLUMNS, DATASETS, METRICS, SPLITS
from recipes import NAS201
from run_settings import SETTINGS
from search_space import Group, Remarks, SearchSetup, SearchSpace
from shared_flags import MOST
from splits import describe
from support import agreement, devices, distributed, runs, seeds
from support.files import UserError, digest, read_json
from train_search import search  # the loop of the paper

# The published searchNAS201.sh looked for the benchmark table at this path.
PUBLISHED_TABLE = "../NAS_Bench_201/NAS-Bench-201-v1_1-096897.pth"


def correlations(fitness: Sequence[float], truth: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return Kendall's tau-b and Spearman's rho of fitness and true accuracy.

    Both are None if they are not defined. Architectures without a true accuracy are left out.
    """
    from scipy import stats

    pairs = np.array([pair for pair in zip(fitness, truth, strict=True) if pair[1] is not None])  # (N, 2)
    if len(pairs) < 2 or (np.ptp(pairs, axis=0) == 0).any():
        return None, None
    return float(stats.kendalltau(*pairs.T).statistic), float(stats.spearmanr(*pairs.T).statistic)


def shown(value: float | None, digits: int) -> str:
    """Return a number as text, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


class S2(SearchSpace):
    """The NAS-Bench-201 space (S2).

    With --api_path, `table` is a benchmark table with the true accuracies, otherwise None. `truth`
    is the (data set, split) whose accuracies in the table are compared with fitness, or None if the
    table does not have them.
    """

    view = NAS_BENCH_201
    encoding = encoding
    fast = fast_search
    genotype_files = ("genotype.json",)
    recipe = NAS201
    nesterov = True

    def __init__(self, args: argparse.Namespace):
        self.table = benchmark.load(args.api_path) if args.api_path else None
        self.truth: tuple[str, str] | None = None
        if self.table:
            self.truth = self.find_truth(args)
            known = f"{' '.join(self.truth)} accuracy after 200 epochs" if self.truth else "none for this data set"
            absent = f"; not in the table: {', '.join(self.table.absent)}" if self.table.absent else ""
            distributed.say(f"true accuracies from {args.api_path}: {known}{absent}")

    def find_truth(self, args: argparse.Namespace) -> tuple[str, str] | None:
        """Return the (data set, split) that fitness is compared with.

        Validation accuracy is used if the table has it, otherwise test accuracy.
        """
        dataset = args.api_dataset or (args.dataset if args.dataset in DATASETS else "cifar10")
        # METRICS lists the validation split of each data set before its test split.
        for key, column in zip(METRICS, COLUMNS, strict=True):
            if key[0] == dataset and column not in self.table.absent:
                return key
        return None

    def cell(self, alphas: torch.Tensor) -> str:
        """Return the arch string of one raw individual (1, 6, 5)."""
        return encoding.arch_string(alphas)

    def network(self, args: argparse.Namespace, cell: str, classes: int) -> nn.Module:
        """Return the network of an arch string, with the benchmark's channels and layers."""
        return model.Network(NAS201.init_channels, NAS201.layers, classes, cell)

    def cost_table(
        self, args: argparse.Namespace, classes: int, image_shape: tuple[int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the costs of the networks that `network` makes, see `model.cost_table`."""
        return model.cost_table(NAS201.init_channels, NAS201.layers, classes, image_shape)

    def accuracy_names(self) -> list[str]:
        """Return names such as "cifar10_test" of the accuracies in the table, none without a table."""
        if not self.table:
            return []
        return [name.removesuffix("_200") for name in COLUMNS if name not in self.table.absent]

    def true_accuracies(self, cell: str) -> list[float | None]:
        """Return the accuracies of an arch string in the order of `accuracy_names`."""
        if not self.table:
            return []
        values = self.table.accuracies(self.table.index(cell))
        known = [value for name, value in zip(COLUMNS, values, strict=True) if name not in self.table.absent]
        return [None if math.isnan(value) else float(value) for value in known]

    def remarks_on_population(self, alphas: torch.Tensor, fitness: torch.Tensor) -> Remarks:
        """Return the best individual's true accuracies, and the rank correlations of fitness.

        The population `alphas` (P, 1, 6, 5) is sorted, best individual first.
        """
        if not self.table:
            return Remarks({}, "")
        indices = [self.table.index(self.cell(individual)) for individual in alphas]
        best = {name: {split: self.table.accuracy(indices[0], name, split) for split in SPLITS} for name in DATASETS}
        fitness_of = {}  # of each distinct cell, the fittest first: twins would count twice in a rank correlation
        for index, value in zip(indices, fitness.tolist(), strict=True):
            fitness_of.setdefault(index, value)
        values = [None] * len(fitness_of)
        name = None
        if self.truth:
            values = [self.table.accuracy(index, *self.truth) for index in fitness_of]
            name = " ".join(self.truth)
        tau, rho = correlations(list(fitness_of.values()), values)
        fields = {"true_accuracy": best, "truth": name, "kendall_tau": tau, "spearman_rho": rho}
        accuracy = f"{name or 'true'} accuracy of the best {shown(values[0], 2)}"
        return Remarks(fields, f"; {accuracy}, tau {shown(tau, 3)}, rho {shown(rho, 3)}")

    def remarks_on_result(self, groups: dict[str, Group]) -> Remarks:
        """Return the winner's true accuracies, the benchmark's baselines and rank correlations.

        With a NATS-Bench directory there are no such remarks: its records are read one by one, and
        the baselines need all of them.
        """
        if not self.table or self.table.table is None:
            return Remarks({}, "")
        winner = self.table.index(self.cell(groups["last population"].alphas[0]))
        fields = {"accuracy": benchmark.baselines(self.table, winner)}
        if not self.truth:
            return Remarks(fields, "")
        fields["truth"] = " ".join(self.truth)
        fields["kendall_tau"] = {name: self.rank_correlations(group) for name, group in groups.items()}
        row = fields["accuracy"].get(COLUMNS[list(METRICS).index(self.truth)].removesuffix("_200"))
        if not row:
            return Remarks(fields, "")
        place = f"rank {row['beaten_by'] + 1:,} of {len(self.table):,}"
        return Remarks(fields, f"; {row['accuracy']:.2f} % true accuracy ({fields['truth']}), {place}")

    def rank_correlations(self, group: Group) -> dict:
        """Return Kendall's tau of fitness, and of the number of parameters, with true accuracy.

        The result also has the number of architectures in the group.
        """
        indices = [self.table.index(self.cell(individual)) for individual in group.alphas]
        truth = [self.table.accuracy(index, *self.truth) for index in indices]
        return {
            "architectures": len(group.alphas),
            "fitness": correlations(group.fitness.tolist(), truth)[0],
            "parameters": correlations(group.parameters.tolist(), truth)[0],
        }

    def rank_correlations_of(self, alphas: torch.Tensor, fitness: Sequence[float]) -> dict:
        """Return "truth", "kendall_tau" and "spearman_rho" of individuals (N, 1, 6, 5), {} without true accuracies."""
        if not self.truth:
            return {}
        truth = [self.table.accuracy(self.table.index(self.cell(individual)), *self.truth) for individual in alphas]
        tau, rho = correlations(fitness, truth)
        return {"truth": " ".join(self.truth), "kendall_tau": tau, "spearman_rho": rho}

    @classmethod
    def files_at_the_end(cls, args: argparse.Namespace) -> list[str]:
        """Return the files of --rank_all."""
        return [rank_all.TABLE, rank_all.RESULT] if args.rank_all else []

    def finish(self, setup: SearchSetup, run: runs.Run) -> None:
        """Measure all architectures with the final weights, if --rank_all asks for it."""
        if setup.args.rank_all and not all((run.path / name).is_file() for name in self.files_at_the_end(setup.args)):
            rank_all.rank_all(setup, run)


# ---- configuration files of the published search


def check_config(path: str, args: argparse.Namespace) -> None:
    """Compare a configuration file of the published search with this search.

    The file is JSON of {key: [type, value]}. The schedule, epochs and batch size in the file had no
    effect in the published code, so they are not compared. Settings that are missing in the file
    are not compared either. Raises UserError for a file that cannot be read, and for the first
    value that differs.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"--config_path {path}: not a JSON object of key: [type, value]")
    for key, flag in {"LR": "learning_rate", "momentum": "momentum", "decay": "weight_decay"}.items():
        value = config_value(path, content, key, float)
        if value is not None and value != getattr(args, flag):
            remedy = f"give --{flag} {value}, or leave --config_path out"
            raise UserError(f"--config_path {path}: {key} is {value}, but --{flag} is {getattr(args, flag)}; {remedy}")
    fixed = {
        "nesterov": (lambda text: bool(int(text)), [True], "Nesterov momentum"),
        "optim": (str, ["SGD"], "SGD"),
        # The published name of the loss comes first.
        "criterion": (str, ["Softmax", "CrossEntropy", "CrossEntropyLoss"], "Softmax"),
    }
    for key, (convert, possible, used) in fixed.items():
        value = config_value(path, content, key, convert)
        if value is not None and value not in possible:
            raise UserError(
                f"--config_path {path}: {key} is {value}, but a search uses {used}; leave --config_path out"
            )


def config_value(path: str, content: dict, key: str, convert: Callable) -> object:
    """Return the value of `key` in a configuration file, or None if the file does not have the key.

    Raises UserError.
    """
    if key not in content:
        return None
    entry = content[key]
    try:
        type_name, value = entry
        if type_name in ("str", "int", "float", "bool"):
            return convert(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f'--config_path {path}: "{key}" is {str(entry):.80}; write an entry like ["float", "0.025"]')


# ---- command


def cutout_text(loader: Loader) -> str:
    """Return a line for the log that says what --cutout does.

    The line also says that --cutout had no effect in the published search.
    """
    height, width = (inside(torch.arange(n), loader.cutout, n).float().mean() for n in loader.image_shape[1:])
    return (
        f"--cutout erases a square of {loader.cutout} pixels a side, on average {100 * height * width:.0f} % of each "
        "training image; --cutout had no effect in the published search: to repeat that search, leave --cutout out"
    )


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command: the flags of both spaces, and those of NAS-Bench-201."""
    defaults = {"bn": "running", "valid_transform": "test", "baselines": 100}
    parser = search_cli.search_parser("python -m nas201.train_search", __doc__, **defaults)
    group = parser.add_argument_group("NAS-Bench-201")
    text = "number of cells in each of the three stages of the supernet"
    group.add_argument("--num_cells", type=number(int, 1, MOST.cells), default=5, metavar="N", help=text)
    text = "number of nodes of a cell; the benchmark only has cells of 4 nodes"
    group.add_argument("--max_nodes", type=int, choices=[4], default=4, help=text)
    text = (
        "keep running statistics in the BatchNorms of the searched cells, as searchNAS201.sh does; without this flag "
        "these BatchNorms use batch statistics, for fitness too"
    )
    group.add_argument("--track_running_stats", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = (
        "how to split images for training and validation: fixed is the benchmark's own split, seeded draws one with "
        "--seed (default: fixed for the benchmark's three data sets, seeded for others)"
    )
    group.add_argument("--split", choices=["fixed", "seeded"], help=text)
    text = "take the split from an index file in the benchmark's format; only for the benchmark's three data sets"
    group.add_argument("--split_file", metavar="FILE", help=text)
    text = (
        "benchmark with the true accuracies: .csv, .csv.xz, .pth or a NATS-Bench directory "
        f"(default: {PUBLISHED_TABLE} if it exists)"
    )
    group.add_argument("--api_path", metavar="PATH", help=text)
    text = "data set whose true accuracies are looked up (default: --dataset if the benchmark has it, else cifar10)"
    group.add_argument("--api_dataset", choices=DATASETS, help=text)
    text = (
        "when the search is finished, measure the fitness of all 15,625 architectures on the final weights; "
        "takes hours on a CPU"
    )
    group.add_argument("--rank_all", action="store_true", help=text)
    text = "number of threads that read image files"
    group.add_argument("--workers", type=number(int, 1, MOST.workers), default=2, metavar="N", help=text)
    group.add_argument("--trainval", action=Published)
    text = "configuration file of the published search; stop if that file asks for another optimiser or loss"
    group.add_argument("--config_path", metavar="FILE", default=argparse.SUPPRESS, help=text)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Search in the NAS-Bench-201 space."""
    parser = make_parser()
    args = search_cli.parse(parser, argv)
    if config_path := vars(args).pop("config_path", None):
        check_config(config_path, args)
    if search_cli.is_finished(args, S2):
        return
    if args.api_path is None and not args.resume:
        if os.path.exists(PUBLISHED_TABLE):
            args.api_path = PUBLISHED_TABLE
        else:
            distributed.say(f"no true accuracies: {PUBLISHED_TABLE} does not exist, and --api_path is not given")
    device = devices.choose_device(args)
    agreement.check_arguments_alike(args, SETTINGS)
    space = S2(args)
    train, valid, augmentation = data.search_splits(args)
    train_loader, valid_loader = search_cli.search_loaders(args, train, valid, augmentation, device)
    if args.cutout:
        distributed.say(cutout_text(train_loader))
    candidates = PRIMITIVES * len(EDGES)  # candidate operations of a cell: every operation on every edge
    cells = memory.s2_cells(args.init_channels, args.num_cells, math.prod(train.image_size), candidates)
    needs = memory.supernet("s2", cells, args)
    memory.check_search(needs, args, [train_loader, valid_loader], device, len(candidates))
    torch.manual_seed(seeds.derive(args.seed, seed_roles.WEIGHTS, args.seed_scheme))
    network = Network(
        args.init_channels, args.num_cells, len(train.classes), track_running_stats=args.track_running_stats
    )
    network = network.to(device, memory_format=devices.memory_format(device))
    inputs = {
        "data": describe(train=train, valid=valid),
        "table": digest(args.api_path) if args.api_path else args.api_path,
        "split": digest(args.split_file) if args.split_file else args.split_file,
    }
    setup = SearchSetup(args, space, network, train_loader, valid_loader)
    search_cli.run_search(search, setup, parser.prog, inputs)


if __name__ == "__main__":
    main()
