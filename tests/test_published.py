"""Commands with the published names of scripts and flags run here: small sizes are appended, the data are stand-ins.

Names of scripts that are called otherwise here are replaced as docs/differences.md says.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

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
DIFFERENCES = (ROOT / "docs/differences.md").read_text()
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
CIFAR_TRAIN = "--epochs 1 --init_channels 2 --layers 3 --train_samples 96 --device cpu"
SIZES = {
    "train_search.py": f"{SEARCH} --layers 2",
    "train_searchNAS201.py": f"{SEARCH} --num_cells 1",
    "train.py": CIFAR_TRAIN,
    "train_cifar100.py": CIFAR_TRAIN,
    "train_imagenet.py": "--epochs 1 --init_channels 4 --layers 3 --batch_size 6 --workers 0 --device cpu",
    "test_cifar.py": "--init_channels 2 --layers 3 --device cpu",
    "test_cifar100.py": "--init_channels 2 --layers 3 --device cpu",
    "test_imagenet.py": "--init_channels 4 --layers 3 --workers 0 --data data/imagenet --device cpu",
}
# What torchvision's reader would return: one-colour images, all 50,000 for training, as the fixed split needs them.
READER = """
import numpy
import torchvision

def reader(classes):
    class CIFAR:
        def __init__(self, root, train, download):
            self.targets = [i % classes for i in range(50_000 if train else 200)]
            self.data = numpy.uint8(self.targets)[:, None, None, None] + numpy.zeros((1, 32, 32, 3), numpy.uint8)
            self.classes = [str(i) for i in range(classes)]
    return CIFAR

torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100 = reader(10), reader(100)
"""


def split(command):
    """(script as published, words that start it here, arguments) of a command line."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = words[at]
    called = re.search(rf"^\| `{script}` \| `([^`]*)`", DIFFERENCES, flags=re.MULTILINE)
    here = shlex.split((called[1] if called else script).removeprefix("python "))
    return script, [*words[1:at], *here], words[at + 1 :]


@pytest.fixture
def folder(tmp_path, monkeypatch, make_images):
    """The working directory, with a search's run, photographs and published weights; CIFAR's reader is a stand-in."""
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(torchvision.datasets, name, None)
    exec(READER, {})
    make_images("train", 4, [(80, 70)])
    make_images("val", 2, [(80, 70)])
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    (tmp_path / "images").rename(work / "data/imagenet")
    (work / "outputs").mkdir()
    genotype_files.save(genotypes.EvNASC, work / "outputs/genotype.pickle")
    (work / "configs").mkdir()
    (work / "configs/EvNAS.config").write_text(json.dumps(CONFIG))
    for name, classes in (("EvNAS_A_cifar_weights.pt", 10), ("EvNAS_A_cifar100_weights.pt", 100)):
        torch.save(NetworkCIFAR(2, classes, 3, True, genotypes.EvNASA).state_dict(), work / name)
    (work / "run/weights").mkdir(parents=True)
    (work / "run/weights/EvNAS_A_cifar_weights.pt").symlink_to(work / "EvNAS_A_cifar_weights.pt")
    state = NetworkImageNet(4, 3, 3, True, genotypes.EvNASA).state_dict()
    state = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 250, "state_dict": state}, work / "EvNAS_A_imagenet_model_best.pth.tar")
    monkeypatch.setattr(runs, "open_board", lambda run: False)  # whose import takes seconds
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize("command", COMMANDS)
def test_command(folder, capsys, command):
    script, here, arguments = split(command)
    name, *more = here[1:] if here[0] == "-i" else here
    if name == "-m":
        name, *more = more
    main = importlib.import_module(name.removesuffix(".py")).main
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = set(re.findall(r"--\w+", capsys.readouterr().out))
    main([*more, *arguments, *SIZES[script].split()])
    printed = capsys.readouterr()
    hidden = [word for word in arguments if word.startswith("--") and word not in shown]
    notes = [line for line in printed.err.splitlines() if line.startswith("note: ")]
    hidden += ["--parallel"] if "--parallel" in arguments else []  # with one device it changes nothing
    assert [note.split()[1] for note in notes] == hidden
    if script.startswith("train"):
        assert "finished; report: " in printed.out
        (made,) = [path.parent for path in folder.rglob("report.html")]
        assert made.parent.name == ("outputs" if "--dir" in arguments else "work")
        assert made.name.startswith("eval-NOTE-") == ("--note" in arguments)
        cell = "EvNASC" if "outputs" in arguments else "EvNASA"
        assert "search" in script or genotype_files.load(made / "genotype.json") == genotypes.get(cell)
    else:
        assert f"on {6 if 'imagenet' in script else 200} images" in printed.out


