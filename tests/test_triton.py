"""The Triton kernels equal their references, and the cells that call them equal the plain ones. No test needs a GPU.

Triton's interpreter computes the kernels on the CPU, and its compiler builds them for a GPU that is not there.
"""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fast_search
import nas201.fast_search
import nas201.model_search
from encoding import decode
from fitness import batch_norm_mode
from model_search import Network
from operations import average_pool

from golden import assert_close, fill, images, seeded_alphas

pytest.importorskip("triton", reason="this build of PyTorch has no Triton")
triton_kernels = importlib.import_module("triton_kernels")
ROOT = Path(__file__).resolve().parents[1]


# ---- kernels


@pytest.mark.slow
def test_kernels_equal_their_references_in_the_interpreter():
    code = "import json, torch, triton_kernels\n"
    code += "print(json.dumps(triton_kernels.errors(torch.device('cpu'), torch.float32)))"
    variables = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert {case.split()[0] for case in errors} == {"border", "convolution,", "statistics,", "sum,"}
    for case, error in errors.items():
        assert error < 1e-6, case


def kernels_and_constants():
    """Yield each kernel with settings of the paper's sizes."""
    for C, K, affine in itertools.product((16, 32, 64), (3, 5), (False, True)):
        constants = {"C": C, "CHANNELS": C, "K": K, "STRIDE": 1, "DILATION": 1, "AFFINE": affine, "SIZE": 1024 // C}
        yield triton_kernels.separable_kernel, constants
    for C in (16, 32, 64):
        yield triton_kernels.normalisation_kernel, {"C": C, "CHANNELS": C, "SIZE": 64}
    for first in (False, True):
        yield triton_kernels.weighted_sum_kernel, {"FIRST": first, "SIZE": triton_kernels.BLOCK}
        yield triton_kernels.border_kernel, {"TWO": first, "SIZE": triton_kernels.BLOCK}


@pytest.mark.slow
@pytest.mark.parametrize("kernel, constants", list(kernels_and_constants()))
def test_kernel_compiles_for_an_h100_without_spilling_registers(kernel, constants, tmp_path):
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(["moments", "affine", "depthwise", "pointwise", "weight"], "*fp32")
    types |= dict.fromkeys(["pixels", "programs", "count", "C", "H", "W", "H_in", "W_in"], "i32")
    types |= dict.fromkeys(["stride0", "stride1", "stride4"], "i32") | {"eps": "fp32"}
    signature = {name: types.get(name, "*bf16") for name in kernel.arg_names}  # feature maps: y, total, x, x0, ..
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    built = compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    (tmp_path / "cubin").write_bytes(built.asm["cubin"])
    tool = [knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "cubin"]
    usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"STACK:(\d+)", usage)[1]) < 32  # bytes; spilled registers would be there
    assert " LOCAL:0 " in usage


@pytest.mark.parametrize("H, W", [(1, 1), (2, 3), (3, 2), (8, 8)])
def test_border_makes_an_average_pool_of_a_3x3_box(H, W):
    x = images(5, (2, 3, H, W)).double()
    active, means = triton_kernels.border_reference([x]).chunk(2, dim=1)
    assert torch.equal(active, torch.nn.functional.pad(torch.relu(x), (1, 1, 1, 1)))
    assert torch.equal(means[..., 1:-1, 1:-1], x)
    box = torch.nn.functional.avg_pool2d(means, 3, stride=1)
    torch.testing.assert_close(box, average_pool(x), rtol=1e-14, atol=1e-14)


# ---- cells


@pytest.fixture
def references(monkeypatch):
    """Fitness calls the kernels' references, which compute in float64 too."""

    def separable(*args):
        y = triton_kernels.separable_reference(*args)
        return y, y

    def normalisation(y, weight, pixels, eps):
        assert pixels == y.numel() // y.shape[1]
        return triton_kernels.normalisation_reference(y, weight, eps)

    monkeypatch.setattr(triton_kernels, "separable", separable)
    monkeypatch.setattr(triton_kernels, "normalisation", normalisation)
    monkeypatch.setattr(triton_kernels, "weighted_sum", triton_kernels.weighted_sum_reference)
    monkeypatch.setattr(triton_kernels, "with_border", triton_kernels.border_reference)
    for module in (fast_search, nas201.fast_search):
        monkeypatch.setattr(module, "uses_triton", lambda x: True)


def plain_logits(network, x, alphas, bn):
    with torch.no_grad(), batch_norm_mode(network, bn):
        return network(x, alphas)


@pytest.mark.parametrize("layers, side", [(1, 8), pytest.param(4, 12, marks=pytest.mark.slow)])
def test_fitness_in_the_darts_space_equals_the_plain_one(references, layers, side):
    network = fill(Network(4, 10, layers)).double()
    x = images(3, (4, 3, side, side)).double()
    evaluator = fast_search.Evaluator(network, "batch")
    evaluator.set_batch(x)
    assert evaluator.cell_of.__module__ == "fused_search"
    for seed in (1, 2):
        alphas = decode(seeded_alphas(seed)).double()
        assert_close(evaluator.logits(alphas), plain_logits(network, x, alphas, "batch"), 1e-8)


@pytest.mark.parametrize("side", [4, 12])  # 1x1 and 3x3 pixels in the last stage
def test_fitness_in_nas_bench_201_equals_the_plain_one(references, side):
    network = fill(nas201.model_search.Network(4, 2, 10, track_running_stats=True)).double()
    x = images(3, (3, 3, side, side)).double()
    evaluator = nas201.fast_search.Evaluator(network, "running")
    evaluator.set_batch(x)
    assert evaluator.by_source
    for seed in (5, 6):
        alphas = seeded_alphas(seed, (1, 6, 5)).double()
        assert_close(evaluator.logits(alphas), plain_logits(network, x, alphas, "running"), 1e-12)


# ---- which runs use them


@pytest.mark.parametrize("error, usable", [(0.01, True), (0.03, False), (float("nan"), False), (None, False)])
def test_wrong_kernels_are_not_used(error, usable, monkeypatch, capsys):
    def errors(device, dtype):
        if error is None:
            raise RuntimeError("no compiler")
        return {"right": 0.0, "case": error}

    monkeypatch.setattr(triton_kernels, "errors", errors)
    triton_kernels.usable.cache_clear()
    assert triton_kernels.usable(torch.device("cpu")) == usable
    assert ("fitness uses PyTorch's kernels" in capsys.readouterr().err) != usable
    triton_kernels.usable.cache_clear()


def test_cpus_do_not_use_them():
    assert not fast_search.uses_triton(torch.ones(1, 1, 1, 1, dtype=torch.bfloat16))
