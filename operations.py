"""The candidate operations of the DARTS space, and the row of cells that is the same in every network of it.

Every operation maps (B, C, H, W) to (B, C, H / stride, W / stride).
No convolution has a bias. Module names inside are those of the published checkpoints.
"""

import torch
from torch import nn
from torch.nn import functional as F

from support import devices

OPS = {
    "none": lambda C, stride, affine: Zero(stride),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride=stride, padding=1),
    "avg_pool_3x3": lambda C, stride, affine: nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False),
    "skip_connect": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: sep_conv(C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: sep_conv(C, 5, stride, affine),
    "sep_conv_7x7": lambda C, stride, affine: sep_conv(C, 7, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: Sequence(*separable(C, 3, stride, 2, affine)),
    "dil_conv_5x5": lambda C, stride, affine: Sequence(*separable(C, 5, stride, 2, affine)),
    "conv_7x1_1x7": lambda C, stride, affine: conv_7x1_1x7(C, stride, affine),
}


class Sequence(nn.Module):
    """Modules in a row under the name `op`, as the checkpoints have them."""

    def __init__(self, *modules):
        super().__init__()
        self.op = nn.Sequential(*modules)

    def forward(self, x):
        return self.op(x)


class ReLUConvBN(Sequence):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True, track_running_stats=True):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine, track_running_stats=track_running_stats),
        )


def separable(C, kernel_size, stride, dilation, affine):
    """List the modules ReLU, depthwise and 1x1 convolution, BatchNorm."""
    padding = dilation * (kernel_size // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(C, C, kernel_size, stride, padding, dilation, groups=C, bias=False),
        nn.Conv2d(C, C, 1, bias=False),
        nn.BatchNorm2d(C, affine=affine),
    ]


def sep_conv(C, kernel_size, stride, affine):
    """Make twice a separable convolution; only the first has the stride."""
    return Sequence(*separable(C, kernel_size, stride, 1, affine), *separable(C, kernel_size, 1, 1, affine))


def conv_7x1_1x7(C, stride, affine):
    """Make a 1x7, then a 7x1 convolution (AmoebaNet)."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),
    )


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class FactorizedReduce(nn.Module):
    """Halves the resolution with two 1x1 convolutions, one shifted by a pixel. Needs even sizes and channels."""

    def __init__(self, C_in, C_out, affine=True):
        super().__init__()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):  # (B, C_in, H, W) -> (B, C_out, H/2, W/2)
        x = torch.relu(x)
        if self.conv_1.in_channels < 16:
            # The same, for on the CPU the gradients of strided 1x1 convolutions of large channels-last images with
            # fewer than 16 channels overrun their memory (PyTorch 2.14, oneDNN).
            halves = (F.conv2d(x[:, :, i::2, i::2], conv.weight) for i, conv in enumerate((self.conv_1, self.conv_2)))
            return self.bn(torch.cat(list(halves), dim=1))
        shifted = F.pad(x, (-1, 0, -1, 0))  # x[:, :, 1:, 1:], whose gradient would lose the channels-last layout
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], dim=1))


class Classifier(nn.Linear):
    """The linear layer behind the pooled features (B, C). It computes as precisely as its weights, autocast or not."""

    def forward(self, x):
        with devices.autocast(x.device, False):
            return super().forward(x.to(self.weight.dtype))


def make_cells(make, C_stem, C, layers, reduction_prev=False):
    """Make `layers` cells behind a stem of C_stem channels; those at layers // 3 and 2 * layers // 3 reduce, C doubles.

    A cell is make(C_prev_prev, C_prev, C, reduction, reduction_prev); its attribute `channels` says what it puts out.
    """
    cells, C_prev_prev, C_prev = nn.ModuleList(), C_stem, C_stem
    for i in range(layers):
        reduction = i in (layers // 3, 2 * layers // 3)
        C = 2 * C if reduction else C
        cells.append(make(C_prev_prev, C_prev, C, reduction, reduction_prev))
        reduction_prev, C_prev_prev, C_prev = reduction, C_prev, cells[-1].channels
    return cells
