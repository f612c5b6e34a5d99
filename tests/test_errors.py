"""Bad input ends in one line on stderr, exit code 2, and nothing half-written."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

import datasets
import genotype_files
import genotypes
import nas201.train_search
import search_cli
import splits
import test_cifar
import test_cifar100
import test_imagenet
import train
import train_search
from model import NetworkCIFAR
from reporting import report
from support import cli, devices, files, weights
from views import VIEWS

import helpers
from helpers import reported_run

SEARCH = "--dataset digits --init_channels 2 --layers 2 --pop_size 2 --tsize 2 --epochs 1 --train_samples 64".split()
TRAIN = "--dataset digits --init_channels 2 --layers 3 --epochs 1 --train_samples 96".split()
TEST = "--dataset digits --init_channels 2 --layers 3".split()
EVNASA = ["--arch", "EvNASA"]


def save_weights(path, genotype=genotypes.EvNASA, classes=10, C=2, layers=3):
    torch.save(NetworkCIFAR(C, classes, layers, False, genotype).state_dict(), path)
    return path


class Hostile:
    """Its pickle calls os.mkdir."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def weights_argv(path="w.pt"):
    """The command line of a test of the weights in a file."""
    return [*TEST, *EVNASA, "--model_path", path]


# ---- cells


@pytest.mark.parametrize("main, argv", [(train.main, TRAIN), (test_cifar.main, [*TEST, "--model_path", "w.pt"])])
def test_unknown_architecture_is_refused_with_the_known_ones(fails, main, argv):
    fails(main, [*argv, "--arch", "EvNASZ"], "'EvNASZ'", *genotypes.NAMED)


@pytest.mark.parametrize(
    "pair, named",
    [
        (["conv_9x9", 0], ["normal[3]", "'conv_9x9'"]),
        (["sep_conv_3x3", 3], ["normal[3]", "input 3;", "0 to 2"]),
        (["sep_conv_3x3", -1], ["normal[3]", "input -1"]),
        ("sep_conv_3x3", ["normal[3]", "'sep_conv_3x3'"]),
    ],
    ids=["operation", "input", "negative input", "no pair"],
)
@pytest.mark.parametrize("where", ["--genotype", "--dir"])
def test_impossible_genotype_is_refused_by_its_place(fails, tmp_path, pair, named, where):
    cell = genotype_files.to_dict(genotypes.EvNASA)
    cell["normal"][3] = pair
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps(cell))
    fails(train.main, [*TRAIN, where, path if where == "--genotype" else tmp_path], path, *named)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"normal": []}', "\0\xff"])
def test_damaged_genotype_is_refused_by_name(fails, tmp_path, content):
    (tmp_path / "genotype.json").write_text(content, encoding="latin-1")
    fails(train.main, [*TRAIN, "--genotype", "genotype.json"], "genotype.json")


def test_genotype_that_calls_anything_is_refused_and_calls_nothing(fails, tmp_path):
    (tmp_path / "genotype.pickle").write_bytes(pickle.dumps(Hostile()))
    fails(train.main, [*TRAIN, "--genotype", "genotype.pickle"], "genotype.pickle", "mkdir")
    assert not (tmp_path / "executed").exists()


def test_weights_that_call_anything_are_refused_and_call_nothing(fails, tmp_path):
    torch.save({"stem.0.weight": Hostile()}, tmp_path / "w.pt")
    fails(test_cifar.main, weights_argv(), "w.pt", "mkdir")
    assert not (tmp_path / "executed").exists()


def test_no_cell_or_two_are_refused_with_the_flags(fails, tmp_path):
    fails(train.main, TRAIN, "--arch", "--genotype", "--dir")
    fails(train.main, [*TRAIN, *EVNASA, "--genotype", "genotype.json"], "--arch", "--genotype")
    fails(train.main, [*TRAIN, "--dir", tmp_path], tmp_path, "genotype.json", "genotype.pickle")
    fails(train.main, [*TRAIN, "--genotype", "missing.json"], "missing.json")


# ---- weights