@pytest.fixture
def table(folder):
    """Where the shell script looked for the benchmark, a table in which all networks have 50 %."""
    trial = {("cifar10-valid", 777): {"eval_acc1es": {"x-valid@199": 50.0}}}
    archs = [to_arch_string(ops) for ops in itertools.product(range(5), repeat=6)]
    records = {i: {"full": {"arch_str": arch, "all_results": trial}} for i, arch in enumerate(archs)}
    path = folder.parent / "NAS_Bench_201/NAS-Bench-201-v1_1-096897.pth"
    path.parent.mkdir()
    torch.save({"meta_archs": archs, "arch2infos": records}, path)


def run(folder, words):
    """A process in `folder` that finds this project's modules, CIFAR's stand-in and nothing on standard input."""
    (folder / "sitecustomize.py").write_text(READER)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "PYTHON": sys.executable}
    settings = dict(cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = subprocess.run(words, timeout=300, **settings)
    assert "Traceback" not in done.stderr
    return done


def test_command_of_the_shell_script(folder, table, capsys):
    script, _, arguments = split(OF_THE_SHELL_SCRIPT)
    argv = [*arguments, *SIZES[script].split()]
    nas201.train_search.main(argv)
    printed = capsys.readouterr()
    assert "finished; report: outputs/search-" in printed.out
    assert "cifar10 valid accuracy of the best 50.00" in printed.out
    (line,) = (line for line in printed.out.splitlines() if line.startswith("--cutout "))
    assert "a square of 16 pixels a side, on average 19 % of each training image" in line
    assert printed.err == "note: --init_channel is read as --init_channels 16\n"
    (made,) = folder.glob("outputs/search-*")
    saved = json.loads((made / "args.json").read_text())["args"]
    assert saved["cutout"] and saved["track_running_stats"] and "config_path" not in saved
    nas201.train_search.main(["--resume", str(made), "--config_path", "configs/EvNAS.config"])


@pytest.mark.slow
def test_command_that_waits_for_input(folder, table):
    """`python -i` does so after the script: here there is none."""
    script, here, arguments = split(OF_THE_SHELL_SCRIPT.replace("python", "python -i", 1))
    done = run(folder, [sys.executable, *here, *arguments, *SIZES[script].split()])
    assert "finished; report: outputs/search-" in done.stdout


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"LR": ["float", "0.1"]}, "LR is 0.1, but --learning_rate is 0.025; give --learning_rate 0.1"),
        ({"decay": ["float", 0.0005]}, "decay is 0.0005, but --weight_decay is 0.0003"),
        ({"momentum": ["float", "nan"]}, "momentum is nan, but --momentum is 0.9"),
        (
            {"nesterov": ["bool", "0"]},
            "nesterov is False, but a search uses Nesterov momentum; leave --config_path out",
        ),
        ({"optim": ["str", "RMSprop"]}, "optim is RMSprop, but a search uses SGD"),
        ({"criterion": ["str", "SmoothSoftmax"]}, "criterion is SmoothSoftmax, but a search uses Softmax"),
        ({"LR": 0.025}, '"LR" is 0.025; it must look like ["float", "0.025"]'),
        ({"LR": ["float", "fast"]}, """"LR" is ['float', 'fast']; it must"""),
        ({"nesterov": ["bool", ["1"]]}, '"nesterov" is'),
        ([], "not a JSON object"),
        (None, "cannot read"),
    ],
)
def test_a_configuration_that_differs(folder, monkeypatch, capsys, changed, message):
    path = folder / "configs/other.config"
    if changed is not None:
        path.write_text(json.dumps(CONFIG | changed if isinstance(changed, dict) else changed))
    with pytest.raises(SystemExit) as stopped:
        nas201.train_search.main(["--dataset", "digits", "--config_path", str(path)])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and message in line and str(path) in line and line.count("\n") == 1
    assert not list(folder.glob("search-*"))


