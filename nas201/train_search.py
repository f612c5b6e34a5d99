"""Search for a cell of NAS-Bench-201 with EvNAS; the benchmark's table tells each generation's true accuracy."""

import argparse
from functools import partial

import numpy as np
import torch

from nas201 import benchmark, data, encoding, fast_search
from nas201.model_search import Network
from nas201.sources import COLUMNS, DATASETS, METRICS, SPLITS
from nas201.summary import finished
from support import devices, distributed, runs
from support.cli import command, number
from support.files import UserError, write_json
from train_search import SearchSpace, check_search, run_search, search_loaders, search_parser


def save_genotype(alphas, folder):
    write_json(folder / "genotype.json", {"arch": encoding.arch_string(alphas)})


def correlations(fitness, truth):
    """Kendall's tau-b and Spearman's rho of two lists; None where undefined. Entries without a truth are left out."""
    from scipy import stats

    pairs = np.array([pair for pair in zip(fitness, truth, strict=True) if pair[1] is not None])
    if len(pairs) < 2 or (np.ptp(pairs, axis=0) == 0).any():
        return None, None
    return float(stats.kendalltau(*pairs.T).statistic), float(stats.spearmanr(*pairs.T).statistic)


def report(table, truth, alphas, fitness):
    """What the benchmark says of a sorted population (P, 1, 6, 5) with fitness (P,): history fields and a log text."""
    indices = [table.index(encoding.arch_string(individual)) for individual in alphas]
    best = {name: {split: table.accuracy(indices[0], name, split) for split in SPLITS} for name in DATASETS}
    values = [truth and table.accuracy(index, *truth) for index in indices]
    tau, rho = correlations(fitness.tolist(), values)
    name = truth and " ".join(truth)
    fields = {"true_accuracy": best, "truth": name, "kendall_tau": tau, "spearman_rho": rho}
    shown = ["-" if value is None else f"{value:.{digits}f}" for value, digits in ((values[0], 2), (tau, 3), (rho, 3))]
    return fields, f"; {name or 'true'} accuracy of the best {shown[0]}, tau {shown[1]}, rho {shown[2]}"


def search_space(args):
    """The SearchSpace, which consults the benchmark where --api_path names one. Raises UserError."""
    space = SearchSpace(
        name="s2",
        encoding=encoding,
        fast=fast_search,
        cell=encoding.arch_string,
        genotype=encoding.arch_string,
        save_genotype=save_genotype,
        nesterov=args.momentum > 0,  # without momentum it is plain SGD, and torch refuses the word
    )
    if args.api_path:
        table = benchmark.load(args.api_path)
        dataset = args.api_dataset or (args.dataset if args.dataset in DATASETS else "cifar10")
        keys = zip(METRICS, COLUMNS, strict=True)  # of each data set validation first, then test
        present = [key for key, column in keys if key[0] == dataset and column not in table.absent]
        truth = present[0] if present else None  # with which fitness is compared
        space.report = partial(report, table, truth)
        known = f"{' '.join(truth)} accuracy after 200 epochs" if truth else "it has none for this data set"
        absent = f"; absent are {', '.join(table.absent)}" if table.absent else ""
        distributed.say(f"truth from {args.api_path}: {known}{absent}")
    return space


@command
def main(argv=None):
    defaults = dict(bn="running", valid_transform="test")
    parser = search_parser("python -m nas201.train_search", __doc__, data.DATASETS, **defaults)
    group = parser.add_argument_group("NAS-Bench-201")
    group.add_argument("--num_cells", type=number(int, 1), default=5, help="cells in each of the three stages")
    group.add_argument("--max_nodes", type=int, choices=[4], default=4, help="nodes of a cell, as in the benchmark")
    text = "BatchNorm of the searched cells keeps running statistics; --no-track_running_stats needs --bn batch"
    group.add_argument("--track_running_stats", action=argparse.BooleanOptionalAction, default=True, help=text)
    group.add_argument("--split_file", help="the benchmark's own index file for cifar10, cifar100 or ImageNet16-120")
    group.add_argument("--api_path", help="the benchmark: .csv, .csv.xz, .pth or a NATS-Bench directory")
    group.add_argument("--api_dataset", choices=DATASETS, help="compare with these accuracies (default: DATASET's own)")
    group.add_argument("--workers", type=number(int, 1), default=2, help="threads that read and check image files")
    args = runs.parse(parser, argv)
    check_search(args)
    if args.bn == "running" and not args.track_running_stats:
        raise UserError("--no-track_running_stats leaves no running statistics to measure with: add --bn batch")
    if args.resume and finished(args.resume):
        distributed.say(f"{args.resume} is finished")
        return
    device = devices.choose_device(args)
    space = search_space(args)
    train, valid, augmentation = data.search_splits(args)
    loaders = search_loaders(args, train, valid, augmentation, device)
    torch.manual_seed(args.seed)
    track = args.track_running_stats
    network = Network(args.init_channels, args.num_cells, len(train.classes), track_running_stats=track)
    network = network.to(device, memory_format=torch.channels_last)
    run_search(args, space, network, loaders, device, parser.prog)


if __name__ == "__main__":
    main()