@pytest.mark.parametrize(
    "changed, named",
    [
        (dict(genotype=genotypes.EvNASB), ["cells.0._ops.3.op.1.weight"]),
        (dict(classes=7), ["classifier.weight is (7, 32), not (10, 32)", "classifier.bias is (7,), not (10,)"]),
        (dict(C=4), ["stem.0.weight is (12, 3, 3, 3), not (6, 3, 3, 3)"]),
        (dict(layers=4), ["cells.3.preprocess0.conv_1.weight"]),
    ],
    ids=["cell", "classes", "channels", "layers"],
)
def test_weights_of_another_network_are_refused_with_the_difference(fails, tmp_path, changed, named):
    save_weights(tmp_path / "w.pt", **changed)
    fails(test_cifar.main, weights_argv(), "w.pt", *named)


def strange(value, kind):
    """A tensor of the shape of `value` that stands for no weights, or {a name: value} beside it."""
    if kind == "nested":
        return torch.nested.nested_tensor([value[0], value[0]])
    makers = {
        "sparse": lambda: value.to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "without values": lambda: value.to("meta"),
        "complex": lambda: value.to(torch.complex64),
        "int8": lambda: value.to(torch.int8),
        "bool": lambda: value > 0,
        "not finite": lambda: value / 0,
    }
    return makers[kind]()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["sparse", "nested", "quantised", "without values", "complex", "int8", "bool", "not finite"]
)
def test_tensor_that_stands_for_no_weights_is_refused_by_name(fails, tmp_path, kind):
    path, name = save_weights(tmp_path / "w.pt"), "classifier.weight"
    state = torch.load(path)
    torch.save({**state, name: strange(state[name], kind)}, path)
    fails(test_cifar.main, weights_argv(), "w.pt", *([] if kind == "nested" else [name]))


def test_weights_that_are_there_twice_are_refused_by_name(fails, tmp_path):
    path, name = save_weights(tmp_path / "w.pt"), "classifier.weight"
    state = torch.load(path)
    torch.save({**state, f"module.{name}": state[name] + 1}, path)
    fails(test_cifar.main, weights_argv(), "w.pt", name)


@pytest.mark.parametrize(
    "changed",
    [
        {"init_channels": "2"},
        {"layers": -1},
        {"layers": True},
        {"mean": [0.5]},
        {"std": [0.1, 0.1, 0.0]},
        {"image_size": 8},
        {"mean": [0.5, "0.5", 0.5]},
        {"classes": "ten"},
        {"family": []},
        {"family": "s1"},
        {"auxiliary": 1},
        {"init_channels": 10**9},
    ],
    ids=str,
)
def test_impossible_value_in_the_side_file_is_refused_by_its_name(fails, tmp_path, changed):
    path = save_weights(tmp_path / "w.pt")
    about = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **changed}
    path.with_suffix(".json").write_text(json.dumps(about))
    fails(test_cifar.main, weights_argv(), "w.json", *changed)


@pytest.mark.parametrize("length", [0, 100, -100])
def test_truncated_weights_are_refused_by_name(fails, tmp_path, length):
    path = save_weights(tmp_path / "w.pt")
    path.write_bytes(path.read_bytes()[:length])
    fails(test_cifar.main, weights_argv(), "w.pt")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"a": "text"}}, torch.zeros(3)])
