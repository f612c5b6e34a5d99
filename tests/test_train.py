"""Retraining and testing: recipes, schedules, the loss, weights that test as reported, ImageNet."""

import json
import math
import re
import shutil
import tarfile
from argparse import Namespace

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
from support import runs, seeds

from helpers import ARCH_WITH_DEAD_END, history, load_checkpoint, retrain, torchrun, train_line


@pytest.fixture(scope="module", autouse=True)
def quick(quick_reports):
    """No TensorBoard, whose import takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "open_board", lambda run: False)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return retrain(tmp_path_factory.mktemp("finished"), "--cutout", drop_path_prob=0.3, epochs=2)


# ---- a run and its weights


DIGITS = ["--dataset", "digits", "--device", "cpu"]


def on_digits(*argv):
    """Return the figures of test_cifar.py on the digits."""
    return test_cifar.main([*DIGITS, *map(str, argv)])


@pytest.fixture(scope="module")
def worsened(tmp_path_factory):
    """A retraining whose last epoch spoils the network, so its last and best weights differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda args, epoch, warmup: [0.1, 9.0][epoch])
        run = retrain(tmp_path_factory.mktemp("worsened"), epochs=2)
    top1 = [line["test_top1"] for line in history(run)]
    assert max(top1) > top1[-1]
    return run


def test_last_weights_test_as_reported(worsened, capsys):
    last = history(worsened)[-1]
    tested = on_digits("--dir", worsened)
    assert tested["top1"] == last["test_top1"]
    assert tested["loss"] == pytest.approx(last["test_loss"], rel=1e-4)
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"{last['test_top1']:.2f} %" in line
    assert f"{last['test_top5']:.2f} %" in line


def test_best_weights_test_as_reported(worsened):
    tested = on_digits("--model_path", worsened / "weights/best_weights.pt")
    assert tested["top1"] == history(worsened)[-1]["best_top1"]


def test_weights_say_which_epoch_they_are_of(worsened):
    top1 = [line["test_top1"] for line in history(worsened)]
    best = json.loads((worsened / "weights/best_weights.json").read_text())
    last = json.loads((worsened / "weights/weights.json").read_text())
    assert (best["epoch"], best["test_top1"]) == (1 + top1.index(max(top1)), max(top1))
    assert (last["epoch"], last["test_top1"]) == (2, top1[-1])


