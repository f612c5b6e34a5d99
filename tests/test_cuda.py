"""On a GPU (`make test-gpu`): the fast path is the plain one, also compiled and under autocast; resume, NCCL.

tests/test_fake_cuda.py needs no GPU.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_search
import torch
from torch.nn.functional import cross_entropy

import fast_search
import model_search
import nas201.encoding
import nas201.fast_search
import nas201.model_search
from encoding import decode, random_alphas
from support import runs

from golden import fill

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SPACES = {
    "s1": (fast_search, lambda: model_search.Network(16, 10, 8), lambda: decode(random_alphas(1))),
    "s2": (
        nas201.fast_search,
        lambda: nas201.model_search.Network(16, 5, 10),
        lambda: nas201.encoding.decode(nas201.encoding.random_alphas(1)),
    ),
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("settings", [{}, {"compile": True}, {"amp": True}], ids=["eager", "compile", "amp"])
def test_fast_is_plain_on_a_card(space, settings):
    fast, network, alphas = SPACES[space]
    network, alphas = network(), alphas()[0].cuda()
    amp, compile = settings.get("amp", False), settings.get("compile", False)
    plain = fill(network).cuda()
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x, y = torch.randn(32, 3, 32, 32, device="cuda"), torch.arange(32, device="cuda") % 10
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        expected, logits = plain(x, alphas), fast.forward(other, x, alphas, compile=compile)
    cross_entropy(expected, y).backward()
    cross_entropy(logits, y).backward()
    tolerance = 0.1 if amp else 1e-3
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    gradients, wanted = (torch.cat([p.grad.flatten() for p in of.parameters()]) for of in (other, plain))
    assert (gradients - wanted).norm() <= (0.5 if amp else 2e-2) * wanted.norm()


def test_a_search_on_a_card_is_resumed(tmp_path):
    whole = test_search.search(tmp_path, device="cuda", epochs=2)
    assert len(test_search.history(whole)) == 2
    checkpoint = runs.load_checkpoint(whole / "checkpoint.prev.pt")
    assert checkpoint["completed"] == 1
    (whole / "checkpoint.prev.pt").replace(whole / "checkpoint.pt")
    test_search.train_search.main(["--resume", str(whole)])
    assert len(test_search.history(whole)) == 2


def test_a_process_group_of_one_over_nccl(tmp_path):
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        value = torch.full((3,), 2.0, device="cuda")
        torch.distributed.all_reduce(value)
        assert value.tolist() == [2.0] * 3
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name, flags", [("search_s1", ["--full"]), ("search_s2", ["--full"]), ("retrain", [])])
def test_benchmarks_on_a_card(name, flags):
    command = [sys.executable, f"benchmarks/{name}.py", "--device", "cuda", "--rounds", "1", *flags]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=3000)
