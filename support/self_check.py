"""Compare a run's own training step with precise arithmetic before the run begins.

A library's kernel can be wrong on one device, in one dtype, in one layout, from one size on, and nothing says so: the
loss falls a little slower. So a run in a setting other than float32 on the CPU checks one step first, on random images
and a copy of the network. It takes seconds and moves no random number of the run.
"""

import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from support import devices
from support.files import UserError
from support.kernel_check import KernelCheck

PIXELS = 16 * 32 * 32  # of the images whose kernels are checked; at least two images
LIMIT = 4  # times what rounding explains, by norm: some kernels store partial sums in the format of the result
# How far a compiled step's gradients may be from an uncompiled step's, as a share of their norm. Where rounding flips a
# ReLU in a deep network, it changes gradients by up to 1 %.
COMPILED = 0.05


def is_needed(args, device: torch.device) -> bool:
    """Return whether the run's setting is one that has to be checked, and the flag does not forbid it."""
    return args.self_check and (device.type != "cpu" or args.amp or args.compile)


def self_check(
    network: nn.Module,
    loss: Callable,
    images: int,
    image_shape: tuple,
    classes: int,
    args,
) -> str:
    """Check a training step of `network` on batches of so many images (3, H, W); return a line for the log.

    loss(network, x, y, compile) returns the loss of images x (B, 3, H, W), normalised, and their classes y (B,).
    Raises UserError naming the operation, its setting and the remedy.
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


def training_step(network, loss, images, image_shape, classes, amp, compile, generator):
    """Return the loss and the gradients {kind of operation: flat tensor, float64} of a step of a copy of `network`."""
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
                gradients.setdefault(kind_of(module), []).append(parameter.grad.flatten().cpu().double())
    return value.item(), {kind: torch.cat(parts) for kind, parts in gradients.items()}


def kind_of(module: nn.Module) -> str:
    """Return words for a module that has weights, such as "depthwise convolution 5x5, dilation 2"."""
    if not isinstance(module, nn.Conv2d):
        return type(module).__name__
    depthwise = "depthwise " if module.groups > 1 else ""
    dilation = f", dilation {module.dilation[0]}" if module.dilation[0] > 1 else ""
    return f"{depthwise}convolution {'x'.join(map(str, module.kernel_size))}{dilation}"


def refuse_wrong_kernels(rows, args) -> None:
    """Raise UserError if a kernel errs by more than `LIMIT` times what rounding explains."""
    wrong = max(rows, key=lambda row: row.overall)
    if wrong.overall > LIMIT:
        remedy = "leave --amp out, or " if args.amp else ""
        raise UserError(
            f"self-check: PyTorch {torch.__version__} computes {wrong} wrongly here: the error is "
            f"{wrong.overall:.3g} times what rounding explains; {remedy}install another version of PyTorch "
            "(--no-self_check trains all the same)"
        )


def check_compiled_step(network, loss, images, image_shape, classes, args, generator) -> None:
    """Raise UserError if the compiled step is further from a float32 step than the uncompiled one is."""
    state = generator.get_state()

    def gradients(amp, compile):
        generator.set_state(state)  # the same images for each
        return training_step(network, loss, images, image_shape, classes, amp, compile, generator)

    _, precise = gradients(False, False)
    _, plain = gradients(args.amp, False) if args.amp else (None, precise)
    _, compiled = gradients(args.amp, True)
    for kind, expected in precise.items():
        norm = expected.norm()
        allowed = 2 * (plain[kind] - expected).norm() / norm + COMPILED  # bfloat16 rounds in both, but not alike
        error = (compiled[kind] - expected).norm() / norm
        if not error <= allowed:
            raise UserError(
                f"self-check: --compile with PyTorch {torch.__version__} computes the gradient of {kind} wrongly here: "
                f"it differs by {error:.3g} of its norm where rounding explains {allowed:.3g}; leave --compile out, or "
                "install another version of PyTorch (--no-self_check trains all the same)"
            )