def test_file_without_a_state_dict_is_refused_by_name(fails, tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    fails(test_cifar.main, weights_argv(), "w.pt")


def test_missing_weights_are_refused_with_the_flags_or_the_file(fails, tmp_path):
    fails(test_cifar.main, [*TEST, *EVNASA], "--model_path", "--dir")
    fails(test_cifar.main, weights_argv(), "w.pt")
    fails(test_cifar.main, [*TEST, *EVNASA, "--dir", tmp_path], tmp_path, "weights.pt")


@pytest.fixture(scope="module")
def trained(quick_reports, tmp_path_factory):
    """The weights of a network that was trained on the digits."""
    folder = tmp_path_factory.mktemp("trained")
    train.main([*TRAIN, *EVNASA, "--dir", str(folder), "--save", "/checkpoints/last/"])  # as published: of a path
    return next(folder.glob("eval-last-*/weights/weights.pt"))


def test_size_that_differs_from_the_side_file_is_refused(fails, trained):
    argv = ["--dataset", "digits", "--layers", "4", "--model_path", trained]
    fails(test_cifar.main, argv, "--layers 4", "trained with 3")


def test_classes_that_differ_from_the_side_file_are_refused(fails, trained, make_images):
    root = make_images("test", 1, [(8, 8)])
    argv = ["--dataset", "folder", "--data", root, "--model_path", trained]
    fails(test_cifar.main, argv, trained, "ant, bee, cat", "0, 1, 2, ...")


def test_images_that_differ_from_the_side_file_are_refused(fails, trained, make_images):
    root = make_images("val", 1, [(16, 16)], classes=[str(i) for i in range(10)])
    argv = ["--dataset", "folder", "--data", root, "--model_path", trained]
    fails(test_cifar.main, argv, root, "16x16", "8x8", trained)


# ---- data

MAINS = [
    (train_search.main, SEARCH),
    (train.main, [*TRAIN, *EVNASA]),
    (test_cifar.main, weights_argv()),
    (test_cifar100.main, weights_argv()),
]


@pytest.mark.parametrize("main, argv", MAINS)
def test_missing_data_are_refused_with_the_folder(fails, tmp_path, main, argv):
    folder = ["--dataset", "folder", "--data"]
    fails(main, [*argv, *folder, "nowhere"], "data directory nowhere")
    (tmp_path / "empty").mkdir()
    fails(main, [*argv, *folder, "empty"], "data directory empty", "folder t")


@pytest.mark.parametrize("main, argv", MAINS[:3])
def test_damaged_image_and_empty_class_are_refused_by_name(fails, make_images, main, argv):
    root = make_images("train", 2, [(8, 8)])
    make_images("test", 2, [(8, 8)])
    argv = [*argv, "--dataset", "folder", "--data", root]
    split = "test" if main is test_cifar.main else "train"
    image = root / split / "bee/1.jpg"
    whole = image.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        image.write_bytes(content)
        fails(main, argv, image)
    for path in (root / split / "bee").iterdir():
        path.unlink()
    fails(main, argv, root / split / "bee")


def test_missing_imagenet_is_refused_with_the_folder(fails, tmp_path):
    argv = [*EVNASA, "--dataset", "imagenet", "--data", tmp_path]
    fails(train.main, argv, tmp_path, "folder train")
    fails(test_imagenet.main, [*argv, "--model_path", "w.pt"], tmp_path, "folder val")
    (tmp_path / "val").mkdir()
    fails(test_imagenet.main, [*argv, "--model_path", "w.pt"], tmp_path / "val")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_photograph_is_refused_by_name(fails, make_images, workers):
    root = make_images("val", 2, [(80, 70)])
    make_images("train", 2, [(80, 70)])
    image = root / "train/bee/1.jpg"
    image.write_bytes(image.read_bytes()[:-300])
    argv = [*EVNASA, "--dataset", "imagenet", "--data", root, "--batch_size", "6", "--workers", workers]
    fails(train.main, [*argv, "--init_channels", "4", "--layers", "3"], image, new_files=True)


def test_splits_of_different_classes_are_refused_with_the_classes(fails, make_images):
    root = make_images("train", 2, [(8, 8)])
    make_images("test", 2, [(8, 8)], classes=("ant", "bee", "cow"))
    argv = [*TRAIN, *EVNASA, "--dataset", "folder", "--data", root]
    line = fails(train.main, argv, "training images: cat;", "images: cow")
    assert "ant" not in line.replace(str(root), "")


def test_splits_of_different_sizes_are_refused_with_the_sizes(fails, make_images):
    root = make_images("train", 2, [(8, 8)])
    make_images("test", 2, [(16, 12)])
    argv = [*TRAIN, *EVNASA, "--dataset", "folder", "--data", root]
    fails(train.main, argv, "8x8 pixels in the training images", "16x12 pixels in the test images")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_that_cannot_be_downloaded_is_refused_with_the_reason(fails, monkeypatch, dataset):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    argv = ["--dataset", dataset, "--data", "no/where"]
    fails(train_search.main, argv, f"{dataset} is not in no/where", "no network")


def test_more_images_than_there_are_are_refused_with_the_numbers(fails):
    fails(train_search.main, [*SEARCH, "--train_portion", "0.1", "--train_samples", "700"], "700 images")
    fails(train.main, [*TRAIN, *EVNASA, "--train_samples", "1438"], "1438 images", "1437")


# ---- arguments


def test_population_smaller_than_its_parts_is_refused(fails):
    fails(train_search.main, [*SEARCH, "--tsize", "3"], "--tsize 3", "--pop_size 2")
    fails(train_search.main, [*SEARCH, "--num_elites", "3"], "--num_elites 3", "--pop_size 2")


def test_batch_larger_than_the_split_is_refused(fails):
    fails(train_search.main, [*SEARCH, "--batch_size", "65"], "--batch_size 65", "64 images")
    fails(train.main, [*TRAIN, *EVNASA, "--batch_size", "97"], "--batch_size 97", "96 images")


def test_auxiliary_head_for_small_images_is_refused_with_their_size(fails, tmp_path):
    fails(train.main, [*TRAIN, *EVNASA, "--auxiliary"], "--auxiliary", "32x32", "8x8")
    save_weights(tmp_path / "w.pt")
    fails(test_cifar.main, [*weights_argv(), "--auxiliary"], "--auxiliary", "32x32")


def test_auxiliary_head_of_one_layer_or_one_image_is_refused(fails, make_images):
    root = make_images("train", 3, [(32, 32)])
    make_images("test", 1, [(32, 32)])
    argv = [*EVNASA, "--dataset", "folder", "--data", root, "--auxiliary", "--init_channels", "2"]
    fails(train.main, [*argv, "--layers", "1", "--batch_size", "9"], "--auxiliary", "--layers")
    line = fails(train.main, [*argv, "--layers", "3", "--batch_size", "4"], "--auxiliary", "--batch_size")
    assert "--layers" not in line


def test_cutout_of_large_images_is_refused(fails, make_images):
    root = make_images("train", 2, [(80, 70)])
    make_images("test", 1, [(80, 70)])
    argv = [*TRAIN, *EVNASA, "--dataset", "folder", "--data", root, "--train_samples", "6", "--batch_size", "6"]
    fails(train.main, [*argv, "--cutout"], "--cutout")


def test_search_on_large_images_is_refused_with_their_size(fails, make_images):
    root = make_images("train", 2, [(80, 70)])
    argv = [*SEARCH, "--dataset", "folder", "--data", root]
    fails(train_search.main, argv, "64 pixels", f"{root}/train/ant/0.jpg is 80x70")


@pytest.mark.parametrize("main, argv", MAINS[:3])
def test_image_of_another_size_is_refused_with_both_sizes(fails, make_images, main, argv):
    """In the same words by whatever reads the images."""
    split = "test" if main is test_cifar.main else "train"
    root = make_images("train", 4, [(8, 12)])
    make_images("test", 4, [(8, 12)])
    odd = root / split / "bee/2.jpg"
    argv = [*argv, "--dataset", "folder", "--data", root]
    for width, height in ((8, 8), (12, 8), (80, 120)):
        Image.new("RGB", (width, height)).save(odd)
        found = f"{odd} is {width}x{height} pixels, but 11 of 12 images in {root / split} are 8x12"
        fails(main, argv, found)


def test_one_odd_image_in_ten_is_a_mistake_and_two_are_a_choice(fails, make_images):
    root = make_images("train", 4, [(8, 12)])
    (root / "train/ant/0.jpg").unlink()
    (root / "train/bee/2.jpg").unlink()
    Image.new("RGB", (16, 16)).save(root / "train/cat/3.jpg")
    argv = [*SEARCH, "--dataset", "folder", "--data", root]
    fails(train_search.main, argv, "cat/3.jpg is 16x16 pixels, but 9 of 10 images")
    Image.new("RGB", (16, 16)).save(root / "train/cat/2.jpg")
    assert isinstance(datasets.load_images("folder", root, "train"), splits.Files)


@pytest.mark.parametrize("link", ["train/dog", "train/ant/5.png"])
def test_link_to_nothing_is_refused_by_name(fails, make_images, link):
    root = make_images("train", 3, [(8, 8)])
    (root / link).symlink_to("nowhere")
    fails(train_search.main, [*SEARCH, "--dataset", "folder", "--data", root], root / link, "No such file or directory")


@pytest.fixture
def card(monkeypatch):
    """Stands in for a GPU without bfloat16, with tensors on the CPU."""
    about = dict(set_device=lambda device: None, get_device_name=lambda device: "Tesla T4")
    about["is_bf16_supported"] = lambda including_emulation=True: including_emulation
    for name, value in about.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("allow_tf32", "benchmark"):  # to be put back
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, lambda *size, device: torch.ones(size))


