"""Small measurements: the size of a network, and the time and memory of an epoch."""

import time

import torch
from torch import nn

from support import devices


def speed_and_memory(images: int, start: float, device: torch.device) -> dict[str, float]:
    """Return the fields of the history that describe the speed and memory of a generation or an epoch.

    `images` is the number of images that have been processed since `start`. `start` is a time of
    `time.perf_counter()`. The fields are images per second, seconds and peak memory in MiB.
    """
    seconds = time.perf_counter() - start
    return {"images_per_second": images / seconds, "seconds": seconds, "peak_memory_mb": devices.peak_memory_mb(device)}


def parameters_in_millions(model: nn.Module) -> float:
    """Count the trainable parameters of a network without its auxiliary head, as papers do."""
    return sum(p.numel() for name, p in model.named_parameters() if "auxiliary" not in name) / 1e6


def mult_adds_in_millions(model: nn.Module, image_shape: tuple[int, int, int]) -> float:
    """Count the mult-adds of convolutions and linear layers for one image (C, H, W).

    `model` is in eval mode afterwards.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops() / 2e6  # a mult-add is two floating-point operations
