"""The published commands run here: small sizes are appended, and the data are stand-ins.

Three scripts have another name here, see RENAMED.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchvision

import genotype_files
import genotypes
import nas201.train_search
import search_cli
import train
from model import NetworkCIFAR, NetworkImageNet
from nas201.genotypes import to_arch_string
from support import runs
from support.files import UserError

pytestmark = pytest.mark.usefixtures("quick_report")
ROOT = Path(__file__).resolve().parents[1]
RENAMED = {  # published script: what it is called here
    "train_cifar100.py": ["train.py", "--dataset", "cifar100"],
    "train_imagenet.py": ["train.py", "--dataset", "imagenet"],
    "train_searchNAS201.py": ["-m", "nas201.train_search"],
}
COMMANDS = (
    "python -i train_search.py --cutout",
    "python train.py --cutout --auxiliary --epochs 600 --arch EvNASA",
    "python train.py --cutout --auxiliary --epochs 600 --dir outputs",
    "python3 test_cifar.py --arch EvNASA --model_path EvNAS_A_cifar_weights.pt",
    "python3 test_cifar100.py --arch EvNASA --model_path EvNAS_A_cifar100_weights.pt",
    "python test_imagenet.py --arch EvNASA --model_path EvNAS_A_imagenet_model_best.pth.tar",
    "python train_search.py --data ../data --dir outputs --cutout --seed 18 --gpu 0 --init_channel 16",
    "python train.py --auxiliary --cutout --arch EvNASA --gpu 0 --report_freq 50.0 --init_channel 36",
    "python train.py --dir outputs --arch EvNASB --pop_num 1 --model_path saved_models --ga",
    "python train_cifar100.py --auxiliary --cutout --arch EvNASA",
    "python train_imagenet.py --tmp_data_dir data --parallel --auxiliary --note NOTE --arch EvNASA",
    "python test_cifar.py --auxiliary --model_path EvNAS_A_cifar_weights.pt --arch EvNASA",
    "python test_cifar.py --model_path run/EvNAS_A_cifar_weights.pt --arch EvNASA --cutout --cutout_length 16 --seed 0",
    "python test_cifar100.py --model_path EvNAS_A_cifar100_weights.pt --arch EvNASA --drop_path_prob 0.2",
    "python test_imagenet.py --model_path EvNAS_A_imagenet_model_best.pth.tar --arch EvNASA --seed 0 --cutout",
    "python train_searchNAS201.py --data ../data --dataset cifar10 --dir outputs --trainval --cutout --gpu 0 --seed 18",
)
OF_THE_SHELL_SCRIPT = (
    "python train_searchNAS201.py --cutout --gpu 0 --max_nodes 4 --init_channel 16 --num_cells 5 "
    "--dataset cifar10 --data ../data --dir outputs --seed 18 --epochs 50 --pop_size 50 --tsize 10 "
    "--api_path ../NAS_Bench_201/NAS-Bench-201-v1_1-096897.pth --config_path configs/EvNAS.config --track_running_stats"
)
CONFIG = {
    "scheduler": ["str", "cos"],
    "LR": ["float", "0.025"],
    "eta_min": ["float", "0.5"],  # this and the next two had no effect
    "epochs": ["int", "7"],
    "batch_size": ["int", "3"],
    "decay": ["float", "0.0003"],
    "momentum": ["float", "0.9"],
    "nesterov": ["bool", "1"],
    "optim": ["str", "SGD"],
    "criterion": ["str", "Softmax"],
}
SEARCH = "--epochs 1 --pop_size 2 --tsize 1 --init_channels 2 --train_samples 64 --valid_samples 16 --device cpu"
SEARCH += " --baselines 2"
CIFAR_TRAIN = "--epochs 1 --init_channels 2 --layers 3 --train_samples 16 --batch_size 16 --device cpu"
SIZES = {
    "train_search.py": f"{SEARCH} --layers 2 --target_channels 2 --target_layers 2",
    "train_searchNAS201.py": f"{SEARCH} --num_cells 1",
    "train.py": CIFAR_TRAIN,
    "train_cifar100.py": CIFAR_TRAIN,
    "train_imagenet.py": "--epochs 1 --init_channels 4 --layers 3 --batch_size 6 --workers 0 --device cpu",
    "test_cifar.py": "--init_channels 2 --layers 3 --device cpu",
    "test_cifar100.py": "--init_channels 2 --layers 3 --device cpu",
    "test_imagenet.py": "--init_channels 4 --layers 3 --workers 0 --data data/imagenet --device cpu",
}
# What torchvision's reader would return: one-colour images. The benchmark's split needs all 50,000
# training images.
READER = """
import numpy

