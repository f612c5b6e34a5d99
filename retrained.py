"""Retrained networks: choose the cell and the recipe, make the network, load its weights, test it.

`train.py`, the three test scripts, `predict.py` and `export.py` share this module.
"""

from support.cli import Parser, Published, number

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn

import augment
import class_results
import datasets
import genotype_files
import genotypes
import image_folder
import loaders
import nas201.model
import remembered
import shared_flags
import splits
import utils
from genotypes import Cell
from model import NetworkCIFAR, NetworkImageNet
from nas201.genotypes import from_arch_string
from recipes import CIFAR, NAS201, RECIPES, Recipe
from shared_flags import MOST
from support import devices, distributed, weights
from support.files import UserError
from support.images import open_image, to_rgb
from training import evaluate

Loader = loaders.Loader | loaders.FileLoader

# Help texts of flags that train.py and the test scripts have in common.
ARCH = f"name of a cell ({', '.join(genotypes.NAMED)}), or an arch string of NAS-Bench-201"
GENOTYPE = "file with a cell, genotype.json or genotype.pickle"


# ---- cell, recipe and network


class CellChoice(NamedTuple):
    """A cell, and the flag or file that the cell comes from."""

    cell: Cell
    source: str | Path


def choose_cell(args: argparse.Namespace, dir_first: bool = False) -> CellChoice:
    """Return the cell that --genotype, --arch or --dir names. Raises UserError.

    As in the published scripts, --arch takes precedence over the cell in --dir in a test. With
    `dir_first`, which retraining uses, the cell in --dir takes precedence over --arch.
    """
    if args.arch and args.genotype:
        raise UserError("--arch and --genotype both name a cell: leave one out")
    if args.genotype:
        return CellChoice(genotype_files.load(args.genotype), args.genotype)
    if args.arch and not (dir_first and args.dir and genotype_files.files_in(args.dir)):
        return CellChoice(parse_arch(args.arch), f"--arch {args.arch}")
    if args.dir is None:
        raise UserError("no cell is given: add --arch NAME, --genotype FILE or --dir RUN_DIR")
    path = genotype_files.file_in(args.dir if dir_first else folder_of_cell(args.dir))
    source = f"{path}, which takes precedence over --arch {args.arch}" if args.arch else path
    return CellChoice(genotype_files.load(path), source)


def parse_arch(text: str) -> Cell:
    """Return the cell that --arch names: a named cell, or an arch string, which begins with "|". Raises UserError."""
    arch = text.strip()
    if not arch.startswith("|"):
        return genotypes.get(arch)
    from_arch_string(arch)  # raises UserError if `arch` is not an arch string
    return arch


def folder_of_cell(run_dir: str | Path) -> Path:
    """Return the folder that holds the cell of a retraining: `run_dir`, or for published runs, the search's folder.

    The published scripts do not save the cell with a retraining. They make the retraining's
    directory inside the search's folder, or inside the folder cifar100 of the search's folder.
    """
    run_dir = Path(run_dir)
    full_path = run_dir.resolve()
    if not full_path.name.startswith("eval-") or genotype_files.files_in(run_dir):
        return run_dir
    parent = full_path.parent
    search = parent.parent if parent.name == "cifar100" else parent
    return search if genotype_files.files_in(search) else run_dir


def choose_recipe(cell: Cell, images: splits.Split) -> str:
    """Return the name of the recipe: "nas201" for an arch string, else "imagenet" for Files and "cifar" for Images."""
    if isinstance(cell, str):
        return "nas201"
    return "imagenet" if isinstance(images, splits.Files) else "cifar"


def choose_augmentation(
    cell: Cell, dataset: str, images: splits.Split | None, about: dict | None = None
) -> augment.Augmentation:
    """Return how the images of a data set are normalised and augmented.

    Arch strings use NAS-Bench-201's normalisation. ImageNet16-120 has no other normalisation. For
    your own images, mean and std come from `about` (see `find_weights`), or from `images`.
    """
    return datasets.augmentation(dataset, images, about, nas201=isinstance(cell, str))


@dataclass(frozen=True)
class NetworkSettings:
    """Everything that determines a network."""

    cell: Cell
    recipe: str  # a name in RECIPES
    classes: int
    image_size: Sequence[int]  # (height, width), pixels
    init_channels: int
    layers: int
    auxiliary: bool = False


def check_settings(settings: NetworkSettings) -> None:
    """Raise UserError if a network cannot have these settings."""
    imagenet = settings.recipe == "imagenet"
    if settings.auxiliary:
        if settings.recipe == "nas201":
            raise UserError("--auxiliary is not for arch strings, whose networks have no auxiliary head: leave it out")
        if settings.layers < 2:
            raise UserError("--auxiliary needs at least 2 --layers: the head follows the second reduction cell")
        side = 224 if imagenet else 32
        if list(settings.image_size) != [side, side]:
            height, width = settings.image_size
            raise UserError(f"--auxiliary needs images of {side}x{side} pixels, but these are {width}x{height}")
    if imagenet and settings.init_channels % 2:
        raise UserError(
            f"--init_channels {settings.init_channels}: networks for ImageNet need an even number of channels"
        )
    splits.check_sides(settings.image_size, 32 if imagenet else 4)


