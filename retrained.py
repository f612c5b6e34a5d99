"""Which network to build, on which images, and how to test it: shared by train.py and the three test scripts."""

import argparse
import os
from pathlib import Path

import torch

import augment
import datasets
import genotype_files
import genotypes
import image_folder
import loaders
import nas201.model
import splits
import utils
from engine import evaluate
from model import NetworkCIFAR, NetworkImageNet
from nas201.genotypes import from_arch_string
from recipes import CIFAR, NAS201, RECIPES
from support import devices, distributed, weights
from support.cli import MOST, Parser, Published, number
from support.files import UserError
from support.images import open_image, to_rgb

ARCH = f"a named cell ({', '.join(genotypes.NAMED)}), or an arch string of NAS-Bench-201"


def choose_genotype(args, dir_first=False):
    """Return what --genotype, --arch or --dir names, and where it comes from. Raises UserError.

    It is a Genotype or, of NAS-Bench-201, an arch string. As in the published scripts, --arch goes before the cell in
    --dir, or with `dir_first` behind it.
    """
    if args.arch and args.genotype:
        raise UserError("--arch and --genotype both name a cell: leave one out")
    if args.genotype:
        return genotype_files.load(args.genotype), args.genotype
    if args.arch and not (dir_first and args.dir and genotype_files.files_in(args.dir)):
        arch = args.arch.strip()
        if arch.startswith("|"):
            from_arch_string(arch)  # says what is wrong with it
        return arch if arch.startswith("|") else genotypes.get(arch), f"--arch {args.arch}"
    if args.dir is None:
        raise UserError("no cell is named: give --arch NAME, --genotype FILE or --dir RUN_DIR")
    path = genotype_files.file_in(args.dir if dir_first else folder_of_cell(args.dir))
    return genotype_files.load(path), f"{path}, which goes before --arch {args.arch}" if args.arch else path


def folder_of_cell(run_dir):
    """Return the folder that has the cell of a retraining.

    It is the run itself. A published run has none, and was made in its search's folder (or that folder's cifar100/).
    """
    run_dir = Path(run_dir)
    if run_dir.resolve().name.startswith("eval-") and not genotype_files.files_in(run_dir):
        parent = run_dir.resolve().parent
        search = parent.parent if parent.name == "cifar100" else parent
        return search if genotype_files.files_in(search) else run_dir
    return run_dir


def choose_recipe(genotype, images):
    """Return the family of networks: NAS-Bench-201's for an arch string, else the one that the images need."""
    if isinstance(genotype, str):
        return "nas201"
    return "imagenet" if isinstance(images, splits.Files) else "cifar"


def choose_augmentation(genotype, dataset, images, about=None):
    """Return the Augmentation; arch strings have the benchmark's normalisation, and ImageNet16-120 no other."""
    return datasets.augmentation(dataset, images, about, nas201=isinstance(genotype, str))


def make_network(genotype, recipe, classes, image_size, args):
    """Make the network of a family for so many classes and images of (height, width) pixels. Raises UserError."""
    if args.auxiliary and recipe == "nas201":
        raise UserError("--auxiliary is not for arch strings: the benchmark's networks have no such head")
    if args.auxiliary and args.layers < 2:
        raise UserError("--auxiliary needs at least 2 --layers: the head stands behind the second reduction cell")
    side, features = (224, "7x7") if recipe == "imagenet" else (32, "8x8")
    if args.auxiliary and list(image_size) != [side, side]:
        found = "{1}x{0}".format(*image_size)
        raise UserError(f"--auxiliary needs images of {side}x{side} pixels ({features} features); these are {found}")
    if recipe == "imagenet" and args.init_channels % 2:
        raise UserError(f"--init_channels {args.init_channels}: ImageNet's networks need an even number of channels")
    splits.check_sides(image_size, 32 if recipe == "imagenet" else 4)
    if recipe == "nas201":
        return nas201.model.Network(args.init_channels, args.layers, classes, genotype)
    network = NetworkImageNet if recipe == "imagenet" else NetworkCIFAR
    return network(args.init_channels, classes, args.layers, args.auxiliary, genotype)