def reader(classes, count=50_000):
    class CIFAR:
        def __init__(self, root, train, download):
            self.targets = [i % classes for i in range(count if train else 200)]
            self.data = numpy.uint8(self.targets)[:, None, None, None] + numpy.zeros((1, 32, 32, 3), numpy.uint8)
            self.classes = [str(i) for i in range(classes)]
    return CIFAR
"""
INSTALLED = """
import torchvision
torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100 = reader(10), reader(100)
"""


class Command(NamedTuple):
    """A published command line."""

    script: str  # as it was published
    here: list[str]  # the words after `python` that start it here
    arguments: list[str]


def parse_command(text):
    words = shlex.split(text)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = words[at]
    return Command(script, [*words[1:at], *RENAMED.get(script, [script])], words[at + 1 :])


def commands_of(*scripts):
    """The published commands of scripts whose names begin so."""
    return [text for text in COMMANDS if parse_command(text).script.startswith(scripts)]


def first_is_fast(commands):
    """The commands as parameters of a test. All but the first are slow tests."""
    return [commands[0], *(pytest.param(text, marks=pytest.mark.slow) for text in commands[1:])]


def main_of(command):
    """Return the main function that a command calls, and its arguments."""
    words = [word for word in command.here if word not in ("-i", "-m")]
    return importlib.import_module(words[0].removesuffix(".py")).main, [*words[1:], *command.arguments]


def fill(work, write_images):
    """Make a search's run, photographs and published weights in the folder `work`."""
    write_images(work / "data/imagenet", "train", 4, [(80, 70)])
    write_images(work / "data/imagenet", "val", 2, [(80, 70)])
    (work / "outputs").mkdir()
    genotype_files.save(genotypes.EvNASC, work / "outputs/genotype.pickle")
    (work / "configs").mkdir()
    (work / "configs/EvNAS.config").write_text(json.dumps(CONFIG))
    for name, classes in (("EvNAS_A_cifar_weights.pt", 10), ("EvNAS_A_cifar100_weights.pt", 100)):
        torch.save(NetworkCIFAR(2, classes, 3, True, genotypes.EvNASA).state_dict(), work / name)
    (work / "run/weights").mkdir(parents=True)
    (work / "run/weights/EvNAS_A_cifar_weights.pt").symlink_to("../../EvNAS_A_cifar_weights.pt")
    state = NetworkImageNet(4, 3, 3, True, genotypes.EvNASA).state_dict()
    state = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 250, "state_dict": state}, work / "EvNAS_A_imagenet_model_best.pth.tar")


@pytest.fixture(scope="module")
def filled(tmp_path_factory, write_images):
    """The files of `fill`, which tests copy."""
    work = tmp_path_factory.mktemp("filled") / "work"
    fill(work, write_images)
    return work


def enter(work, patch, images=400):
    """Go into the folder `work`; CIFAR's reader is a stand-in with so many training images."""
    stand_in = {}
    exec(READER, stand_in)
    for name, classes in (("CIFAR10", 10), ("CIFAR100", 100)):
        patch.setattr(torchvision.datasets, name, stand_in["reader"](classes, images))
    patch.setattr(runs, "open_board", lambda run: False)  # whose import takes seconds
    patch.chdir(work)


