"""The recipes and their optimiser, and what a network and a generation or epoch cost."""

import time
from dataclasses import dataclass

import torch

from support import devices


@dataclass(frozen=True)
class Recipe:
    """Settings for retraining and testing a family of networks: the paper's (EvNAS, section 4), or the benchmark's."""

    family: str
    batch_size: int
    learning_rate: float
    lr_scheduler: str
    weight_decay: float
    epochs: int
    init_channels: int
    layers: int
    drop_path_prob: float
    label_smooth: float
    seed: int
    report_freq: int = 50
    grad_clip: float | None = 5.0
    nesterov: bool = False


CIFAR = Recipe("cifar", 96, 0.025, "cosine", 3e-4, 600, 36, 20, 0.2, label_smooth=0.0, seed=18)
IMAGENET = Recipe(
    "imagenet", 256, 0.1, "linear", 3e-5, 250, 48, 14, drop_path_prob=0.0, label_smooth=0.1, seed=0, report_freq=100
)
# Dong & Yang (ICLR 2020), table 1; layers: cells in each of the three stages.
NAS201 = Recipe("nas201", 256, 0.1, "cosine", 5e-4, 200, 16, 5, 0.0, 0.0, seed=18, grad_clip=None, nesterov=True)
RECIPES = {recipe.family: recipe for recipe in (CIFAR, IMAGENET, NAS201)}


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
