"""Commands with the published names of scripts and flags run here: small sizes are appended, the data are stand-ins.

Names of scripts that are called otherwise here are replaced as docs/differences.md says.
"""

import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import genotypes
import train
from model import NetworkCIFAR, NetworkImageNet
from nas201.genotypes import to_arch_string
from support import runs
from support.files import UserError

pytestmark = pytest.mark.usefixtures("quick_report")
ROOT = Path(__file__).resolve().parents[1]
DIFFERENCES = (ROOT / "docs/differences.md").read_text()
COMMANDS = (
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
    "python -i train_searchNAS201.py --data ../data --dataset cifar10 --dir outputs "
    "--api_path ../NAS_Bench_201/NAS-Bench-201-v1_1-096897.pth --config_path CIFAR.config --track_running_stats "
    "--gpu 0 --seed 18"
)
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
    genotypes.save(genotypes.EvNASC, work / "outputs/genotype.pickle")
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
    script, (name, *more), arguments = split(command)
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
    assert [note.split()[1] for note in notes] == hidden
    if script.startswith("train"):
        assert "finished; report: " in printed.out
        (made,) = [path.parent for path in folder.rglob("report.html")]
        assert made.parent.name == ("outputs" if "--dir" in arguments else "work")
        assert made.name.startswith("eval-NOTE-") == ("--note" in arguments)
        cell = "EvNASC" if "outputs" in arguments else "EvNASA"
        assert "search" in script or genotypes.load(made / "genotype.json") == genotypes.get(cell)
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


@pytest.mark.slow
def test_command_of_the_shell_script(folder, table):
    """`python -i` waits for input after the script: here there is none."""
    script, here, arguments = split(OF_THE_SHELL_SCRIPT)
    done = run(folder, [sys.executable, *here, *arguments, *SIZES[script].split()])
    assert "finished; report: outputs/search-" in done.stdout
    assert "cifar10 valid accuracy of the best 50.00" in done.stdout
    assert "note: --config_path is ignored: --learning_rate" in done.stderr


@pytest.mark.slow
def test_shell_script(folder, table):
    (folder / "searchNAS201.sh").symlink_to(ROOT / "searchNAS201.sh")
    sizes = SIZES["train_searchNAS201.py"].replace("--device cpu", "")
    done = run(folder, [*shlex.split("bash ./searchNAS201.sh cifar10 0 outputs"), *sizes.split()])
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
