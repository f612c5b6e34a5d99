"""Two gloo processes on the CPU: the same fitness as one, a lost process, another number of processes on resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import loaders
import train
import train_search
from encoding import decode, random_alphas
from engine import measure_fitness
from model_search import Network
from support import runs

ROOT = Path(__file__).resolve().parents[1]
SEARCH = "--dataset digits --pop_size 5 --tsize 2 --init_channels 2 --layers 2 --device cpu".split()
SEARCH += "--train_samples 128 --valid_samples 60 --batch_size 32".split()
RETRAIN = "--dataset digits --arch EvNASB --init_channels 2 --layers 3 --device cpu".split()
RETRAIN += "--train_samples 128 --batch_size 32 --drop_path_prob 0.2".split()
SCRIPTS = [pytest.param(train_search, SEARCH, id="search"), pytest.param(train, RETRAIN, id="retraining")]


def torchrun(*command, **settings):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, env=environment, text=True, **settings)


def measure():
    """The fitness of seven individuals, two of them equal, on the digits."""
    digits = data.load("digits", None, "test")
    loader = loaders.Loader(digits, 100, data.augmentation("digits", digits), torch.device("cpu"), shared=False)
    torch.manual_seed(3)
    network = Network(2, 10, 2)
    alphas = random_alphas(7, generator=torch.Generator().manual_seed(4))
    alphas[5] = alphas[1]
    return measure_fitness(network, decode(alphas), loader, "batch")


@pytest.mark.slow
def test_two_processes_measure_the_fitness_that_one_does(tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(
        "import sys, torch\n"
        "from support import distributed\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from test_distributed import measure\n"
        "torch.set_num_threads(1)\n"
        "distributed.join_process_group(torch.device('cpu'))\n"
        f"torch.save(measure(), {str(tmp_path)!r} + f'/fitness{{distributed.rank()}}.pt')\n"
        "distributed.leave_process_group()\n"
    )
    assert torchrun(script).wait(timeout=300) == 0
    expected = measure()
    assert len(expected.unique()) > 1
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"fitness{rank}.pt"), expected)


def wait_for_lines(process, path, count):
    """Waits until history.jsonl below `path` has `count` lines; returns that file."""
    deadline = time.monotonic() + 200
    while not any(len(file.read_text().splitlines()) >= count for file in path.glob("*/history.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    return next(path.glob("*/history.jsonl"))


def finish(main, run, epochs):
    """Resumes a run, shortened so that the test ends, in this process."""
    args = json.loads((run / "args.json").read_text())
    args["args"]["epochs"] = epochs
    (run / "args.json").write_text(json.dumps(args))
    main(["--resume", str(run)])
    assert len((run / "history.jsonl").read_text().splitlines()) == epochs


@pytest.mark.slow
@pytest.mark.parametrize("script, argv", SCRIPTS)
def test_a_lost_process_ends_the_run_in_one_line_and_one_process_continues_it(tmp_path, script, argv):
    process = torchrun(script.__file__, *argv, "--epochs", 40, "--dir", tmp_path, stderr=subprocess.PIPE)
    history = wait_for_lines(process, tmp_path, 2)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = {
        next(v for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if v.startswith("RANK=")): int(pid)
        for pid in workers
    }
    os.kill(ranks["RANK=1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "another process of this run is gone" in errors, errors
    # torchrun adds its own report; ours has no traceback.
    assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1, errors
    assert f'{Path(script.__file__).name}", line' not in errors, errors
    finish(script.main, history.parent, len(history.read_text().splitlines()) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("script, argv", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_is_interrupted(tmp_path, script, argv, number):
    """It passes the signal on; both processes stop at the same step, and one of them saves."""
    process = torchrun(script.__file__, *argv, "--epochs", 40, "--dir", tmp_path, stderr=subprocess.PIPE)
    history = wait_for_lines(process, tmp_path, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    (line,) = (line for line in errors.splitlines() if line.startswith("interrupted in "))
    assert f"continue with: python {Path(script.__file__).name} --resume {history.parent}" in line
    completed, checkpoint = (
        len(history.read_text().splitlines()),
        runs.load_checkpoint(history.parent / "checkpoint.pt"),
    )
    assert checkpoint["completed"] == completed and checkpoint["partial"]["steps"] > 0
    finish(script.main, history.parent, completed + 1)