class NoFloat64(TorchDispatchMode):
    """Refuses to make float64 of float32, which devices without float64 (MPS) cannot do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before, after = ({getattr(x, "dtype", None) for x in tree_leaves(tree)} for tree in ((args, kwargs), out))
        if torch.float32 in before:
            assert torch.float64 not in before | after, func
        return out


@pytest.mark.slow
def test_training_needs_no_float64_on_the_device(tmp_path):
    with NoFloat64():
        retrain(tmp_path, epochs=1)
        search = ["--dataset", "digits", "--device", "cpu", "--epochs", 2, "--pop_size", 2, "--tsize", 1, "--layers", 1]
        sizes = ["--init_channels", 2, "--train_samples", 128, "--valid_samples", 20, "--dir", tmp_path]
        train_search.main([str(word) for word in search + sizes])
    assert {path.name[:4] for path in tmp_path.iterdir()} == {"eval", "sear"}


def test_reported_figures_are_those_of_a_simple_evaluation(finished):
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


def test_finished_run_has_its_files(finished):
    assert finished.name.startswith("eval-EXP-2")
    for name in ("log.txt", "args.json", "checkpoint.pt", "checkpoint.prev.pt", "cell_normal.svg", "report.html"):
        assert (finished / name).is_file()


def test_finished_run_has_its_cell_and_history(finished):
    assert genotype_files.load(finished / "genotype.json") == genotypes.EvNASB
    assert [line["epoch"] for line in history(finished)] == [1, 2]


# ---- where cell and weights come from


def choose(dir_first, **given):
    args = Namespace(**{"arch": None, "genotype": None, "dir": None, **given})
    return retrained.choose_cell(args, dir_first=dir_first)


@pytest.fixture
def search_dir(tmp_path):
    genotype_files.save(genotypes.EvNASC, tmp_path / "genotype.pickle")
    return tmp_path


def test_retraining_takes_the_cell_of_dir_before_arch(search_dir):
    choice = choose(True, arch="EvNASA", dir=search_dir)
    assert choice.cell == genotypes.EvNASC
    assert str(search_dir / "genotype.pickle") in choice.source


def test_retraining_takes_arch_if_dir_has_no_cell(tmp_path):
    choice = choose(True, arch="EvNASA", dir=tmp_path)
    assert choice.cell == genotypes.EvNASA
    assert "--arch EvNASA" in choice.source


def test_test_takes_arch_before_the_cell_of_dir(search_dir):
    assert choose(False, arch="EvNASA", dir=search_dir).cell == genotypes.EvNASA


@pytest.mark.parametrize("dir_first", [True, False])
def test_genotype_is_taken_before_the_cell_of_dir(search_dir, tmp_path, dir_first):
    genotype_files.save(genotypes.EvNASB, tmp_path / "mine.json")
    choice = choose(dir_first, genotype=tmp_path / "mine.json", dir=search_dir)
    assert choice.cell == genotypes.EvNASB


def test_run_in_a_search_has_and_names_its_cell(search_dir):
    run = retrain(search_dir, epochs=1, arch="EvNASA", init_channels=2, train_samples=16)
    assert genotype_files.load(run / "genotype.json") == genotypes.EvNASC
    log = re.sub(r"\n\S+ \S+ +", " ", (run / "log.txt").read_text())  # lines begin with date and time
    assert str(search_dir / "genotype.pickle") in log
    assert str(genotypes.EvNASC) in log


def test_weights_of_another_cell_are_refused(finished, fails):
    assert "weights.pt" in fails(test_cifar.main, [*DIGITS, "--dir", finished, "--arch", "EvNASA"])


def test_weights_are_found_in_the_folder_above(worsened):
    """There the published scripts left them."""
    tested = on_digits("--model_path", worsened / "best_weights.pt")
    assert tested["top1"] == history(worsened)[-1]["best_top1"]


def test_published_weights_are_tested_without_a_description(finished, search_dir):
    shutil.copy(finished / "weights/weights.pt", search_dir)
    genotype_files.save(genotypes.EvNASB, search_dir / "genotype.pickle")
    tested = on_digits("--dir", search_dir, "--init_channels", 4, "--layers", 3)
    assert tested["top1"] == history(finished)[-1]["test_top1"]


# ---- the recipe


@pytest.mark.parametrize("epochs", [600, 7, 3])
def test_cosine_schedule_falls_to_zero(epochs):
    args = Namespace(learning_rate=0.025, epochs=epochs, lr_scheduler="cosine")
    rates = [train.learning_rate(args, e, False) for e in range(epochs)]
    assert rates == pytest.approx([0.025 * 0.5 * (1 + math.cos(e / epochs * math.pi)) for e in range(epochs)])


def linear_rates(epochs, warmup):
    args = Namespace(learning_rate=0.1, epochs=epochs, lr_scheduler="linear")
    return [train.learning_rate(args, epoch, warmup) for epoch in range(epochs)]


# The paper's ImageNet recipe: two slopes over 250 epochs.
TWO_SLOPES = [0.1 * (245 - e) / 245 for e in range(245)] + [0.1 * (250 - e) / (5 * 245) for e in range(245, 250)]


def test_linear_schedule_has_two_slopes():
    assert linear_rates(250, warmup=False) == pytest.approx(TWO_SLOPES)


def test_warmup_scales_the_first_five_epochs():
    expected = [rate * (e + 1) / 5 for e, rate in enumerate(TWO_SLOPES[:5])] + TWO_SLOPES[5:]
    assert linear_rates(250, warmup=True) == pytest.approx(expected)


@pytest.mark.parametrize("epochs", range(1, 6))
def test_linear_schedule_without_the_first_slope_falls_and_stays_positive(epochs):
    rates = linear_rates(epochs, warmup=False)
    assert rates == sorted(set(rates), reverse=True)
    assert min(rates) > 0


def test_epoch_trains_with_its_learning_rate_and_drop_path(tmp_path, monkeypatch):
    seen = []

    def record(state, *_, **__):
        seen.append((state.optimizer.param_groups[0]["lr"], state.network.drop_path_prob, state.network.training))
        return {"train_loss": 0.0, "train_top1": 0.0}

    monkeypatch.setattr(train, "train_one_epoch", record)
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: {"loss": 0.0, "top1": 0.0, "top5": 0.0})
    run = retrain(tmp_path, drop_path_prob=0.2, learning_rate=0.3, init_channels=2, epochs=4)
    rates = [0.15 * (1 + math.cos(e / 4 * math.pi)) for e in range(4)]
    assert [lr for lr, *_ in seen] == pytest.approx(rates)
    assert [line["lr"] for line in history(run)] == pytest.approx(rates)
    assert [prob for _, prob, _ in seen] == pytest.approx([0, 0.05, 0.1, 0.15])
    assert [training for *_, training in seen] == [True] * 4


def defaults(argv):
    args = train.make_parser().parse_args(argv)
    train.load_splits(args, genotypes.EvNASA)
    return args


def test_small_images_get_the_cifar_recipe_of_the_paper(make_images):
    root = make_images("train", 200, [(12, 12)])
    make_images("test", 1, [(12, 12)])
    args = defaults(["--dataset", "folder", "--data", str(root)])
    assert (args.init_channels, args.layers, args.epochs, args.batch_size) == (36, 20, 600, 96)
    assert (args.learning_rate, args.weight_decay, args.momentum, args.grad_clip) == (0.025, 3e-4, 0.9, 5)
    assert (args.drop_path_prob, args.auxiliary_weight, args.label_smooth) == (0.2, 0.4, 0)
    assert (args.lr_scheduler, args.seed, args.cutout_length, args.report_freq) == ("cosine", 18, 16, 50)


def test_imagenet_gets_the_imagenet_recipe_of_the_paper(make_images):
    root = make_images("train", 200, [(12, 12)])
    make_images("val", 1, [(12, 12)])
    args = defaults(["--dataset", "imagenet", "--data", str(root)])
    assert (args.init_channels, args.layers, args.epochs, args.batch_size) == (48, 14, 250, 256)
    assert (args.learning_rate, args.weight_decay, args.momentum, args.grad_clip) == (0.1, 3e-5, 0.9, 5)
    assert (args.drop_path_prob, args.auxiliary_weight, args.label_smooth) == (0, 0.4, 0.1)
    assert (args.lr_scheduler, args.seed, args.report_freq) == ("linear", 0, 100)


def test_arch_string_gets_the_recipe_of_the_benchmark(make_images):
    root = make_images("train", 100, [(8, 8)])
    make_images("test", 1, [(8, 8)])
    args = train.make_parser().parse_args(["--dataset", "folder", "--data", str(root)])
    augmentation = train.load_splits(args, ARCH_WITH_DEAD_END).augmentation
    assert (args.recipe, augmentation.pad, augmentation.flip) == ("nas201", 4, True)
    assert (args.init_channels, args.layers, args.epochs, args.batch_size) == (16, 5, 200, 256)
    assert (args.learning_rate, args.weight_decay, args.momentum, args.nesterov) == (0.1, 5e-4, 0.9, True)
    assert (args.lr_scheduler, args.drop_path_prob, args.label_smooth, args.grad_clip) == ("cosine", 0, 0, None)


def test_arch_string_gets_the_normalisation_of_the_benchmark():
    assert retrained.choose_augmentation(ARCH_WITH_DEAD_END, "cifar10", None).mean[0] == 125.3 / 255
    assert retrained.choose_augmentation(ARCH_WITH_DEAD_END, "ImageNet16-120", None).pad == 2


# ---- arch strings

ARCH_SIZES = dict(arch=ARCH_WITH_DEAD_END, layers=1, momentum=0.8, epochs=2)


@pytest.fixture(scope="module")
def finished_arch(tmp_path_factory):
    return retrain(tmp_path_factory.mktemp("finished_arch"), **ARCH_SIZES)


def test_run_of_an_arch_string_has_its_cell(finished_arch):
    assert genotype_files.load(finished_arch / "genotype.json") == ARCH_WITH_DEAD_END
    assert (finished_arch / "cell.svg").is_file()


def test_weights_of_an_arch_string_test_as_reported(finished_arch):
    tested = on_digits("--dir", finished_arch)
    assert tested["top1"] == history(finished_arch)[-1]["test_top1"]
    assert tested["top1"] > 12  # percent; guessing has 10


def test_resumed_run_of_an_arch_string_equals_an_uninterrupted_one(finished_arch, tmp_path):
    def evaluate_once(*args, where, **kwargs):
        if "epoch 2" in where:
            raise RuntimeError("stopped")
        return training.evaluate(*args, where=where, **kwargs)

    genotype_files.save(ARCH_WITH_DEAD_END, tmp_path / "genotype.json")  # as a search of the space leaves it
    argv = train_line(dir=tmp_path, **ARCH_SIZES)
    argv = [word for word in argv if word not in ("--arch", ARCH_WITH_DEAD_END)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(train, "evaluate", evaluate_once)
        train.main(argv)
    (run,) = tmp_path.glob("eval-*")
    train.main(["--resume", str(run)])
    assert history(run) == history(finished_arch)


@pytest.mark.parametrize("flag", ["--auxiliary", "--drop_path_prob=0.1"])
def test_flag_that_the_benchmark_does_not_have_is_refused(fails, flag):
    assert flag.partition("=")[0] in fails(train.main, train_line(flag, arch=ARCH_WITH_DEAD_END))


def test_damaged_arch_string_is_refused(fails):
    assert "2<-0" in fails(train.main, train_line(arch="|none~0|+|none~1|"))


# ---- the loss


def smoothed_cross_entropy(logits, y, eps):
    target = torch.full_like(logits, eps / logits.shape[1])
    target[torch.arange(len(y)), y] += 1 - eps
    return -(target * logits.log_softmax(1)).sum(1).mean()


AUXILIARY_WEIGHT = 0.25


LABEL_SMOOTH = 0.3


@pytest.fixture(scope="module")
def one_step(write_images, tmp_path_factory):
    """(run, images) of a retraining of one step with the auxiliary head and smooth labels."""
    folder = tmp_path_factory.mktemp("one_step")
    root = folder / "images"
    write_images(root, "train", 8, [(32, 32)])
    write_images(root, "test", 3, [(32, 32)])
    argv = dict(dataset="folder", data=root, train_samples=24, batch_size=24, epochs=1)
    run = retrain(folder, "--auxiliary", auxiliary_weight=AUXILIARY_WEIGHT, label_smooth=LABEL_SMOOTH, **argv)
    return run, root


def test_loss_has_smooth_labels_and_the_auxiliary_head(one_step):
    run, root = one_step
    seeded = Namespace(seed=18, seed_scheme=2)
    images = datasets.load_images("folder", root, "train")
    images = splits.subsample(images, 24, seeds.generator(seeded, seed_roles.SPLIT))
    augmentation = datasets.augmentation("folder", images)
    generator = seeds.generator(seeded, seed_roles.TRAINING_IMAGES)
    (x, y), *_ = loaders.make_loader(images, 24, augmentation, torch.device("cpu"), generator=generator, augment=True)
    torch.manual_seed(seeds.derive(18, seed_roles.WEIGHTS, 2))
    network = NetworkCIFAR(4, 3, 3, True, genotypes.EvNASB).to(memory_format=torch.channels_last)
    logits, logits_aux = network(x)
    loss = smoothed_cross_entropy(logits, y, LABEL_SMOOTH)
    loss = loss + AUXILIARY_WEIGHT * smoothed_cross_entropy(logits_aux, y, LABEL_SMOOTH)
    line = history(run)[0]
    assert line["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["train_top1"] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())


def test_weights_with_the_auxiliary_head_test_as_reported(one_step):
    run, root = one_step
    tested = test_cifar.main(["--dataset", "folder", "--data", str(root), "--dir", str(run)])
    assert tested["top1"] == history(run)[0]["test_top1"]


def test_parameters_leave_the_auxiliary_head_out(one_step):
    run, root = one_step
    tested = test_cifar.main(["--dataset", "folder", "--data", str(root), "--dir", str(run)])
    network = NetworkCIFAR(4, 3, 3, False, genotypes.EvNASB)
    assert tested["parameters_M"] * 1e6 == sum(p.numel() for p in network.parameters())


def test_weights_without_a_description_use_the_training_images_statistics(one_step, tmp_path):
    """The network is built without the head, whose weights are in the file."""
    run, root = one_step
    shutil.copy(run / "weights/weights.pt", tmp_path / "w.pt")
    argv = ["--model_path", tmp_path / "w.pt", "--arch", "EvNASB", "--init_channels", 4, "--layers", 3]
    tested = test_cifar.main(["--dataset", "folder", "--data", str(root), *map(str, argv)])
    assert tested["top1"] == history(run)[0]["test_top1"]


# ---- training that fails


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(train, "learning_rate", lambda args, epoch, warmup: 0.01 if epoch == 0 else 1e38)
    line = fails(train.main, train_line(), new_files=True)
    assert "epoch 2/3, step 2" in line
    run = next(tmp_path.glob("eval-*"))
    checkpoint = load_checkpoint(run / "checkpoint.pt")
    assert checkpoint["completed"] == 1
    for name, value in checkpoint["network"].items():
        assert value.isfinite().all(), name
    assert len(history(run)) == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path, fails):
    """The loss of the only step is still finite."""
    argv = train_line(dir=tmp_path, batch_size=96, epochs=1, learning_rate=1e38)
    line = fails(train.main, argv, new_files=True)
    assert "epoch 1/1" in line
    assert "--learning_rate" in line
    run = next(tmp_path.glob("eval-*"))
    assert load_checkpoint(run / "checkpoint.pt")["completed"] == 0
    assert not {"weights", "history.jsonl"} & {path.name for path in run.iterdir()}


def test_test_whose_loss_is_not_finite_fails(finished, tmp_path, fails):
    state = torch.load(finished / "weights/weights.pt", weights_only=True)
    torch.save({**state, "classifier.weight": torch.full_like(state["classifier.weight"], 3e38)}, tmp_path / "w.pt")
    argv = ["--dataset", "digits", "--model_path", "w.pt", "--arch", "EvNASB", "--init_channels", 4, "--layers", 3]
    assert "nan" in fails(test_cifar.main, argv)


@pytest.mark.slow
def test_training_with_the_largest_seed_runs(tmp_path):
    run = retrain(tmp_path, seed=2**63 - 1, epochs=1, train_samples=16, drop_path_prob=0.3)
    assert len(history(run)) == 1
    assert load_checkpoint(run / "checkpoint.pt")["completed"] == 1


# ---- ImageNet


@pytest.fixture
def made_photos(make_images):
    """A folder with the same images in train/ and val/."""
    root = make_images("val", 4, [(90, 70), (60, 110)], suffixes=[".JPEG"])
    (root / "train").symlink_to(root / "val", target_is_directory=True)
    return root


@pytest.fixture(params=["made", pytest.param("real", marks=pytest.mark.slow)])
def photos(request, tmp_path):
    """A folder with photographs in val/: made ones, or real ones where those are at hand."""
    if request.param == "made":
        return request.getfixturevalue("made_photos")
    archive = request.getfixturevalue("shared_data")("imagenet-sample.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "images", filter="data")
    return tmp_path / "images"


def published_weights(path, network):
    """The form of the published ImageNet files."""
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), 0.1).state_dict()
    torch.save({"epoch": 250, "state_dict": state, "best_acc_top1": 75.6, "optimizer": optimizer}, path)
    return path


SMALL_IMAGENET = ["--init_channels", "4", "--layers", "3", "--workers", "0"]


def test_published_imagenet_weights_are_tested(photos, tmp_path, capsys):
    classes = len(list((photos / "val").iterdir()))
    images = len(list(photos.glob("val/*/*")))
    torch.manual_seed(0)
    network = NetworkImageNet(4, classes, 3, False, genotypes.EvNASA)
    path = published_weights(tmp_path / "weights.pth.tar", network)
    argv = ["--model_path", str(path), "--arch", "EvNASA", "--data", str(photos)]
    tested = test_imagenet.main([*argv, *SMALL_IMAGENET])
    assert f"on {images} images" in capsys.readouterr().out

    split = datasets.list_files("imagenet", photos, "test")
    loader = loaders.make_loader(split, 9, datasets.augmentation("imagenet"), torch.device("cpu"))
    network.eval()
    with torch.no_grad():
        hits = [(network(x)[0].argmax(1) == y).tolist() for x, y in loader]
    assert tested["top1"] == pytest.approx(100 * np.mean(np.concatenate(hits)))


def test_imagenet_is_trained_and_tests_as_reported(made_photos, tmp_path):
    argv = ["--dataset", "imagenet", "--arch", "EvNASA", "--epochs", "1", "--batch_size", "12"]
    train.main([*argv, *SMALL_IMAGENET, "--data", str(made_photos), "--dir", str(tmp_path)])
    run = next(tmp_path.glob("eval-*"))
    (line,) = history(run)
    assert line["lr"] == pytest.approx(0.1 / 5)
    assert math.isfinite(line["train_loss"])
    tested = test_imagenet.main(["--dir", str(run), "--data", str(made_photos), "--workers", "0"])
    assert tested["top1"] == line["test_top1"]
    assert tested["loss"] == pytest.approx(line["test_loss"], rel=1e-4)


def test_large_images_of_a_folder_get_the_imagenet_recipe(make_images, tmp_path):
    root = make_images("train", 4, [(90, 70)])
    make_images("test", 2, [(90, 70)])
    argv = dict(dataset="folder", data=root, train_samples=9, batch_size=6, epochs=1, workers=0)
    run = retrain(tmp_path, "--auxiliary", **argv)
    state = torch.load(run / "weights/weights.pt", weights_only=True)
    assert "stem0.0.weight" in state
    assert state["auxiliary_head.classifier.weight"].shape == (3, 768)


# ---- a folder of images of any size, with a recipe and a size


@pytest.fixture(scope="module")
def mixed_images(write_images, tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed_images")
    write_images(root, "train", 4, [(40, 30), (33, 50)])
    write_images(root, "test", 2, [(30, 31)])
    return root


def mixed_sizes(root):
    """Return the settings of a tiny retraining on such images."""
    return dict(dataset="folder", data=root, train_samples=12, batch_size=6, epochs=1, layers=2, workers=0)


SIDES = {"cifar": 12, "imagenet": 32}


@pytest.fixture(scope="module", params=SIDES)
def resized(request, mixed_images, tmp_path_factory):
    """(recipe, run, command line of its test) of a retraining on resized images."""
    recipe = request.param
    run = retrain(tmp_path_factory.mktemp(recipe), recipe=recipe, image_size=SIDES[recipe], **mixed_sizes(mixed_images))
    test = ["--dataset", "folder", "--data", str(mixed_images), "--device", "cpu", "--workers", "0", "--dir", str(run)]
    return recipe, run, test


def test_resized_images_are_recorded_with_the_weights(resized):
    recipe, run, _ = resized
    about = json.loads((run / "weights/weights.json").read_text())
    side = SIDES[recipe]
    assert (about["family"], about["image_size"], about["resized"]) == (recipe, [side, side], True)
    assert f"{side}x{side} pixels" in (run / "log.txt").read_text()


def test_resized_images_test_as_reported(resized):
    recipe, run, argv = resized
    script = test_imagenet if recipe == "imagenet" else test_cifar
    assert script.main(argv)["top1"] == history(run)[-1]["test_top1"]


def test_weights_are_refused_by_the_script_of_another_recipe(resized, fails):
    recipe, _, argv = resized
    script, right = (test_cifar, "test_imagenet.py") if recipe == "imagenet" else (test_imagenet, "test_cifar.py")
    assert right in fails(script.main, argv)


def test_another_size_than_in_training_is_refused(resized, fails):
    recipe, _, argv = resized
    script = test_imagenet if recipe == "imagenet" else test_cifar
    line = fails(script.main, [*argv, "--image_size", "64"])
    assert "--image_size 64" in line
    assert str(SIDES[recipe]) in line


def test_finished_run_on_resized_images_resumes_to_the_same_end(resized):
    _, run, _ = resized
    lines = history(run)
    train.main(["--resume", str(run)])
    assert history(run) == lines


@pytest.mark.parametrize(
    "words, named",
    [
        (["--recipe", "nas201"], "--recipe nas201"),
        (["--recipe", "cifar"], "--image_size"),
        (["--recipe", "imagenet", "--image_size", "40"], "40x40"),
        (["--image_size", "30"], "30x30"),
        (["--image_size", "16", "--auxiliary"], "--auxiliary"),
    ],
)
def test_recipe_and_size_that_do_not_fit_are_refused(mixed_images, fails, words, named):
    assert named in fails(train.main, train_line(*words, **mixed_sizes(mixed_images)))


# ---- more than one process


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["EvNASB", ARCH_WITH_DEAD_END])
def test_two_processes_write_one_run(tmp_path, arch):
    argv = train_line("--cutout", dir=tmp_path / "runs", epochs=2, arch=arch)
    assert torchrun(tmp_path / "logs", train.__file__, *argv).wait(timeout=300) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert [line["epoch"] for line in history(run)] == [1, 2]
    log = (run / "log.txt").read_text()
    assert log.count("epoch 1/2: loss") == log.count("finished") == 1
    tested = test_cifar.main(["--dataset", "digits", "--dir", str(run), "--device", "cpu"])
    assert tested["top1"] == history(run)[-1]["test_top1"]
    assert json.loads((run / "args.json").read_text())["processes"] == 2
