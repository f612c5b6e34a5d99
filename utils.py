"""Small helpers: the size of a network, the time and memory of an epoch, a cell as text."""

import textwrap
import time

import torch
from torch import nn

from genotypes import Cell
from support import devices


def speed_and_memory(images: int, start: float, device: torch.device) -> dict[str, float]:
    """Return the fields of the history that describe the speed and memory of a generation or an epoch.

    `images` is the number of images that have been processed since `start`. `start` is a time of
    `time.perf_counter()`. The fields are images per second, seconds and peak memory in MiB.
    """
    seconds = time.perf_counter() - start
    return {"images_per_second": images / seconds, "seconds": seconds, "peak_memory_mb": devices.peak_memory_mb(device)}


def cell_lines(cell: Cell) -> list[str]:
    """Return a cell as text in lines of at most 100 characters, if its words allow that."""
    look = {"initial_indent": "  ", "subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(str(cell), 100, **look)


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