@pytest.fixture
def folder(tmp_path, monkeypatch, filled):
    """The working directory, with the files of `fill`."""
    work = shutil.copytree(filled, tmp_path / "work", symlinks=True)
    enter(work, monkeypatch)
    return work


def run_here(text):
    """Run a published command in this process, with small sizes; return its parts."""
    command = parse_command(text)
    main, argv = main_of(command)
    main([*argv, *SIZES[command.script].split()])
    return command


def made_in(folder):
    """The one run directory below `folder` that was made."""
    (report,) = folder.rglob("report.html")
    return report.parent


@pytest.mark.parametrize("text", commands_of("test_"))
def test_published_test_runs(folder, capsys, text):
    command = run_here(text)
    images = 6 if "imagenet" in command.script else 200
    assert f"on {images} images" in capsys.readouterr().out


@pytest.mark.parametrize("text", first_is_fast(commands_of("train.py", "train_cifar100.py", "train_imagenet.py")))
def test_published_retraining_runs(folder, text):
    command = run_here(text)
    made = made_in(folder)
    assert made.parent.name == ("outputs" if "--dir" in command.arguments else "work")
    assert made.name.startswith("eval-NOTE-") == ("--note" in command.arguments)
    cell = "EvNASC" if "outputs" in command.arguments else "EvNASA"
    assert genotype_files.load(made / "genotype.json") == genotypes.get(cell)


@pytest.mark.parametrize("text", first_is_fast(commands_of("train_search.py")))
def test_published_search_runs(folder, text):
    command = run_here(text)
    made = made_in(folder)
    assert made.parent.name == ("outputs" if "--dir" in command.arguments else "work")
    assert (made / "genotype.pickle").exists()


@pytest.mark.parametrize("text", commands_of("train_searchNAS201.py"))
def test_published_search_on_nas_bench_201_runs(folder, monkeypatch, text):
    enter(folder, monkeypatch, images=50_000)
    run_here(text)
    assert made_in(folder).parent.name == "outputs"


@pytest.mark.parametrize("text", COMMANDS)
def test_published_flag_without_a_use_gets_a_note(capsys, text):
    command = parse_command(text)
    main, argv = main_of(command)
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = set(re.findall(r"--\w+", capsys.readouterr().out))
    with pytest.raises(SystemExit):  # flags are read before --epochs is refused
        main([*argv, "--epochs" if command.script.startswith("train") else "--layers", "none"])
    notes = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [word for word in command.arguments if word.startswith("--") and word not in shown]


def write_table(work):
    """Write a table to where the shell script looked for the benchmark; all networks have 50 %."""
    trial = {("cifar10-valid", 777): {"eval_acc1es": {"x-valid@199": 50.0}}}
    archs = [to_arch_string(ops) for ops in itertools.product(range(5), repeat=6)]
    records = {i: {"full": {"arch_str": arch, "all_results": trial}} for i, arch in enumerate(archs)}
    path = work.parent / "NAS_Bench_201/NAS-Bench-201-v1_1-096897.pth"
    path.parent.mkdir()
    torch.save({"meta_archs": archs, "arch2infos": records}, path)


@pytest.fixture
def table(folder):
    write_table(folder)


