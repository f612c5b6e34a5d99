"""Retraining and testing: the recipe, resumed runs, weights that test as they were reported, the ImageNet path."""

import json
import math
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import datasets
import genotype_files
import genotypes
import loaders
import retrained
import seed_roles
import splits
import test_cifar
import test_imagenet
import train
import train_search
import training
from model import NetworkCIFAR, NetworkImageNet
from support import seeds, weights

from helpers import ARCH_WITH_DEAD_END, history, load_checkpoint, retrain, train_line

pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return retrain(tmp_path_factory.mktemp("finished"), "--cutout", drop_path_prob=0.3)


# ---- a run and its weights


def test_saved_weights_test_as_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "learning_rate", lambda args, epoch, warmup: [0.1, 0.1, 9.0][epoch])
    run = retrain(tmp_path)
    lines = history(run)
    top1 = [line["test_top1"] for line in lines]
    assert max(top1) > top1[-1]  # or the two files could not be told apart
    last = test_cifar.main(["--dataset", "digits", "--dir", str(run), "--device", "cpu"])
    assert f"top-1 {top1[-1]:.2f} %, top-5 {lines[-1]['test_top5']:.2f} %, loss" in capsys.readouterr().out
    best = test_cifar.main(["--dataset", "digits", "--model_path", str(run / "weights/best_weights.pt")])
    assert last["top1"] == top1[-1] and last["loss"] == pytest.approx(lines[-1]["test_loss"], rel=1e-4)
    assert best["top1"] == max(top1) == lines[-1]["best_top1"]
    about = json.loads((run / "weights/best_weights.json").read_text())
    assert about["epoch"] == 1 + top1.index(max(top1)) and about["test_top1"] == max(top1)
    assert json.loads((run / "weights/weights.json").read_text())["epoch"] == 3


