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
from encoding import decode, random_alphas
from engine import measure_fitness
from model_search import Network

ROOT = Path(__file__).resolve().parents[1]
SEARCH = "train_search.py --dataset digits --pop_size 5 --tsize 2 --init_channels 2 --layers 2 --device cpu".split()
SEARCH += "--train_samples 128 --valid_samples 60 --batch_size 32".split()


def torchrun(*command, **settings):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, env=environment, text=True, **settings)


def measure():
    """The fitness of seven individuals, two of them equal, on the digits."""
    digits = data.load("digits", None, "test")
    loader = data.Loader(digits, 100, data.augmentation("digits", digits), torch.device("cpu"), shared=False)
    torch.manual_seed(3)
    network = Network(2, 10, 2)
    alphas = random_alphas(7, generator=torch.Generator().manual_seed(4))
    alphas[5] = alphas[1]
    return measure_fitness(network, decode(alphas), loader, "batch")


@pytest.mark.slow
def test_two_processes_measure_the_fitness_that_one_does(tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(
        "import sys, torch, utils\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from test_distributed import measure\n"
        "torch.set_num_threads(1)\n"
        "utils.join_process_group(torch.device('cpu'))\n"
        f"torch.save(measure(), {str(tmp_path)!r} + f'/fitness{{utils.rank()}}.pt')\n"
        "utils.leave_process_group()\n"
    )
    assert torchrun(script).wait(timeout=300) == 0
    expected = measure()
    assert len(expected.unique()) > 1
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"fitness{rank}.pt"), expected)


@pytest.mark.slow
def test_a_lost_process_ends_the_search_in_one_line_and_one_process_continues_it(tmp_path):
    run = torchrun(*SEARCH, "--epochs", 40, "--dir", tmp_path, "--run_name", "run", stderr=subprocess.PIPE)
    history = tmp_path / "run" / "history.jsonl"
    deadline = time.monotonic() + 200
    while not (history.exists() and len(history.read_text().splitlines()) >= 2):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    ranks = {
        pid: next(v for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if v.startswith("RANK="))
        for pid in workers
    }
    os.kill(int(next(pid for pid, rank in ranks.items() if rank == "RANK=1")), signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert [line for line in errors.splitlines() if line.startswith("error: ")] in ([], [gone_line(errors)])
    completed = len(history.read_text().splitlines())
    import train_search

    args = json.loads((tmp_path / "run" / "args.json").read_text())
    args["args"]["epochs"] = completed + 1  # a shorter run, so that the test ends
    (tmp_path / "run" / "args.json").write_text(json.dumps(args))
    train_search.main(["--resume", str(tmp_path / "run")])
    assert len(history.read_text().splitlines()) == completed + 1


def gone_line(errors):
    return next(line for line in errors.splitlines() if "another process of this run is gone" in line)