def run(folder, words):
    """Run a process in `folder`. It finds this project and CIFAR's stand-in, and gets no input."""
    (folder / "sitecustomize.py").write_text(READER + INSTALLED)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "PYTHON": sys.executable}
    settings = dict(cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = subprocess.run(words, timeout=300, **settings)
    assert "Traceback" not in done.stderr
    return done


class Finished(NamedTuple):
    """A finished run and what it printed."""

    run: Path
    out: list[str]  # lines of standard output
    err: list[str]  # lines of standard error


@pytest.fixture(scope="module")
def of_the_shell_script(tmp_path_factory, filled, quick_reports):
    work = shutil.copytree(filled, tmp_path_factory.mktemp("shell") / "work", symlinks=True)
    write_table(work)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        enter(work, patch, images=50_000)
        run_here(OF_THE_SHELL_SCRIPT)
    return Finished(made_in(work), out.getvalue().splitlines(), err.getvalue().splitlines())


def test_command_of_the_shell_script_looks_up_the_accuracy(of_the_shell_script):
    assert any("50.00" in line for line in of_the_shell_script.out)


def test_command_of_the_shell_script_says_what_cutout_removes(of_the_shell_script):
    (line,) = [line for line in of_the_shell_script.out if line.startswith("--cutout ")]
    assert "16 pixels" in line
    assert "19 %" in line


def test_command_of_the_shell_script_has_a_replaced_flag(of_the_shell_script):
    (note,) = of_the_shell_script.err
    assert "--init_channel " in note
    assert "--init_channels 16" in note


def test_command_of_the_shell_script_is_saved_without_the_configuration(of_the_shell_script):
    saved = json.loads((of_the_shell_script.run / "args.json").read_text())["args"]
    assert saved["cutout"]
    assert saved["track_running_stats"]
    assert "config_path" not in saved


def test_run_resumes_with_the_configuration(of_the_shell_script, monkeypatch, capsys):
    run = of_the_shell_script.run
    monkeypatch.chdir(run.parents[1])
    nas201.train_search.main(["--resume", str(run), "--config_path", "configs/EvNAS.config"])
    (line,) = capsys.readouterr().out.splitlines()
    assert str(run) in line


@pytest.mark.slow
def test_interactive_command_ends_without_input(folder, table):
    """After the script, `python -i` waits for input, which is empty here."""
    command = parse_command(OF_THE_SHELL_SCRIPT.replace("python", "python -i", 1))
    run(folder, [sys.executable, *command.here, *command.arguments, *SIZES[command.script].split()])
    assert list(folder.glob("outputs/search-*/report.html"))


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"LR": ["float", "0.1"]}, ["LR", "--learning_rate 0.1"]),
        ({"decay": ["float", 0.0005]}, ["decay", "--weight_decay", "0.0005"]),
        ({"momentum": ["float", "nan"]}, ["momentum", "--momentum", "nan"]),
        ({"nesterov": ["bool", "0"]}, ["nesterov", "--config_path"]),
        ({"optim": ["str", "RMSprop"]}, ["optim", "RMSprop", "SGD"]),
        ({"criterion": ["str", "SmoothSoftmax"]}, ["criterion", "SmoothSoftmax", "Softmax"]),
        ({"LR": 0.025}, ['"LR"', "0.025"]),
        ({"LR": ["float", "fast"]}, ['"LR"', "fast"]),
        ({"nesterov": ["bool", ["1"]]}, ['"nesterov"']),
        ([], ["JSON"]),
        (None, ["cannot read"]),
    ],
)
def test_configuration_that_differs_is_refused(folder, capsys, changed, named):
    path = folder / "configs/other.config"
    if changed is not None:
        path.write_text(json.dumps(CONFIG | changed if isinstance(changed, dict) else changed))
    with pytest.raises(SystemExit) as stopped:
        nas201.train_search.main(["--dataset", "digits", "--config_path", str(path)])
    line = capsys.readouterr().err
    assert stopped.value.code == 2
    assert line.count("\n") == 1
    for part in [str(path), *named]:
        assert part in line
    assert not list(folder.glob("search-*"))


def test_flags_that_agree_with_a_configuration_are_accepted(folder, monkeypatch):
    searched = []
    monkeypatch.setattr(search_cli, "run_search", lambda search, setup, *_: searched.append(setup.args))
    path = folder / "configs/EvNAS.config"
    path.write_text(json.dumps(CONFIG | {"LR": ["float", "0.1"], "decay": ["float", "0"]}))
    flags = ["--learning_rate", "0.1", "--weight_decay", "0"]
    nas201.train_search.main(["--dataset", "digits", "--device", "cpu", "--config_path", str(path), *flags])
    (args,) = searched
    assert (args.learning_rate, args.weight_decay) == (0.1, 0)