def make_network(settings: NetworkSettings) -> nn.Module:
    """Make a network whose forward pass returns (logits, logits_aux). Raises UserError for impossible settings."""
    check_settings(settings)
    cell = settings.cell
    classes = settings.classes
    if settings.recipe == "nas201":
        return nas201.model.Network(settings.init_channels, settings.layers, classes, cell)
    network = NetworkImageNet if settings.recipe == "imagenet" else NetworkCIFAR
    return network(settings.init_channels, classes, settings.layers, settings.auxiliary, cell)


# ---- trained networks


class SavedWeights(NamedTuple):
    """A weights file of a retraining, and the content of the JSON file next to it."""

    path: Path
    about: dict


# ---- the JSON file next to the weights


def is_whole(value: object, most: int) -> bool:
    """Return whether `value` is an int from 1 to `most`."""
    return type(value) is int and 0 < value <= most


def are_sides(values: object) -> bool:
    """Return whether `values` can be the height and width of an image, in pixels."""
    return isinstance(values, list) and len(values) == 2 and all(is_whole(side, MOST.pixels) for side in values)


def are_channels(values: object) -> bool:
    """Return whether `values` can be the mean or the standard deviation of three channels."""
    return isinstance(values, list) and len(values) == 3 and all(type(v) is float and abs(v) < 1e3 for v in values)


# Checks of the fields in the JSON file next to the weights. A file with an impossible value is
# refused.
POSSIBLE = {
    "init_channels": lambda value: is_whole(value, MOST.channels),
    "layers": lambda value: is_whole(value, MOST.cells),
    "auxiliary": lambda value: isinstance(value, bool),
    "family": lambda value: value in list(RECIPES),  # a list, because the value may not be hashable
    "resized": lambda value: isinstance(value, bool),
    "classes": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "image_size": are_sides,
    "mean": are_channels,
    "std": lambda value: are_channels(value) and min(value) > 0,
}


def read_info(path: str | os.PathLike) -> dict:
    """Read and check the JSON file next to the weights at `path`; see `weights.read_info`.

    Raises UserError, for example for a value that no network or normalisation can have.
    """
    about = weights.read_info(path)
    for name, value in about.items():
        if name in POSSIBLE and not POSSIBLE[name](value):
            raise UserError(f'{weights.info_path(path)}: "{name}" cannot be {str(value)[:80]!r}')
    return about


def find_weights(run_dir: str | Path) -> SavedWeights:
    """Return the last weights in the directory of a retraining. `run_dir` can also be a weights file.

    Raises UserError if there are no weights, or if no JSON file describes them.
    """
    path = Path(run_dir)
    remembered.check_retraining(path)
    if path.is_dir():
        path = Path(weights.locate(path / "weights.pt"))
    if not path.is_file():
        raise UserError(f"{run_dir} holds no weights: give the directory of a retraining, or a weights file")
    about = read_info(path)
    for name in ("family", "genotype", "classes", "image_size", "mean", "std", "init_channels", "layers"):
        if name not in about:
            raise UserError(
                f'{path}: nothing describes its network, because {weights.info_path(path)} has no "{name}". '
                "Give weights that train.py has written"
            )
    return SavedWeights(path, about)


def saved_recipe(about: dict, cell: object, path: str | Path) -> str | None:
    """Return the recipe of the network whose weights are at `path`, or None if the recipe was not saved.

    `cell` is a cell or its JSON form. Raises UserError if the recipe is not possible for this cell.
    """
    is_arch = isinstance(cell, str)
    recipe = about.get("family") or ("nas201" if is_arch else None)
    if recipe and (recipe == "nas201") != is_arch:
        raise UserError(f"{path} was trained with the recipe {recipe}, which is not for the cell {cell!s:.80}")
    return recipe


def load_network(path: str | Path, settings: NetworkSettings) -> nn.Module:
    """Make a network on the CPU and load the weights at `path` into it.

    The settings can be wrong, because they come from the command line or from the JSON file next to
    the weights. So the network is first made without memory, and compared with the names and shapes
    in the weights file. Otherwise a wrong number of channels could fill the memory, and a wrong
    number of layers could build cells forever. Raises UserError if the weights belong to another
    network.
    """
    state = weights.read_state(path)
    found = len({name.split(".")[1] for name in state if name.startswith("cells.")})
    # NAS-Bench-201: three stages of cells, with a residual block between two stages
    needed = 3 * settings.layers + 2 if settings.recipe == "nas201" else settings.layers
    if needed > found:
        raise UserError(
            f"{path} holds no weights of this network: the file has {found} cells, the network {needed}. "
            f'Correct --layers, or "layers" in {weights.info_path(path)}'
        )
    with torch.device("meta"):
        network = make_network(settings)
    weights.load_state(network, state, path, optional=("auxiliary_head.",))
    return network