def test_flags_go_before_a_configuration(folder, monkeypatch):
    monkeypatch.setattr(search_cli, "run_search", lambda *args: None)
    path = folder / "configs/EvNAS.config"
    path.write_text(json.dumps(CONFIG | {"LR": ["float", "0.1"], "decay": ["float", "0"]}))
    flags = ["--learning_rate", "0.1", "--weight_decay", "0"]
    nas201.train_search.main(["--dataset", "digits", "--device", "cpu", "--config_path", str(path), *flags])


@pytest.mark.parametrize("size, share", [(32, 19), (16, 56)])
def test_cutout_says_what_it_removes(size, share):
    loader = argparse.Namespace(cutout=16, image_shape=(3, size, size))
    assert f"on average {share} % of each training image" in nas201.train_search.cutout_text(loader)


def test_parallel_with_several_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="--parallel: one process uses one of the 4 GPUs.*torchrun --nproc_per_node=4"):
        train.check_parallel(torch.device("cuda:0"))
    monkeypatch.setenv("RANK", "0")
    train.check_parallel(torch.device("cuda:0"))


@pytest.mark.parametrize("run_dir", ["outputs/eval-EXP-20210101-120000", "outputs/cifar100/eval-cifar100-EXP-1"])
def test_weights_of_a_published_retraining(folder, run_dir, monkeypatch, capsys):
    """Its cell is in the folder of its search."""
    made, classes = folder / run_dir, 100 if "cifar100" in run_dir else 10
    made.mkdir(parents=True)
    torch.save(NetworkCIFAR(2, classes, 3, True, genotypes.EvNASC).state_dict(), made / "weights.pt")
    main = importlib.import_module("test_cifar100" if classes == 100 else "test_cifar").main
    argv = "--init_channels 2 --layers 3 --device cpu --dir".split()
    main([*argv, run_dir])
    assert "outputs/genotype.pickle" in capsys.readouterr().out
    monkeypatch.chdir(made)
    main([*argv, "."])
    (folder / "outputs/genotype.pickle").unlink()
    with pytest.raises(SystemExit):
        main([*argv, "."])
    assert "neither genotype.json nor genotype.pickle" in capsys.readouterr().err


@pytest.mark.slow
def test_shell_script(folder, table):
    (folder / "searchNAS201.sh").symlink_to(ROOT / "searchNAS201.sh")
    sizes = SIZES["train_searchNAS201.py"].replace("--device cpu", "")
    gpu = "0" if torch.cuda.is_available() else "cpu"
    done = run(folder, [*shlex.split(f"bash ./searchNAS201.sh cifar10 {gpu} outputs"), *sizes.split()])
    assert done.returncode == 0, done.stderr
    for seed in (18, 19, 20):
        assert (folder / f"outputs/search-cifar10-seed{seed}/report.html").exists()
    assert "50.00 ± 0.00" in done.stdout and "92.18 ± 1.11" in done.stdout and "66.74" not in done.stdout


def test_a_replaced_flag_is_read_as_if_it_were_the_other(capsys):
    parser = train.make_parser()
    args = [parser.parse_args("--note a --tmp_data_dir=b/c --init_channel 7.0 --layers 3".split()) for _ in range(2)]
    assert (
        args[0]
        == args[1]
        == train.make_parser().parse_args("--save a --data b/c/imagenet --init_channels 7 --layers 3".split())
    )
    assert capsys.readouterr().err.count("note: ") == 3  # as a resumed run parses its arguments twice
    capsys.readouterr()
    with pytest.raises(UserError, match="--init_channels: 0 must be at least 2"):
        parser.parse_args(["--init_channel", "0"])
