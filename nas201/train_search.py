"""Search for a cell of NAS-Bench-201 with EvNAS; the benchmark's table tells each generation's true accuracy."""

from support.cli import MOST, Published, command, number  # first: it ends Ctrl-C in one line

# isort: split

import argparse
import math
import os

import numpy as np
import torch

import memory
import splits
from augment import inside
from nas201 import benchmark, data, encoding, fast_search, model
from nas201.genotypes import EDGES, PRIMITIVES
from nas201.model_search import Network
from nas201.sources import COLUMNS, DATASETS, METRICS, SPLITS
from recipes import NAS201
from support import devices, distributed, runs, seeds
from support.files import UserError, digest, read_json
from train_search import SearchSpace, check_search, is_finished, run_search, search_loaders, search_parser

PUBLISHED_TABLE = "../NAS_Bench_201/NAS-Bench-201-v1_1-096897.pth"  # where searchNAS201.sh looked for it


def correlations(fitness, truth):
    """Return Kendall's tau-b and Spearman's rho of two lists, or None; entries without a truth are left out."""
    from scipy import stats

    pairs = np.array([pair for pair in zip(fitness, truth, strict=True) if pair[1] is not None])
    if len(pairs) < 2 or (np.ptp(pairs, axis=0) == 0).any():
        return None, None
    return float(stats.kendalltau(*pairs.T).statistic), float(stats.spearmanr(*pairs.T).statistic)


class S2(SearchSpace):
    """NAS-Bench-201; --api_path names the benchmark, which then tells what each generation's best is worth.

    `truth` is the (data set, split) of the benchmark with which fitness is compared, None where it has none.
    """

    name, encoding, fast, genotype_files = "s2", encoding, fast_search, ("genotype.json",)
    nesterov = True

    def __init__(self, args):
        self.table = args.api_path and benchmark.load(args.api_path)
        if self.table:
            dataset = args.api_dataset or (args.dataset if args.dataset in DATASETS else "cifar10")
            keys = zip(METRICS, COLUMNS, strict=True)  # of each data set validation first, then test
            present = (key for key, column in keys if key[0] == dataset and column not in self.table.absent)
            self.truth = next(present, None)
            known = f"{' '.join(self.truth)} accuracy after 200 epochs" if self.truth else "none for this data set"
            absent = f"; absent are {', '.join(self.table.absent)}" if self.table.absent else ""
            distributed.say(f"truth from {args.api_path}: {known}{absent}")

    def cell(self, alphas):
        return encoding.arch_string(alphas)

    def network(self, args, cell, classes):
        return model.Network(NAS201.init_channels, NAS201.layers, classes, cell)

    def cost_table(self, args, classes, image_shape):
        return model.cost_table(NAS201.init_channels, NAS201.layers, classes, image_shape)

    def worth(self, groups):
        """Return the winner's accuracies beside the benchmark's `baselines`, and how fitness ranks architectures."""
        if not self.table or self.table.table is None:  # a directory, whose records are read one by one
            return {}, ""
        winner = self.table.index(self.cell(groups["last population"][0][0]))
        fields, remarks = {"accuracy": benchmark.baselines(self.table, winner)}, ""
        if self.truth:
            fields |= {"truth": " ".join(self.truth), "kendall_tau": {}}
            for name, (alphas, fitness, parameters) in groups.items():
                indices = [self.table.index(self.cell(individual)) for individual in alphas]
                truth = [self.table.accuracy(index, *self.truth) for index in indices]
                tau = {"architectures": len(alphas), "fitness": correlations(fitness.tolist(), truth)[0]}
                fields["kendall_tau"][name] = tau | {"parameters": correlations(parameters.tolist(), truth)[0]}
            row = fields["accuracy"].get(COLUMNS[list(METRICS).index(self.truth)].removesuffix("_200"))
            if row:
                place = f"rank {row['beaten_by'] + 1:,} of {len(self.table):,}"
                remarks = f"; {row['accuracy']:.2f} % true accuracy ({fields['truth']}), {place}"
        return fields, remarks

    def report(self, alphas, fitness):
        if not self.table:
            return {}, ""
        indices = [self.table.index(self.cell(individual)) for individual in alphas]
        best = {name: {split: self.table.accuracy(indices[0], name, split) for split in SPLITS} for name in DATASETS}
        values = [self.truth and self.table.accuracy(index, *self.truth) for index in indices]
        tau, rho = correlations(fitness.tolist(), values)
        name = self.truth and " ".join(self.truth)
        fields = {"true_accuracy": best, "truth": name, "kendall_tau": tau, "spearman_rho": rho}
        value, tau, rho = (
            "-" if value is None else f"{value:.{digits}f}" for value, digits in ((values[0], 2), (tau, 3), (rho, 3))
        )
        return fields, f"; {name or 'true'} accuracy of the best {value}, tau {tau}, rho {rho}"