def load(run_dir: str | Path) -> tuple[nn.Module, Callable]:
    """Return the network of a retraining, in evaluation mode on the CPU, and the transform that makes its inputs.

    `run_dir` is the directory of a retraining, or a weights file. The transform takes a PIL image
    or the path of an image file, and returns a tensor (3, H, W). `network(x)` takes a batch (B, 3,
    H, W) of such tensors and returns (logits, None). Raises UserError.
    """
    path, about = find_weights(run_dir)
    cell = genotype_files.from_json(about["genotype"], weights.info_path(path))
    settings = NetworkSettings(
        cell=cell,
        recipe=saved_recipe(about, cell, path),
        classes=len(about["classes"]),
        image_size=about["image_size"],
        init_channels=about["init_channels"],
        layers=about["layers"],
    )
    network = load_network(path, settings)
    normalisation = augment.Augmentation(about["mean"], about["std"])
    if settings.recipe == "imagenet":
        to_input = augment.imagenet_transform(normalisation, False, settings.image_size[0])
    else:
        to_input = augment.small_transform(normalisation, settings.image_size)

    def transform(image: Image.Image | str | os.PathLike) -> torch.Tensor:
        is_path = isinstance(image, (str, os.PathLike))
        return to_input(open_image(image) if is_path else to_rgb(image))

    return network.eval(), transform


# ---- the test scripts


def test(
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    *,
    recipe: Recipe = CIFAR,
    batch_size: int = 96,
) -> dict:
    """Run a test script: test weights on the test images of a data set.

    `prog` is the script's name, which also determines the data sets that it offers: see
    `datasets.offered_by`. `description` is the script's description in its help. `recipe` has the
    defaults for weights without a JSON file. Prints the results and returns them: see `run_test`.
    Raises UserError.
    """
    parser = make_test_parser(prog, description, recipe, batch_size)
    args = parser.parse_args(remembered.with_flags_of_run(parser, argv))
    return run_test(resolve_test(args, recipe))


def make_test_parser(prog: str, description: str, recipe: Recipe, batch_size: int) -> Parser:
    """Return the parser of a test script; the arguments are those of `test`."""
    parser = Parser(prog=prog, description=description)
    group = parser.add_argument_group("cell and weights")
    text = "directory of a retraining; its cell, network size, last weights and images are the defaults"
    group.add_argument("--dir", metavar="RUN_DIR", help=text)
    text = "weights file to test, such as a published one, or weights/best_weights.pt in RUN_DIR"
    group.add_argument("--model_path", metavar="FILE", help=text)
    group.add_argument("--arch", metavar="CELL", help=ARCH)
    group.add_argument("--genotype", metavar="FILE", help=GENOTYPE)

    def default(name: str) -> str:
        values = f"{getattr(recipe, name)}, or {getattr(NAS201, name)} for arch strings"
        return f"(default: as in training; if that was not saved, {values})"

    text = f"channels of the network's first cells {default('init_channels')}"
    shared_flags.add_init_channels(group, text, low=2)
    text = f"cells of the network; for arch strings, cells in each of its three stages {default('layers')}"
    group.add_argument("--layers", type=number(int, 1, MOST.cells), metavar="N", help=text)
    text = "resize and crop the images of a folder to this many pixels a side (default: as in training)"
    shared_flags.add_image_size(group, text)
    text = "build the network with its auxiliary head; the results do not change"
    group.add_argument("--auxiliary", action="store_true", help=text)

    group = parser.add_argument_group("data and device")
    datasets.add_data_arguments(group, prog)
    text = "images in a forward pass; lower it if memory runs out"
    group.add_argument("--batch_size", type=number(int, 1), default=batch_size, metavar="N", help=text)
    shared_flags.add_workers(group)
    text = "number of batches between two progress lines"
    group.add_argument("--report_freq", type=number(int, 1), default=recipe.report_freq, metavar="N", help=text)
    devices.add_device_arguments(group)
    group.add_argument("--cutout", "--cutout_length", "--drop_path_prob", "--seed", action=Published)
    parser.set_defaults(amp=False, compile=False)
    return parser


class TestJob(NamedTuple):
    """Everything that a test script needs to know about the test that it runs."""

    args: argparse.Namespace  # all defaults filled in
    cell: Cell
    source: str | Path  # the flag or file that the cell comes from
    recipe: str  # a name in RECIPES
    about: dict  # content of the JSON file next to the weights, {} if there is no such file


