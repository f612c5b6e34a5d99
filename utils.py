"""The optimiser, and what a network and a generation or epoch cost."""

import time

import torch

from support import devices


def cost(images, start, device):
    """Return what a generation or epoch with so many images has taken since `start`: images/s, seconds, peak memory."""
    seconds = time.perf_counter() - start
    return {"images_per_second": images / seconds, "seconds": seconds, "peak_memory_mb": devices.peak_memory_mb(device)}


def parameters_in_millions(model):
    """Count trainable parameters without the auxiliary head, as papers do."""
    return sum(p.numel() for name, p in model.named_parameters() if "auxiliary" not in name) / 1e6


def mult_adds_in_millions(model, image_shape):
    """Count multiply-adds of convolutions and linear layers for one image (C, H, W); leaves `model` in eval mode."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops() / 2e6


def make_sgd(parameters, args, device, nesterov=False):
    """Make the SGD of the recipes: one parameter group, weight decay on everything.

    Without momentum, `nesterov` or not, it is plain SGD.
    """
    return torch.optim.SGD(
        parameters,
        args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=nesterov and args.momentum > 0,
        fused=device.type == "cuda",
    )