def test_card_without_bfloat16_is_refused_by_name(card, fails):
    fails(train_search.main, [*SEARCH, "--device", "cuda", "--amp"], "--amp", "Tesla T4")


@pytest.mark.parametrize(
    "parser", [search_cli.search_parser("train_search.py", ""), train.make_parser()], ids=["search", "train"]
)
def test_float32_is_the_default_on_a_card(card, parser):
    args = parser.parse_args(["--device", "cuda", "--gpu", "3"])
    assert devices.choose_device(args) == torch.device("cuda:3")
    assert args.amp is False
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    with devices.autocast(torch.device("cuda"), args.amp):
        assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--pop_size 0", ["--pop_size: 0", "at least 1"]),
        ("--epochs many", ["--epochs: 'many'"]),
        ("--report_freq 50.5", ["--report_freq: '50.5'"]),
        ("--learning_rate nan", ["--learning_rate: nan"]),
        ("--mutate_rate 1.5", ["--mutate_rate: 1.5", "at least 0", "at most 1"]),
        ("--train_portion 0", ["--train_portion: 0", "greater than 0"]),
        ("--grad_clip 0", ["--grad_clip: 0", "greater than 0"]),
        ("--variant best", ["--variant: ", "'best'"]),
        ("--dataset mnist", ["--dataset: ", "'mnist'"]),
        ("--popsize 3", ["--popsize 3"]),
        ("--pop 3", ["--pop 3"]),
        ("--device toaster", ["device toaster"]),
        ("--run_name .", ["--run_name: '.'"]),
        ("--run_name out/..", ["--run_name: 'out/..'"]),
        ("--device meta", ["device meta"]),
        ("--weight_decay 1e39", ["--weight_decay: 1e39"]),
        ("--train_portion 1", ["validation split"]),
        ("--dir /dev/null/x", ["/dev/null/x"]),
    ],
)
def test_impossible_argument_is_refused_by_name(fails, flags, named):
    fails(train_search.main, [*SEARCH, *flags.split()], *named)