# ---- trained networks


def load_network(path, genotype, recipe, classes, image_size, args):
    """Make the network of the weights at `path`, on the CPU, and load them. Raises UserError.

    What `args` (the command line, or the weights' side file) say of its size is compared with the file's names and
    shapes first, on a network without storage: a wrong figure neither fills the memory nor builds for ever.
    """
    state = weights.read_state(path)
    cells = len({name.split(".")[1] for name in state if name.startswith("cells.")})
    needed = 3 * args.layers + 2 if recipe == "nas201" else args.layers
    if needed > cells:
        where = f'--layers, or "layers" in {weights.info_path(path)}'
        raise UserError(f"{path} holds no weights of this network: {cells} cells, not {needed} ({where}, is wrong)")
    with torch.device("meta"):
        network = make_network(genotype, recipe, classes, image_size, args)
    weights.load_state(network, state, path)
    return network


def saved_recipe(about, genotype, path):
    """Return the family of the network at `path`, or None if nothing says it. Raises UserError for another cell's."""
    size = about.get("image_size")
    older = size and ("imagenet" if size == [224, 224] else "cifar")  # when no family was saved
    recipe = about.get("family", older) or ("nas201" if isinstance(genotype, str) else None)
    if recipe and (recipe == "nas201") != isinstance(genotype, str):
        raise UserError(f"{path} holds a network of the recipe {recipe}, which has no cell {genotype!s:.80}")
    return recipe


def read_about(run_dir):
    """Return the weights file of a retraining, and what was saved about it.

    `run_dir` is the run's directory, whose last weights are taken, or a weights file. Raises UserError.
    """
    path = Path(run_dir)
    path = weights.locate(path / "weights.pt") if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{run_dir} holds no weights: give the directory of a retraining, or a weights file")
    about = weights.read_info(path)
    for name in ("genotype", "classes", "image_size", "mean", "std", "init_channels", "layers"):
        if name not in about:
            raise UserError(f"{weights.info_path(path)}, the file of a retraining beside its weights, has no {name}")
    return path, about


def load(run_dir):
    """Return the network of a retraining, in evaluation mode on the CPU, and the transform that makes its inputs.

    The transform takes a PIL image or the path of one and returns a tensor (3, H, W); network(x) of a batch of such
    returns (logits, None). `run_dir`: see `read_about`. Raises UserError.
    """
    path, about = read_about(run_dir)
    genotype = genotype_files.from_json(about["genotype"], weights.info_path(path))
    recipe, size = saved_recipe(about, genotype, path), about["image_size"]
    without_head = argparse.Namespace(**(about | {"auxiliary": False}))
    network = load_network(path, genotype, recipe, len(about["classes"]), size, without_head)
    normalisation = augment.Augmentation(about["mean"], about["std"])
    if recipe == "imagenet":
        steps = augment.imagenet_transform(normalisation, False, size[0])
    else:
        steps = augment.small_transform(normalisation, size)

    def transform(image):
        return steps(open_image(image) if isinstance(image, (str, os.PathLike)) else to_rgb(image))

    return network.eval(), transform


