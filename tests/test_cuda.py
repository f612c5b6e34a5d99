"""What runs on a GPU: without one, shapes and devices through fake CUDA tensors; with one, the tests marked `cuda`.

Fake tensors have shapes, types and devices but no values, so reading a value from one, which on a GPU would be a
synchronisation, raises, and so does an operation on tensors of two devices.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_search
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import fast_search
import model_search
import nas201.encoding
import nas201.fast_search
import nas201.model_search
from encoding import decode, random_alphas
from engine import PlainEvaluator, plain_forward
from support import runs

from golden import fill

ROOT = Path(__file__).resolve().parents[1]
needs_card = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# At most so many operations of a pass launch kernels on the fast path in float32, at the paper's size.
LAUNCHES = {
    "s1": {"training": 3310, "batch": 3300, "running": 3430},
    "s2": {"training": 850, "batch": 750, "running": 425},
}
MAKE = {
    "s1": lambda: (fast_search, model_search.Network(16, 10, 8), torch.rand(2, 14, 8)),
    "s2": lambda: (nas201.fast_search, nas201.model_search.Network(16, 5, 10), torch.rand(1, 6, 5)),
}


class Launches(TorchDispatchMode):
    """Counts the operations that launch kernels: aten calls but views and allocations; a `_foreach_` is one.

    Holds every floating-point result to the CUDA device.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function.namespace == "aten" and "empty" not in function.__name__:
            self.count += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "cuda", function
        return out


@pytest.fixture
def fake_cuda():
    with FakeTensorMode(), torch.device("cuda"):
        yield


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def precision(request):
    """The type that autocast computes in."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", request.param is torch.bfloat16)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield request.param
    torch.clear_autocast_cache()
    torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("space", MAKE)
@pytest.mark.parametrize("way", ["plain", "fast"])
def test_training_on_a_fake_card(fake_cuda, precision, space, way):
    fast, network, alphas = MAKE[space]()
    forward = fast.forward if way == "fast" else plain_forward
    with Launches() as launches:
        logits = forward(network, torch.randn(64, 3, 32, 32), alphas)
    assert logits.shape == (64, 10) and logits.device.type == "cuda" and logits.dtype == torch.float32
    assert way == "plain" or precision is torch.bfloat16 or launches.count <= LAUNCHES[space]["training"]


@pytest.mark.parametrize("space", MAKE)
@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("way", ["plain", "fast"])
def test_fitness_on_a_fake_card(fake_cuda, precision, space, bn, way):
    fast, network, alphas = MAKE[space]()
    with torch.no_grad():
        evaluator = (fast.Evaluator if way == "fast" else PlainEvaluator)(network.train(bn == "batch"), bn)
        evaluator.set_batch(torch.randn(64, 3, 32, 32))
        with Launches() as launches:
            logits = evaluator.logits(alphas)
    assert logits.shape == (64, 10) and logits.device.type == "cuda" and logits.dtype == torch.float32
    assert way == "plain" or precision is torch.bfloat16 or launches.count <= LAUNCHES[space][bn]


# ---- with a card: `make test-gpu`


@pytest.mark.parametrize("space", [pytest.param(space, marks=needs_card) for space in MAKE])
@pytest.mark.parametrize("settings", [{}, {"compile": True}, {"amp": True}], ids=["eager", "compile", "amp"])
def test_fast_is_plain_on_a_card(space, settings):
    fast, network, _ = MAKE[space]()
    raw = random_alphas(1) if space == "s1" else nas201.encoding.random_alphas(1)
    alphas = (decode if space == "s1" else nas201.encoding.decode)(raw)[0].cuda()
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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_search_on_a_card_is_resumed(tmp_path):
    whole = test_search.search(tmp_path, device="cuda", epochs=2)
    assert len(test_search.history(whole)) == 2
    checkpoint = runs.load_checkpoint(whole / "checkpoint.prev.pt")
    assert checkpoint["completed"] == 1
    (whole / "checkpoint.prev.pt").replace(whole / "checkpoint.pt")
    test_search.train_search.main(["--resume", str(whole)])
    assert len(test_search.history(whole)) == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_process_group_of_one_over_nccl(tmp_path):
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        value = torch.full((3,), 2.0, device="cuda")
        torch.distributed.all_reduce(value)
        assert value.tolist() == [2.0] * 3
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["search_s1", "search_s2", "retrain"])
def test_benchmarks_on_a_card(name):
    command = [sys.executable, f"benchmarks/{name}.py", "--device", "cuda", "--full", "--rounds", "1"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=3000)