def resolve_test(args: argparse.Namespace, recipe: Recipe) -> TestJob:
    """Fill in the arguments that were not given: from the JSON file next to the weights, else from `recipe`.

    Raises UserError for arguments that contradict the JSON file.
    """
    if args.model_path is None and args.dir is None:
        raise UserError("no weights are given: add --model_path FILE or --dir RUN_DIR")
    if args.model_path is None:
        remembered.check_retraining(args.dir)
    args.model_path = weights.locate(args.model_path or Path(args.dir) / "weights.pt")
    about = read_info(args.model_path)
    if args.dir is None and not args.arch and not args.genotype and "genotype" in about:
        source = weights.info_path(args.model_path)
        cell = genotype_files.from_json(about["genotype"], source)
    else:
        cell, source = choose_cell(args)

    name = saved_recipe(about, cell, args.model_path) or recipe.name
    if name not in (recipe.name, "nas201"):
        script = "test_imagenet.py" if name == "imagenet" else "test_cifar.py"
        raise UserError(f"{args.model_path} was trained with the recipe {name}: test it with {script}")

    saved = {field: about.get(field) for field in ("init_channels", "layers")}
    resized = about.get("resized") and "image_size" in about
    saved["image_size"] = about["image_size"][0] if resized else None
    for field, in_training in saved.items():
        given = getattr(args, field)
        if given is not None and in_training is not None and given != in_training:
            raise UserError(
                f"--{field} {given}: {args.model_path} was trained with {in_training}; leave the argument out"
            )
        setattr(args, field, given or in_training or getattr(RECIPES[name], field, None))
    args.auxiliary = args.auxiliary or bool(about.get("auxiliary"))
    args.data = datasets.find_folder(args.dataset, args.data)
    return TestJob(args, cell, source, name, about)


def run_test(job: TestJob) -> dict:
    """Test a network, print the results and return them. Raises UserError.

    The results are a dictionary: "loss" is the mean cross-entropy, "top1" and "top5" are in
    percent, and "parameters_M" and "mult_adds_M" are in millions.
    """
    args = job.args
    device = devices.choose_device(args)
    loader, classes = load_test_images(job, device)
    settings = NetworkSettings(
        cell=job.cell,
        recipe=job.recipe,
        classes=len(classes),
        image_size=loader.image_shape[1:],
        init_channels=args.init_channels,
        layers=args.layers,
        auxiliary=args.auxiliary,
    )
    network = load_network(args.model_path, settings)
    network = network.to(device, memory_format=devices.memory_format(device))

    distributed.say(f"{devices.device_text(device)}; cell from {job.source}")
    parameters = utils.parameters_in_millions(network)
    mult_adds = utils.mult_adds_in_millions(network, loader.image_shape)
    distributed.say(f"parameters {parameters:.2f} M, mult-adds {mult_adds:.1f} M")
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    result = evaluate(network, loader, args, log=distributed.say, confusion=confusion)
    for line in class_results.lines(classes, confusion):
        distributed.say(line)
    distributed.say(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} on {loader.size} images"
    )
    if args.dir is not None:
        files = {"weights": args.model_path, "dataset": args.dataset}
        class_results.save(args.dir, result, classes, confusion, **files)
    return {**result, "parameters_M": parameters, "mult_adds_M": mult_adds}


def load_test_images(job: TestJob, device: torch.device) -> tuple[Loader, list[str]]:
    """Return the loader of the test images, and the names of their classes.

    Raises UserError if the images do not fit the network: if their classes or their size differ, or
    if they are too large.
    """
    args = job.args
    about = job.about
    if job.recipe == "imagenet":
        images = datasets.list_files(args.dataset, args.data, "test", image_size=args.image_size)
    else:
        settings = dict(image_size=args.image_size, cache=args.image_cache)
        images = datasets.load_images(args.dataset, args.data, "test", **settings)
        hint = "give --image_size, or test a network for ImageNet with test_imagenet.py"
        image_folder.check_in_memory(images, hint)
    found = splits.describe(test=images)
    splits.check_alike(args.data, found, f"the training of {args.model_path}", found | about)

    # Your own images are normalised with the mean and std that were saved with the weights. If none
    # were saved, the mean and std of the training images are used.
    measured = datasets.DATASETS[args.dataset].normalisation is None and isinstance(images, splits.Images)
    statistics_of = images
    if measured and "mean" not in about:
        statistics_of = datasets.load_images(args.dataset, args.data, "train", **settings)
    augmentation = choose_augmentation(job.cell, args.dataset, statistics_of, about)
    loader = loaders.make_loader(images, args.batch_size, augmentation, device, workers=args.workers)
    return loader, images.classes