def test(prog, argv=None, default=CIFAR, batch_size=96):
    """Evaluate weights on the test split of a data set, print the figures and return them: all of a test script."""
    dataset = datasets.offered_by(prog)[0]
    parser = Parser(prog=prog, description=f"Test the weights of a retrained cell on {dataset}.")
    cell = parser.add_argument_group("cell and weights")
    cell.add_argument("--dir", help="a retraining's run directory: cell, size and (last) weights come from there")
    cell.add_argument("--model_path", help="a weights file")
    cell.add_argument("--arch", help=ARCH)
    cell.add_argument("--genotype", help="a genotype.json or genotype.pickle")
    for name, low, high in (("init_channels", 2, MOST.channels), ("layers", 1, MOST.cells)):
        text = f"(default: {getattr(default, name)}, for arch strings {getattr(NAS201, name)}, or what DIR says)"
        cell.add_argument(f"--{name}", type=number(int, low, high), help=text)
    cell.add_argument("--image_size", type=number(int, 4, MOST.pixels), help="as in training (default: what DIR says)")
    cell.add_argument("--init_channel", action=Published, instead="--init_channels {}")
    cell.add_argument("--auxiliary", action="store_true", help="the network has the auxiliary head")
    run = parser.add_argument_group("data and device")
    datasets.add_data_arguments(run, prog)
    run.add_argument("--batch_size", type=number(int, 1), default=batch_size, help="images at a time")
    run.add_argument(
        "--workers", type=number(int, 0, MOST.workers), default=4, help="processes that read large image files"
    )
    run.add_argument("--report_freq", type=number(int, 1), default=default.report_freq, help="batches a report")
    devices.add_device_arguments(run)
    run.add_argument("--cutout", "--cutout_length", "--drop_path_prob", "--seed", action=Published)
    parser.set_defaults(amp=False, compile=False)
    args = parser.parse_args(argv)

    if args.model_path is None and args.dir is None:
        raise UserError("no weights are named: give --model_path FILE or --dir RUN_DIR")
    args.model_path = weights.locate(args.model_path or Path(args.dir) / "weights.pt")
    about = weights.read_info(args.model_path)
    if args.dir is None and not args.arch and not args.genotype and "genotype" in about:
        source = weights.info_path(args.model_path)
        genotype = genotype_files.from_json(about["genotype"], source)
    else:
        genotype, source = choose_genotype(args)
    recipe = saved_recipe(about, genotype, args.model_path) or default.name
    if recipe not in (default.name, "nas201"):
        script = {"imagenet": "test_imagenet.py"}.get(recipe, "test_cifar.py")
        raise UserError(f"{args.model_path} holds a network of the recipe {recipe}: test it with {script}")
    saved = about | {"image_size": about["image_size"][0] if about.get("resized") and "image_size" in about else None}
    for name in ("init_channels", "layers", "image_size"):  # what was saved with the weights, then the paper's
        given, before = getattr(args, name), saved.get(name)
        if given is not None and before is not None and given != before:
            raise UserError(f"--{name} {given} differs from {before}, with which {args.model_path} was trained")
        setattr(args, name, given or before or getattr(RECIPES[recipe], name, None))
    args.auxiliary = args.auxiliary or bool(about.get("auxiliary"))
    device = devices.choose_device(args)

    args.data = datasets.find_folder(args.dataset, args.data)
    if recipe == "imagenet":
        images = datasets.list_files(args.dataset, args.data, "test", image_size=args.image_size)
    else:
        settings = dict(image_size=args.image_size, cache=args.image_cache)
        images = datasets.load_images(args.dataset, args.data, "test", **settings)
        hint = "give --image_size, or test a network for ImageNet with test_imagenet.py"
        image_folder.check_in_memory(images, hint)
    found = splits.describe(test=images)
    splits.check_alike(args.data, found, f"the training of {args.model_path}", found | about)
    train = images
    if datasets.DATASETS[args.dataset].normalisation is None and "mean" not in about and recipe != "imagenet":
        train = datasets.load_images(args.dataset, args.data, "train", **settings)  # to measure mean and std
    loader = loaders.make_loader(
        images, args.batch_size, choose_augmentation(genotype, args.dataset, train, about), device, workers=args.workers
    )
    network = load_network(args.model_path, genotype, recipe, len(images.classes), images.image_size, args)
    network = network.to(device, memory_format=devices.memory_format(device))

    distributed.say(f"{devices.describe_device(device)}; the cell of {source}")
    parameters = utils.parameters_in_millions(network)
    mult_adds = utils.mult_adds_in_millions(network, loader.image_shape)
    distributed.say(f"parameters {parameters:.2f} M, mult-adds {mult_adds:.1f} M")
    result = evaluate(network, loader, args, log=distributed.say)
    text = "top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f} on {images} images"
    distributed.say(text.format(**result, images=len(images)))
    return {**result, "parameters_M": parameters, "mult_adds_M": mult_adds}