class NoFloat64(TorchDispatchMode):
    """Refuses to make float64 of float32, which the tensors of devices without float64 (MPS) could not become."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before, after = ({getattr(x, "dtype", None) for x in tree_leaves(tree)} for tree in ((args, kwargs), out))
        assert not (torch.float32 in before and torch.float64 in before | after), func
        return out


@pytest.mark.slow
def test_no_device_needs_float64(tmp_path):
    with NoFloat64():
        retrain(tmp_path, epochs=1)
        search = ["--dataset", "digits", "--device", "cpu", "--epochs", 2, "--pop_size", 2, "--tsize", 1, "--layers", 1]
        sizes = ["--init_channels", 2, "--train_samples", 128, "--valid_samples", 20, "--dir", tmp_path]
        train_search.main([str(word) for word in search + sizes])


def test_reported_figures_are_those_of_a_plain_evaluation(finished):
    network = NetworkCIFAR(4, 10, 3, False, genotypes.EvNASB).eval()
    network.load_state_dict(torch.load(finished / "weights/weights.pt", weights_only=True))
    pixels = datasets.load_images("digits", None, "train").images.double() / 255
    mean, std = pixels.mean((0, 2, 3)).view(3, 1, 1), pixels.std((0, 2, 3), correction=0).view(3, 1, 1)
    test = datasets.load_images("digits", None, "test")
    with torch.no_grad():
        logits, _ = network(((test.images.double() / 255 - mean) / std).float())
    wrong_before = (logits > logits.gather(1, test.labels.view(-1, 1))).sum(1)  # classes rated above the right one
    log_probability = logits.double().log_softmax(1)[torch.arange(360), test.labels]
    line = history(finished)[-1]
    assert line["test_top1"] == pytest.approx(100 * (wrong_before == 0).double().mean().item())
    assert line["test_top5"] == pytest.approx(100 * (wrong_before < 5).double().mean().item())
    assert line["test_loss"] == pytest.approx(-log_probability.mean().item(), rel=1e-4)


def test_files_of_a_run(finished):
    assert finished.name.startswith("eval-EXP-2")
    assert genotype_files.load(finished / "genotype.json") == genotypes.EvNASB
    for name in ("log.txt", "args.json", "checkpoint.pt", "checkpoint.prev.pt", "cell_normal.svg", "report.html"):
        assert (finished / name).is_file()
    assert [line["epoch"] for line in history(finished)] == [1, 2, 3]


# ---- the cell and the weights, named as for the published scripts


def test_the_cell_of_a_run_goes_before_arch(tmp_path):
    sizes = dict(epochs=1, arch="EvNASA", init_channels=2)
    first = retrain(tmp_path / "empty", **sizes)  # no cell there
    assert genotype_files.load(first / "genotype.json") == genotypes.EvNASA
    found = tmp_path / "found"
    found.mkdir()
    genotype_files.save(genotypes.EvNASC, found / "genotype.pickle")
    second = retrain(found, **sizes)
    assert genotype_files.load(second / "genotype.json") == genotypes.EvNASC
    for run, source in ((first, "--arch EvNASA"), (second, f"{found}/genotype.pickle")):
        (line,) = [line for line in (run / "log.txt").read_text().splitlines() if "Genotype(" in line]
        assert source in line and str(genotype_files.load(run / "genotype.json")) in line
    other = ["--genotype", str(first / "genotype.json"), "--epochs", "1"]
    train.main([*[word for word in train_line(dir=found) if word not in ("--arch", "EvNASB")], *other])
    third = next(path for path in found.glob("eval-*") if path != second)
    assert genotype_files.load(third / "genotype.json") == genotypes.EvNASA
    with pytest.raises(SystemExit):  # a test takes --arch, whose network is another one
        test_cifar.main(["--dataset", "digits", "--dir", str(second), "--arch", "EvNASA"])


@pytest.mark.parametrize("name", ["weights.pt", "best_weights.pt"])
def test_weights_are_found_where_the_published_scripts_left_them(finished, tmp_path, name):
    test = lambda *argv: test_cifar.main(["--dataset", "digits", "--device", "cpu", *map(str, argv)])  # noqa: E731
    expected = test("--model_path", finished / "weights" / name)
    assert test("--model_path", finished / name) == expected
    published = tmp_path / "weights.pt"  # a published run: no folder, no file beside it
    published.write_bytes((finished / "weights" / name).read_bytes())
    genotype_files.save(genotypes.EvNASB, tmp_path / "genotype.pickle")
    assert test("--dir", tmp_path, "--init_channels", 4, "--layers", 3) == expected


# ---- the recipe


@pytest.mark.parametrize("epochs", [600, 7, 3])
def test_cosine_schedule(epochs):
    args = Namespace(learning_rate=0.025, epochs=epochs, lr_scheduler="cosine")
    rates = [train.learning_rate(args, e, False) for e in range(epochs)]
    assert rates == pytest.approx([0.025 * 0.5 * (1 + math.cos(e / epochs * math.pi)) for e in range(epochs)])


def test_linear_schedule_and_warmup():
    args = Namespace(learning_rate=0.1, epochs=250, lr_scheduler="linear")
    plain = [0.1 * (245 - e) / 245 for e in range(245)] + [0.1 * (250 - e) / (5 * 245) for e in range(245, 250)]
    assert [train.learning_rate(args, e, False) for e in range(250)] == pytest.approx(plain)
    warm = [plain[e] * (e + 1) / 5 for e in range(5)] + plain[5:]
    assert [train.learning_rate(args, e, True) for e in range(250)] == pytest.approx(warm)
    short = [train.learning_rate(Namespace(**{**vars(args), "epochs": 4}), e, False) for e in range(4)]
    assert all(a > b > 0 for a, b in zip(short, short[1:], strict=False))


def test_each_epoch_trains_with_its_learning_rate_and_drop_path(tmp_path, monkeypatch):
    seen = []

    def record(state, *_, **__):
        seen.append((state.optimizer.param_groups[0]["lr"], state.network.drop_path_prob, state.network.training))
        return {"train_loss": 0.0, "train_top1": 0.0}

    monkeypatch.setattr(train, "train_one_epoch", record)
    run = retrain(tmp_path, drop_path_prob=0.2, learning_rate=0.3, init_channels=2, epochs=4)
    rates = [0.15 * (1 + math.cos(e / 4 * math.pi)) for e in range(4)]
    assert [lr for lr, *_ in seen] == pytest.approx(rates)
    assert [line["lr"] for line in history(run)] == pytest.approx(rates)
    assert [prob for _, prob, _ in seen] == pytest.approx([0, 0.05, 0.1, 0.15])
    assert all(training for *_, training in seen)


def defaults(argv):
    args = train.make_parser().parse_args(argv)
    train.load_splits(args, genotypes.EvNASA)
    return args


def test_recipes_of_cifar_and_imagenet(make_images, monkeypatch):
    root = make_images("train", 200, [(12, 12)])
    make_images("val", 1, [(12, 12)])
    small = defaults(["--dataset", "folder", "--data", str(root)])
    assert (small.init_channels, small.layers, small.epochs, small.batch_size) == (36, 20, 600, 96)
    assert (small.learning_rate, small.weight_decay, small.momentum, small.grad_clip) == (0.025, 3e-4, 0.9, 5)
    assert (small.drop_path_prob, small.auxiliary_weight, small.label_smooth) == (0.2, 0.4, 0)
    assert (small.lr_scheduler, small.seed, small.cutout_length) == ("cosine", 18, 16)
    large = defaults(["--dataset", "imagenet", "--data", str(root)])
    assert (large.init_channels, large.layers, large.epochs, large.batch_size) == (48, 14, 250, 256)
    assert (large.learning_rate, large.weight_decay, large.momentum, large.grad_clip) == (0.1, 3e-5, 0.9, 5)
    assert (large.drop_path_prob, large.auxiliary_weight, large.label_smooth) == (0, 0.4, 0.1)
    assert (large.lr_scheduler, large.seed) == ("linear", 0)
    assert (small.report_freq, large.report_freq) == (50, 100)


def test_recipe_of_arch_strings(make_images):
    root = make_images("train", 100, [(8, 8)])
    make_images("test", 1, [(8, 8)])
    args = train.make_parser().parse_args(["--dataset", "folder", "--data", str(root)])
    *_, augmentation = train.load_splits(args, ARCH_WITH_DEAD_END)
    assert (args.recipe, augmentation.pad, augmentation.flip) == ("nas201", 4, True)
    assert (args.init_channels, args.layers, args.epochs, args.batch_size) == (16, 5, 200, 256)
    assert (args.learning_rate, args.weight_decay, args.momentum, args.nesterov) == (0.1, 5e-4, 0.9, True)
    assert (args.lr_scheduler, args.drop_path_prob, args.label_smooth, args.grad_clip) == ("cosine", 0, 0, None)
    assert retrained.choose_augmentation(ARCH_WITH_DEAD_END, "cifar10", None).mean[0] == 125.3 / 255
    assert retrained.choose_augmentation(ARCH_WITH_DEAD_END, "ImageNet16-120", None).pad == 2


def test_an_arch_string_is_trained_tested_and_resumed(tmp_path, fails):
    sizes = dict(arch=ARCH_WITH_DEAD_END, layers=1, momentum=0.8)
    run = retrain(tmp_path / "whole", **sizes)
    lines = history(run)
    assert genotype_files.load(run / "genotype.json") == ARCH_WITH_DEAD_END and (run / "cell.svg").is_file()
    tested = test_cifar.main(["--dataset", "digits", "--dir", str(run), "--device", "cpu"])
    assert tested["top1"] == lines[-1]["test_top1"] > 12
    (tmp_path / "found").mkdir()
    genotype_files.save(ARCH_WITH_DEAD_END, tmp_path / "found/genotype.json")  # as a search of the space leaves it
    stopped = tmp_path / "found"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(train, "evaluate", lambda *_, where, **__: evaluate_once(where, *_, **__))
        train.main([word for word in train_line(dir=stopped, **sizes) if word not in ("--arch", ARCH_WITH_DEAD_END)])
    (resumed,) = stopped.glob("eval-*")
    train.main(["--resume", str(resumed)])
    assert history(resumed) == lines
    for flag in ("--auxiliary", "--drop_path_prob=0.1"):
        assert "not for arch strings" in fails(train.main, train_line(flag, arch=ARCH_WITH_DEAD_END))
    assert "lacks the edge 2<-0" in fails(train.main, train_line(arch="|none~0|+|none~1|"))


def evaluate_once(where, *args, **kwargs):
    if "epoch 2" in where:
        raise RuntimeError("stopped")
    return training.evaluate(*args, where=where, **kwargs)


def smoothed_cross_entropy(logits, y, eps):
    target = torch.full_like(logits, eps / logits.shape[1])
    target[torch.arange(len(y)), y] += 1 - eps
    return -(target * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("label_smooth", [0.0, 0.3])
def test_the_loss_has_smooth_labels_and_the_auxiliary_head(make_images, tmp_path, label_smooth):
    root = make_images("train", 8, [(32, 32)])
    make_images("test", 3, [(32, 32)])
    argv = dict(dataset="folder", data=root, train_samples=24, batch_size=24, epochs=1)
    run = retrain(tmp_path, "--auxiliary", auxiliary_weight=0.25, label_smooth=label_smooth, **argv)

    images = datasets.load_images("folder", root, "train")
    seeded = Namespace(seed=18, seed_scheme=2)
    images = splits.subsample(images, 24, seeds.generator(seeded, seed_roles.SPLIT))
    recipe = datasets.augmentation("folder", images)
    generator = seeds.generator(seeded, seed_roles.TRAINING_IMAGES)
    (x, y), *_ = loaders.make_loader(images, 24, recipe, torch.device("cpu"), generator=generator, augment=True)
    torch.manual_seed(seeds.derive(18, seed_roles.WEIGHTS, 2))
    network = NetworkCIFAR(4, 3, 3, True, genotypes.EvNASB).to(memory_format=torch.channels_last)
    logits, logits_aux = network(x)
    loss = smoothed_cross_entropy(logits, y, label_smooth) + 0.25 * smoothed_cross_entropy(logits_aux, y, label_smooth)
    line = history(run)[0]
    assert line["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["train_top1"] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())

    tested = test_cifar.main(["--dataset", "folder", "--data", str(root), "--dir", str(run)])
    assert tested["top1"] == line["test_top1"]
    assert tested["parameters_M"] * 1e6 == sum(p.numel() for n, p in network.named_parameters() if "aux" not in n)
    # Weights with the head fit a network without it; means are then computed from the training images.
    weights.info_path(run / "weights/weights.pt").unlink()
    argv = ["--model_path", run / "weights/weights.pt", "--arch", "EvNASB", "--init_channels", 4, "--layers", 3]
    assert test_cifar.main(["--dataset", "folder", "--data", str(root), *map(str, argv)])["top1"] == line["test_top1"]


def test_nan_loss_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(train, "learning_rate", lambda args, epoch, warmup: 0.01 if epoch == 0 else 1e38)
    line = fails(train.main, train_line(), new_files=True)
    assert "epoch 2/3, step 2: the loss is" in line
    run = next(tmp_path.glob("eval-*"))
    checkpoint = load_checkpoint(run / "checkpoint.pt")
    assert checkpoint["completed"] == 1 and all(value.isfinite().all() for value in checkpoint["network"].values())
    assert len(history(run)) == 1


def test_no_checkpoint_is_written_from_ruined_weights(tmp_path, fails):
    """The loss of the only step is still finite."""
    argv = train_line(dir=tmp_path, batch_size=96, epochs=1, learning_rate=1e38)
    line = fails(train.main, argv, new_files=True)
    assert "error: epoch 1/1" in line and "--learning_rate" in line
    run = next(tmp_path.glob("eval-*"))
    assert load_checkpoint(run / "checkpoint.pt")["completed"] == 0
    assert not {"weights", "history.jsonl"} & {path.name for path in run.iterdir()}


def test_a_test_whose_loss_is_not_finite_fails(finished, tmp_path, fails):
    state = torch.load(finished / "weights/weights.pt", weights_only=True)
    torch.save({**state, "classifier.weight": torch.full_like(state["classifier.weight"], 3e38)}, tmp_path / "w.pt")
    argv = ["--dataset", "digits", "--model_path", "w.pt", "--arch", "EvNASB", "--init_channels", 4, "--layers", 3]
    assert "error: test: the loss is nan, so the accuracy means nothing" in fails(test_cifar.main, argv)


def test_any_seed_that_is_accepted_works(tmp_path):
    retrain(tmp_path, seed=2**63 - 1, epochs=1)


# ---- ImageNet


@pytest.fixture(params=["made", "real"])
def photos(request, tmp_path, make_images):
    """A folder with the same photographs in train/ and val/: made ones, or real ones where those are at hand."""
    if request.param == "made":
        root = make_images("val", 4, [(90, 70), (60, 110)], suffixes=[".JPEG"])
    else:
        archive = request.getfixturevalue("shared_data")("imagenet-sample.tar")
        root = tmp_path / "images"
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    (root / "train").symlink_to(root / "val", target_is_directory=True)
    return root


def published_weights(path, network):
    """The form of the published ImageNet files."""
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), 0.1).state_dict()
    torch.save({"epoch": 250, "state_dict": state, "best_acc_top1": 75.6, "optimizer": optimizer}, path)
    return path


def test_imagenet_end_to_end(photos, tmp_path, capsys):
    classes = len(list((photos / "val").iterdir()))
    images = len(list(photos.glob("val/*/*")))
    torch.manual_seed(0)
    network = NetworkImageNet(4, classes, 3, False, genotypes.EvNASA)
    weights = published_weights(tmp_path / "weights.pth.tar", network)
    size = ["--init_channels", "4", "--layers", "3", "--workers", "0", "--data", str(photos)]
    argv = ["--model_path", str(weights), "--arch", "EvNASA", *size]
    tested = test_imagenet.main(argv)
    assert f"on {images} images" in capsys.readouterr().out
    recipe = datasets.augmentation("imagenet")
    loader = loaders.make_loader(datasets.list_files("imagenet", photos, "test"), 9, recipe, torch.device("cpu"))
    network.eval()
    with torch.no_grad():
        hits = [(network(x)[0].argmax(1) == y).tolist() for x, y in loader]
    assert tested["top1"] == pytest.approx(100 * np.mean(np.concatenate(hits)))

    train.main(["--dataset", "imagenet", "--epochs", "1", "--batch_size", "12", "--dir", str(tmp_path), *argv[2:]])
    run = next(tmp_path.glob("eval-*"))
    (line,) = history(run)
    assert line["lr"] == pytest.approx(0.1 / 5) and math.isfinite(line["train_loss"])
    tested = test_imagenet.main(["--dir", str(run), "--data", str(photos), "--workers", "0"])
    assert tested["top1"] == line["test_top1"] and tested["loss"] == pytest.approx(line["test_loss"], rel=1e-4)


def test_large_images_of_a_folder_get_the_imagenet_recipe(make_images, tmp_path):
    root = make_images("train", 4, [(90, 70)])
    make_images("test", 2, [(90, 70)])
    argv = dict(dataset="folder", data=root, train_samples=9, batch_size=6, epochs=1, workers=0)
    run = retrain(tmp_path, "--auxiliary", **argv)
    state = torch.load(run / "weights/weights.pt", weights_only=True)
    assert "stem0.0.weight" in state and state["auxiliary_head.classifier.weight"].shape == (3, 768)


def test_a_recipe_and_a_size_are_for_images_of_any_size(make_images, tmp_path, fails):
    root = make_images("train", 4, [(40, 30), (33, 50)])
    make_images("test", 2, [(30, 31)])
    argv = ["--dataset", "folder", "--data", str(root), "--device", "cpu"]
    own = dict(dataset="folder", data=root, train_samples=12, batch_size=6, epochs=1, layers=2, workers=0)
    scripts = {"cifar": (12, test_cifar, test_imagenet), "imagenet": (32, test_imagenet, test_cifar)}
    for recipe, (side, right, other) in scripts.items():
        run = retrain(tmp_path / recipe, recipe=recipe, image_size=side, **own)
        assert f"of 3 classes, {side}x{side} pixels" in (run / "log.txt").read_text()
        about = json.loads((run / "weights/weights.json").read_text())
        assert (about["family"], about["image_size"], about["resized"]) == (recipe, [side, side], True)
        tested = right.main([*argv, "--dir", str(run), "--workers", "0"])
        assert tested["top1"] == history(run)[-1]["test_top1"]
        assert f"test it with {right.__name__}.py" in fails(other.main, [*argv, "--dir", run])
        (line,) = history(run)
        train.main(["--resume", str(run)])  # with its size and recipe
        assert history(run) == [line]
    assert "trained with 32" in fails(test_imagenet.main, [*argv, "--dir", run, "--image_size", "64"])
    for words, message in [
        (["--recipe", "nas201"], "does not fit this cell"),
        (["--recipe", "cifar"], "must all have one size"),
        (["--recipe", "imagenet", "--image_size", "40"], "both sides must be multiples of 32"),
        (["--image_size", "30"], "both sides must be multiples of 4"),
        (["--image_size", "16", "--auxiliary"], "needs images of 32x32"),
    ]:
        assert message in fails(train.main, train_line(*words, **own))


# ---- more than one process


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["EvNASB", ARCH_WITH_DEAD_END])
def test_two_processes(tmp_path, arch):
    project = Path(train.__file__).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    argv = train_line("--cutout", dir=tmp_path, epochs=2, arch=arch)
    subprocess.run([*launcher, str(project / "train.py"), *argv], check=True, cwd=project, timeout=300)
    (run,) = tmp_path.iterdir()
    assert [line["epoch"] for line in history(run)] == [1, 2]
    log = (run / "log.txt").read_text()
    assert log.count("epoch 1/2: loss") == log.count("finished") == 1
    tested = test_cifar.main(["--dataset", "digits", "--dir", str(run), "--device", "cpu"])
    assert tested["top1"] == history(run)[-1]["test_top1"]
    assert json.loads((run / "args.json").read_text())["processes"] == 2
