"""The recipes for retraining a cell: the paper's two (EvNAS, section 4) and NAS-Bench-201's.

A recipe holds the defaults of `train.py`. It also decides which network is built and how the images
are read: `cifar` for small images in memory, `imagenet` for large image files, `nas201` for arch
strings.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Default settings for retraining. Each field but `name` is a flag of `train.py`."""

    name: str
    batch_size: int
    learning_rate: float
    lr_scheduler: str  # "cosine" or "linear", see train.learning_rate
    weight_decay: float
    epochs: int
    init_channels: int
    layers: int  # cells; for nas201, cells in each of the three stages
    drop_path_prob: float  # the probability at the end of training
    label_smooth: float
    seed: int
    report_freq: int = 50  # steps
    grad_clip: float | None = 5.0  # largest gradient norm; None does not clip
    nesterov: bool = False


CIFAR = Recipe(
    name="cifar",
    batch_size=96,
    learning_rate=0.025,
    lr_scheduler="cosine",
    weight_decay=3e-4,
    epochs=600,
    init_channels=36,
    layers=20,
    drop_path_prob=0.2,
    label_smooth=0.0,
    seed=18,
)
IMAGENET = Recipe(
    name="imagenet",
    batch_size=256,
    learning_rate=0.1,
    lr_scheduler="linear",
    weight_decay=3e-5,
    epochs=250,
    init_channels=48,
    layers=14,
    drop_path_prob=0.0,
    label_smooth=0.1,
    seed=0,
    report_freq=100,
)
# Dong & Yang, "NAS-Bench-201" (ICLR 2020), table 1.
NAS201 = Recipe(
    name="nas201",
    batch_size=256,
    learning_rate=0.1,
    lr_scheduler="cosine",
    weight_decay=5e-4,
    epochs=200,
    init_channels=16,
    layers=5,
    drop_path_prob=0.0,
    label_smooth=0.0,
    seed=18,
    grad_clip=None,
    nesterov=True,
)
RECIPES = {recipe.name: recipe for recipe in (CIFAR, IMAGENET, NAS201)}