@pytest.mark.parametrize("size, share", [(32, 19), (16, 56)])
def test_cutout_text_says_how_much_is_removed(size, share):
    loader = argparse.Namespace(cutout=16, image_shape=(3, size, size))
    assert f"{share} %" in nas201.train_search.cutout_text(loader)


def test_parallel_with_several_gpus_asks_for_torchrun(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="--parallel.*--nproc_per_node=4"):
        train.check_parallel(torch.device("cuda:0"))


def test_parallel_under_torchrun_is_accepted(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("RANK", "0")
    train.check_parallel(torch.device("cuda:0"))
    assert capsys.readouterr().err == ""


def test_parallel_with_one_device_is_noted(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    train.check_parallel(torch.device("cpu"))
    assert "note: --parallel" in capsys.readouterr().err


RETRAINED = "--init_channels 2 --layers 3 --device cpu --dir".split()


@pytest.fixture(params=["outputs/eval-EXP-20210101-120000", "outputs/cifar100/eval-cifar100-EXP-1"])
def published_retraining(request, folder):
    """Weights as a published retraining left them, and the main function that tests them."""
    made = folder / request.param
    made.mkdir(parents=True)
    name, classes = ("test_cifar100", 100) if "cifar100" in request.param else ("test_cifar", 10)
    torch.save(NetworkCIFAR(2, classes, 3, True, genotypes.EvNASC).state_dict(), made / "weights.pt")
    return made, importlib.import_module(name).main


def test_cell_of_a_published_retraining_is_found_in_its_search(folder, published_retraining, monkeypatch, capsys):
    made, main = published_retraining
    main([*RETRAINED, str(made.relative_to(folder))])
    assert "outputs/genotype.pickle" in capsys.readouterr().out
    monkeypatch.chdir(made)
    main([*RETRAINED, "."])


def test_published_retraining_without_a_search_is_refused(folder, published_retraining, capsys):
    made, main = published_retraining
    (folder / "outputs/genotype.pickle").unlink()
    with pytest.raises(SystemExit):
        main([*RETRAINED, str(made)])
    line = capsys.readouterr().err
    for name in genotype_files.FILES:
        assert name in line


@pytest.mark.slow
def test_shell_script_makes_three_searches_and_a_table(folder, table):
    (folder / "searchNAS201.sh").symlink_to(ROOT / "searchNAS201.sh")
    sizes = SIZES["train_searchNAS201.py"].replace("--device cpu", "")
    gpu = "0" if torch.cuda.is_available() else "cpu"
    done = run(folder, [*shlex.split(f"bash ./searchNAS201.sh cifar10 {gpu} outputs"), *sizes.split()])
    assert done.returncode == 0, done.stderr
    for seed in (18, 19, 20):
        assert (folder / f"outputs/search-cifar10-seed{seed}/report.html").exists()
    assert "50.00 ± 0.00" in done.stdout
    assert "92.18 ± 1.11" in done.stdout
    assert "66.74" not in done.stdout


def test_replaced_flag_is_read_as_the_new_one():
    published = "--note a --tmp_data_dir=b/c --init_channel 7.0 --layers 3".split()
    new = "--save a --data b/c/imagenet --init_channels 7 --layers 3".split()
    assert train.make_parser().parse_args(published) == train.make_parser().parse_args(new)


def test_replaced_flag_is_noted_once(capsys):
    parser = train.make_parser()
    for _ in range(2):  # as a resumed run parses its arguments twice
        parser.parse_args("--note a --tmp_data_dir=b/c --init_channel 7.0 --layers 3".split())
    assert capsys.readouterr().err.count("note: ") == 3


def test_wrong_value_of_a_replaced_flag_names_the_new_one():
    with pytest.raises(UserError, match="--init_channels"):
        train.make_parser().parse_args(["--init_channel", "0"])