@pytest.fixture
def small_images(make_images):
    """A folder of 12 images of 4x4 pixels to train on and 3 to test on."""
    make_images("train", 4, [(4, 4)])
    return make_images("test", 1, [(4, 4)])


def lines_for(images):
    """The command lines of the three scripts on `images`, without batch sizes."""
    argv = [*"--init_channels 2 --epochs 1 --device cpu --dataset folder --data".split(), str(images)]
    population = [*argv, *"--pop_size 2 --tsize 2 --baselines 1".split()]
    search = [*population, *"--layers 2 --train_portion 0.75".split()]  # 9 and 3 of the images
    s2 = [*population, "--num_cells", "1"]  # 6 and 6 of them
    return search, s2, [*argv, *EVNASA, "--layers", "3"]


@pytest.mark.parametrize("flags", [[], ["--plain"]], ids=["fast", "plain"])
def test_search_that_would_normalise_a_single_pixel_is_refused(fails, small_images, flags):
    search, _, _ = lines_for(small_images)
    fails(train_search.main, [*search, "--batch_size", 4, *flags], "--batch_size 4 ")
    argv = [*search, "--batch_size", 3, "--valid_batch_size", 2, *flags]
    fails(train_search.main, argv, "4x4 pixels", "--valid_batch_size 2 ")


def test_other_scripts_that_would_normalise_a_single_pixel_are_refused(fails, small_images):
    _, s2, retraining = lines_for(small_images)
    fails(nas201.train_search.main, [*s2, "--batch_size", 5], "--batch_size 5 ")
    fails(train.main, [*retraining, "--batch_size", 11], "4x4 pixels")