def check_config(path, args):
    """Compare a configuration file of the published search, JSON of {key: [type, value]}, with what will be used.

    Its schedule, epochs and batch size had no effect and are not compared, nor is what it does not name. Raises
    UserError for a file that cannot be read and for the first value that differs.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"--config_path {path} holds no JSON object of key: [type, value]")
    for key, flag in {"LR": "learning_rate", "momentum": "momentum", "decay": "weight_decay"}.items():
        value = config_value(path, content, key, float)
        if value is not None and value != getattr(args, flag):
            remedy = f"give --{flag} {value}, or leave --config_path out"
            raise UserError(f"--config_path {path}: {key} is {value}, but --{flag} is {getattr(args, flag)}; {remedy}")
    fixed = {
        "nesterov": (lambda text: bool(int(text)), [True]),
        "optim": (str, ["SGD"]),
        "criterion": (str, ["Softmax", "CrossEntropy", "CrossEntropyLoss"]),  # the first is the published name
    }
    for key, (convert, possible) in fixed.items():
        value = config_value(path, content, key, convert)
        if value is not None and value not in possible:
            used = f"a search uses {possible[0]}" if key != "nesterov" else "a search uses Nesterov momentum"
            raise UserError(f"--config_path {path}: {key} is {value}, but {used}; leave --config_path out")


def config_value(path, content, key, convert):
    """Return the value of `key` in a configuration file, or None if it is not there. Raises UserError."""
    if key not in content:
        return None
    entry = content[key]
    try:
        kind, value = entry
        if kind in ("str", "int", "float", "bool"):
            return convert(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f'--config_path {path}: "{key}" is {str(entry):.80}, not ["float", "0.025"] or alike')


def cutout_text(loader):
    """Return a line on what --cutout does here, unlike in the published search."""
    height, width = (inside(torch.arange(n), loader.cutout, n).float().mean() for n in loader.image_shape[1:])
    return (
        f"--cutout removes a square of {loader.cutout} pixels a side, on average {100 * height * width:.0f} % of each "
        "training image; in the published search it removed nothing: to repeat that search, leave --cutout out"
    )


@command
def main(argv=None):
    defaults = dict(bn="running", valid_transform="test", baselines=100)
    parser = search_parser("python -m nas201.train_search", __doc__, **defaults)
    group = parser.add_argument_group("NAS-Bench-201")
    group.add_argument(
        "--num_cells", type=number(int, 1, MOST.cells), default=5, help="cells in each of the three stages"
    )
    group.add_argument("--max_nodes", type=int, choices=[4], default=4, help="nodes of a cell, as in the benchmark")
    text = "BatchNorm of the searched cells keeps running statistics; else it always uses the batch's"
    group.add_argument("--track_running_stats", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = "the benchmark's own split, or one drawn from SEED (default: fixed for its three data sets)"
    group.add_argument("--split", choices=["fixed", "seeded"], help=text)
    group.add_argument("--split_file", help="an index file in the benchmark's format instead, for the same data sets")
    text = f"the benchmark: .csv, .csv.xz, .pth or a NATS-Bench directory (default: {PUBLISHED_TABLE} if there is one)"
    group.add_argument("--api_path", help=text)
    group.add_argument("--api_dataset", choices=DATASETS, help="compare with these accuracies (default: DATASET's own)")
    group.add_argument(
        "--workers", type=number(int, 1, MOST.workers), default=2, help="threads that read and check image files"
    )
    group.add_argument("--trainval", action=Published)
    text = "a configuration of the published search: stop if its optimizer or loss is not the one used here"
    group.add_argument("--config_path", metavar="FILE", default=argparse.SUPPRESS, help=text)
    args = runs.parse(parser, argv)
    check_search(args)
    if config_path := vars(args).pop("config_path", None):
        check_config(config_path, args)
    if is_finished(args, S2):
        return
    if args.api_path is None and not args.resume:
        if os.path.exists(PUBLISHED_TABLE):
            args.api_path = PUBLISHED_TABLE
        else:
            distributed.say(f"no true accuracies: {PUBLISHED_TABLE} is not there, and --api_path names no table")
    if args.resume and not args.split_file:
        args.split = args.split or "seeded"  # before there was --split
    device = devices.choose_device(args)
    runs.check_arguments_alike(args)
    space = S2(args)
    train, valid, augmentation = data.search_splits(args)
    loaders = search_loaders(args, train, valid, augmentation, device)
    if args.cutout:
        distributed.say(cutout_text(loaders[0]))
    everything = PRIMITIVES * len(EDGES)
    cells = memory.s2_cells(args.init_channels, args.num_cells, math.prod(train.image_size), everything)
    memory.check_search(memory.supernet("s2", cells, args), args, loaders, device, len(everything))
    torch.manual_seed(seeds.derive(args.seed, "weights", args.seed_scheme))
    track = args.track_running_stats
    network = Network(args.init_channels, args.num_cells, len(train.classes), track_running_stats=track)
    network = network.to(device, memory_format=devices.memory_format(device))
    bound = {"data": splits.describe(train=train, valid=valid)}
    bound |= {name: path and digest(path) for name, path in (("table", args.api_path), ("split", args.split_file))}
    run_search(args, space, network, loaders, device, parser.prog, bound)


if __name__ == "__main__":
    main()
