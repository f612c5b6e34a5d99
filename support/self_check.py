"""Compare one training step with float64 arithmetic before a run starts.

A library's kernel can be wrong on one device, in one dtype or layout, or only from some size on.
The only symptom of a wrong kernel is a loss that falls a little more slowly. So a run first checks
one training step, unless the run computes in float32 on the CPU without --compile. The step uses
random images and a copy of the network. The check takes seconds and does not change the run's
random numbers.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from support import devices
from support.files import UserError
from support.kernel_check import KernelCheck, Row

# Number of pixels in the batch with which kernels are checked. The batch has at least two images.
PIXELS = 16 * 32 * 32
# Largest allowed error (norm), as a multiple of the error that rounding explains. The limit is
# above 1, because some kernels store partial sums in the format of the result.
LIMIT = 4
# Largest allowed difference between the gradients of a compiled and an uncompiled step, as a share
# of the gradient's norm. Rounding can flip a ReLU in a deep network, which changes gradients by up
# to 1 %.
COMPILED = 0.05


def is_needed(args: argparse.Namespace, device: torch.device) -> bool:
    """Return whether a run has to be checked.

    With --self_check, every run is checked unless it computes in float32 on the CPU without
    --compile.
    """
    return args.self_check and (device.type != "cpu" or args.amp or args.compile)


def self_check(
    network: nn.Module,
    loss: Callable,
    images: int,
    image_shape: tuple[int, int, int],
    classes: int,
    args: argparse.Namespace,
) -> str:
    """Check a training step of `network` on random images, and return a line for the log.

    There are `images` images of shape `image_shape`. `loss(network, x, y, compile)` returns the
    loss for normalised images x (B, 3, H, W) of the classes y (B,). Only --amp and --compile are
    read from `args`. If an operation is wrong, raises UserError, which names the operation, its
    setting and the remedy.
    """
    start = time.perf_counter()
    device = next(network.parameters()).device
    devices_of_rng = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices_of_rng):
        generator = torch.Generator().manual_seed(0)
        few = min(images, max(2, PIXELS // (image_shape[1] * image_shape[2])))
        with KernelCheck() as check:
            training_step(network, loss, few, image_shape, classes, args.amp, False, generator)
        refuse_wrong_kernels(check.rows, args)
        if args.compile:
            check_compiled_step(network, loss, images, image_shape, classes, args, generator)
    seconds = time.perf_counter() - start
    return f"self-check: the {len(check.rows)} outputs of a training step's kernels are right, {seconds:.1f} s"


def training_step(
    network: nn.Module,
    loss: Callable,
    images: int,
    image_shape: tuple[int, int, int],
    classes: int,
    amp: bool,
    compile: bool,
    generator: torch.Generator,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Compute a training step with a copy of `network`; see `self_check` for the arguments.

    Returns the loss and the gradients {name of the operation: flat tensor, float64}.
    """
    network = copy.deepcopy(network).train()
    device = next(network.parameters()).device
    x = torch.randn(images, *image_shape, generator=generator).to(device)
    x = x.contiguous(memory_format=devices.memory_format(device))
    y = torch.randint(classes, (images,), generator=generator).to(device)
    with devices.autocast(device, amp):
        value = loss(network, x, y, compile)
    value.backward()
    gradients = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.grad is not None:
                gradients.setdefault(operation_name(module), []).append(parameter.grad.flatten().cpu().double())
    return value.item(), {name: torch.cat(parts) for name, parts in gradients.items()}


def operation_name(module: nn.Module) -> str:
    """Return a name for a module that has weights, such as "depthwise convolution 5x5, dilation 2"."""
    if not isinstance(module, nn.Conv2d):
        return type(module).__name__
    depthwise = "depthwise " if module.groups > 1 else ""
    dilation = f", dilation {module.dilation[0]}" if module.dilation[0] > 1 else ""
    return f"{depthwise}convolution {'x'.join(map(str, module.kernel_size))}{dilation}"


def refuse_wrong_kernels(rows: list[Row], args: argparse.Namespace) -> None:
    """Raise UserError if the error of a kernel is more than LIMIT times what rounding explains."""
    wrong = max(rows, key=lambda row: row.overall)
    if wrong.overall > LIMIT:
        remedy = "leave --amp out, or " if args.amp else ""
        raise UserError(
            f"self-check: PyTorch {torch.__version__} computes {wrong} wrongly here: the error is "
            f"{wrong.overall:.3g} times what rounding explains; {remedy}install another version of PyTorch "
            "(--no-self_check trains anyway)"
        )


def check_compiled_step(
    network: nn.Module,
    loss: Callable,
    images: int,
    image_shape: tuple[int, int, int],
    classes: int,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """Raise UserError if the compiled step has larger errors than rounding explains.

    The compiled and the uncompiled step are both compared with an uncompiled float32 step. The
    errors of the uncompiled step say how much rounding explains.
    """
    state = generator.get_state()

    def gradients(amp: bool, compile: bool) -> dict[str, torch.Tensor]:
        generator.set_state(state)  # the same images every time
        return training_step(network, loss, images, image_shape, classes, amp, compile, generator)[1]

    precise = gradients(amp=False, compile=False)
    uncompiled = gradients(amp=True, compile=False) if args.amp else precise
    compiled = gradients(amp=args.amp, compile=True)
    for name, expected in precise.items():
        norm = expected.norm()
        # Twice the uncompiled step's error, because bfloat16 rounds the compiled step differently.
        allowed = 2 * (uncompiled[name] - expected).norm() / norm + COMPILED
        error = (compiled[name] - expected).norm() / norm
        if not error <= allowed:
            raise UserError(
                f"self-check: --compile with PyTorch {torch.__version__} computes the gradient of {name} wrongly here: "
                f"the error is {error:.3g} of the gradient's norm, and rounding explains only {allowed:.3g}; "
                "leave --compile out, or "
                "install another version of PyTorch (--no-self_check trains anyway)"
            )