@pytest.mark.usefixtures("quick_report")
@pytest.mark.slow
def test_batches_of_more_than_one_pixel_are_trained_on(small_images, tmp_path):
    search, _, retraining = lines_for(small_images)
    train.main([*retraining, "--batch_size", "10", "--dir", str(tmp_path / "retrained")])
    # With running statistics, validation does not normalise by its own batch.
    train_search.main([*search, "--batch_size", "5", "--bn", "running", "--dir", str(tmp_path / "found")])
    for parent in ("retrained", "found"):
        (run,) = (tmp_path / parent).iterdir()
        assert helpers.load_checkpoint(run / "checkpoint.pt")["completed"] == 1


@pytest.mark.parametrize(
    "variables, named",
    [
        ({"WORLD_SIZE": "2"}, "RANK and WORLD_SIZE"),
        ({"RANK": "0"}, "RANK and WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_variables_of_torchrun_that_do_not_fit_are_refused_by_name(fails, monkeypatch, variables, named):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for main, argv in MAINS[:3]:
        fails(main, argv, named, "torchrun")


# ---- resume


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(directory of a search, of a retraining), both stopped after their first checkpoint."""
    folder = tmp_path_factory.mktemp("started")
    search = [*SEARCH, "--valid_samples", "32", "--dir", folder, "--run_name", "found"]
    helpers.stop_at("after checkpoint 0", helpers.AT_ONCE, train_search.main, search)
    helpers.stop_at("after checkpoint 0", helpers.AT_ONCE, train.main, [*TRAIN, *EVNASA, "--dir", folder])
    return folder / "found", next(folder.glob("eval-*"))


@pytest.mark.parametrize(
    "flags, named", [(["--pop_size", "3"], ["--pop_size 3", "with 2"]), (["--cutout"], ["--cutout True", "with False"])]
)
def test_resumed_search_with_another_argument_is_refused_by_its_name(fails, started, flags, named):
    found, _ = started
    fails(train_search.main, ["--resume", found, *flags], found, *named)


def test_resumed_retraining_with_another_cell_is_refused_by_its_name(fails, started):
    _, retrained = started
    fails(train.main, ["--resume", retrained, "--arch", "EvNASB"], retrained, "--arch EvNASB")


def test_run_of_another_script_is_refused_by_the_script(fails, started):
    found, retrained = started
    fails(train.main, ["--resume", found], found / "args.json", "train.py")
    fails(train_search.main, ["--resume", retrained], retrained / "args.json", "train_search.py")


def test_missing_run_and_empty_checkpoint_are_refused_by_name(fails, started, tmp_path):
    fails(train_search.main, ["--resume", "nowhere"], "nowhere/args.json")
    found, _ = started
    shutil.copytree(found, tmp_path / "found")
    (tmp_path / "found/checkpoint.pt").write_text("")
    fails(train_search.main, ["--resume", "found"], "found/checkpoint.pt")


# ---- a process of its own


@pytest.mark.slow
def test_process_ends_in_one_line(tmp_path):
    script = Path(train_search.__file__)
    command = [sys.executable, script, *SEARCH, "--tsize", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --tsize 3 ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams, lines",
    [("2>&- | head -1", 1), (">&- 2>&- <&-", 0), (">/dev/full 2>&1", 0)],
    ids=["reader gone", "closed", "full"],
)
def test_process_whose_streams_are_lost_trains_on(tmp_path, streams, lines):
    sizes = " ".join([*SEARCH, "--valid_samples", "32", "--baselines", "1"])
    command = f"{sys.executable} {train_search.__file__} {sizes} --dir {tmp_path} --run_name run {streams}"
    script = f"set -o pipefail; {command}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.count("\n") == lines
    log = (tmp_path / "run/log.txt").read_text().splitlines()
    assert len(log) > 3
    assert log[-1].endswith("report.html")


@pytest.mark.parametrize(
    "message, advice",
    [
        ("CUDA out of memory. Tried to allocate 2 GiB\nmore", "--batch_size"),
        ("CUDA error: operation not permitted when stream is capturing", "--no-cuda_graph"),
        ("InvalidCxxCompiler: No working C++ compiler found", "--no-compile"),
    ],
)
def test_what_torch_cannot_do_has_a_remedy(message, advice):
    assert advice in cli.remedy(RuntimeError(message))


def test_fault_in_the_program_has_no_remedy():
    assert cli.remedy(RuntimeError("a fault in the program")) is None


# ---- files and arguments that lie


@pytest.mark.parametrize(
    "flags, named",
    [
        (f"--{name} {10**20}", f"--{name}: {10**20}")
        for name in ("pop_size", "init_channels", "layers", "baselines", "target_channels", "target_layers")
    ]
    + [
        ("--epochs 1000000", "at most 999999"),
        ("--image_size 5000", "at most 4096"),
        ("--max_latency 1e-320", "--max_latency: 1e-320"),
        ("--max_params 1e-320", "--max_params: 1e-320"),
        ("--max_mult_adds 1e-7", "--max_mult_adds: 1e-7"),
    ],
)
def test_size_that_no_run_can_have_is_refused_by_its_flag(fails, flags, named):
    fails(train_search.main, [*SEARCH, *flags.split()], named)


def test_sizes_that_no_run_of_the_other_scripts_can_have_are_refused_by_their_flags(fails):
    fails(nas201.train_search.main, ["--dataset", "digits", "--num_cells", 10**20], "--num_cells")
    fails(nas201.train_search.main, ["--dataset", "digits", "--workers", 10**9], "--workers")
    for flag in ("--init_channels", "--layers", "--workers", "--image_size"):
        fails(train.main, [*TRAIN, *EVNASA, flag, 10**20], f"{flag}: {10**20}")
        fails(test_cifar.main, [*TEST, *EVNASA, flag, 10**20], f"{flag}: {10**20}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("number", [0, 5])
def test_gpu_that_is_not_there_is_refused_by_its_number(fails, number):
    fails(train_search.main, [*SEARCH, "--gpu", number], f"--gpu {number}: ", "--device cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cpu_is_the_default_without_a_gpu():
    parser = search_cli.search_parser("train_search.py", "")
    assert devices.choose_device(parser.parse_args([])).type == "cpu"
    assert devices.choose_device(parser.parse_args(["--gpu", "1", "--device", "cpu"])).type == "cpu"


@pytest.mark.parametrize("layers", [1, 3])
def test_odd_number_of_channels_for_imagenet_is_refused(fails, make_images, layers):
    root = make_images("val", 1, [(80, 70)])
    make_images("train", 2, [(80, 70)])
    argv = [*EVNASA, "--dataset", "imagenet", "--data", root, "--batch_size", 6, "--workers", 0]
    fails(train.main, [*argv, "--init_channels", 5, "--layers", layers], "--init_channels 5")


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--layers 200", ["3 cells", "200"]),
        ("--init_channels 4000", ["stem.0.weight is (6, 3, 3, 3), not (12000, 3, 3, 3)"]),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_with_both(fails, tmp_path, flags, named):
    save_weights(tmp_path / "w.pt")
    fails(test_cifar.main, [*weights_argv(), *flags.split()], *named)


def renamed(state, *changes):
    """The state dict with its names changed, and those left out that become empty."""
    for change in changes:
        state = {change(name): value for name, value in state.items() if change(name)}
    return state


@pytest.mark.parametrize(
    "change",
    [
        lambda name: None if name.endswith("num_batches_tracked") else name,  # PyTorch before 0.4.1
        lambda name: f"module.module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module._orig_mod.{name}",
        lambda name: name.replace("cells.1.", "cells.1._orig_mod."),
    ],
    ids=["old", "module twice", "both", "three", "compiled cells"],
)
def test_names_of_other_versions_and_wrappers_are_loaded(tmp_path, change):
    network = NetworkCIFAR(2, 10, 2, False, genotypes.EvNASA)
    torch.save(renamed(network.state_dict(), change), tmp_path / "w.pt")
    copy = NetworkCIFAR(2, 10, 2, False, genotypes.EvNASA)
    weights.load_weights(copy, tmp_path / "w.pt")
    for name, value in network.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda name: f"net.{name}", ["0 cells", "3"]),
        (lambda name: name.replace("stem.", "root."), ["stem.0.weight", "root.0.weight"]),
    ],
    ids=["wrapper", "module"],
)
def test_names_that_do_not_fit_are_shown_from_both_sides(fails, tmp_path, change, named):
    state = NetworkCIFAR(2, 10, 3, False, genotypes.EvNASA).state_dict()
    torch.save(renamed(state, change), tmp_path / "w.pt")
    fails(test_cifar.main, weights_argv(), "w.pt", *named)


def test_image_of_169_megapixels_is_refused_by_name(fails, make_images, recwarn):
    root = make_images("train", 3, [(8, 8)])
    Image.new("1", (13_000, 13_000)).save(root / "train/bee/2.png")
    argv = [*SEARCH, "--dataset", "folder", "--data", root, "--image_size", 8]
    fails(train_search.main, argv, f"{root}/train/bee/2.png")
    assert not recwarn.list


CONTROL = "\x1b[31m\u202ered\n"


def test_control_characters_are_escaped_in_messages(fails, tmp_path):
    (tmp_path / CONTROL).mkdir()
    fails(train_search.main, [*SEARCH, "--dataset", "folder", "--data", CONTROL], r"\x1b[31m\u202ered\n")


def test_control_characters_are_escaped_in_logs(tmp_path):
    files.append_line(tmp_path / "log.txt", CONTROL)
    assert (tmp_path / "log.txt").read_text() == "\\x1b[31m\\u202ered\\n\n"


@pytest.mark.usefixtures("quick_report")
def test_control_characters_are_escaped_in_reports(tmp_path):
    run = reported_run(tmp_path / "run")
    about = json.loads((run / "args.json").read_text())
    about["args"]["dataset"] = CONTROL
    files.write_json(run / "args.json", about)
    page = Path(report.write_report(run, VIEWS)).read_text()
    assert r"\x1b[31m\u202ered" in page
    assert "\x1b" not in page
    assert "\u202e" not in page


NAMES = ["plain", "a b", "it's", f"{CONTROL}'\\ $(touch x)", os.fsdecode(b"\xff\x80 \xe9"), "\x85é"]


@pytest.mark.parametrize("name", NAMES)
def test_hints_are_quoted_for_the_shell(tmp_path, name):
    word = files.quoted(name)
    assert word.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == os.fsencode(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["weights", *(pytest.param(name, marks=pytest.mark.slow) for name in ("population", "runs"))]
)
def test_folder_of_a_run_that_is_a_link_is_refused_by_name(fails, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / name).symlink_to(tmp_path / "elsewhere")
    fails(train_search.main, [*SEARCH, "--valid_samples", "32", "--run_name", "found"], f"found/{name}: ", "link")


@pytest.fixture
def silent_server():
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-python.tar.gz"


def test_download_that_never_comes_ends_in_one_line(fails, monkeypatch, silent_server):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", silent_server)
    monkeypatch.setattr(datasets, "DOWNLOAD_TIMEOUT", 0.2)
    said = []
    monkeypatch.setattr(datasets.distributed, "say", said.append)
    fails(train_search.main, ["--data", "no/where"], "cifar-10-batches-py", "--dataset digits")
    assert len([line for line in said if "no/where" in line and "170 MB" in line]) == 1
    assert socket.getdefaulttimeout() is None


def test_too_few_open_files_for_the_workers_are_refused_with_the_limit(fails, monkeypatch, make_images):
    root = make_images("val", 1, [(80, 70)])
    make_images("train", 2, [(80, 70)])
    monkeypatch.setattr(resource, "getrlimit", lambda which: (24, 24))
    argv = [*EVNASA, "--dataset", "imagenet", "--data", root, "--batch_size", 6, "--init_channels", 4, "--layers", 1]
    fails(train.main, [*argv, "--workers", 2], "open files", "24", "--workers 0")


# ---- packages that are not installed

# Not summary.py, which needs packages only for its page of charts.
COMMANDS = ["train_search.py", "train.py", "test_cifar.py", "test_cifar100.py", "test_imagenet.py", "predict.py"]
COMMANDS += ["export.py", "visualize.py", "-m nas201.train_search", "-m nas201.benchmark", "-m nas201.summary"]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_without_packages_names_the_requirements_in_one_line(command):
    """With -S, Python does not look for installed packages."""
    words = [*command.split(), *(["EvNASA"] if command == "visualize.py" else ["--help"])]
    done = subprocess.run([sys.executable, "-S", *words], cwd=helpers.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("pip install -r requirements.txt\n")
    assert done.stderr.count("\n") == 1
