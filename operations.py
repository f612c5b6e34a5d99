"""The candidate operations of the DARTS space. Every module maps (B, C, H, W) to (B, C, H / stride, W / stride).

No convolution has a bias. Module names inside are those of the published checkpoints.
"""

import torch
from torch import nn
from torch.nn import functional as F

OPS = {
    "none": lambda C, stride, affine: Zero(stride),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride=stride, padding=1),
    "avg_pool_3x3": lambda C, stride, affine: nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False),
    "skip_connect": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, C, 3, stride, 1, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, C, 5, stride, 2, affine),
    "sep_conv_7x7": lambda C, stride, affine: SepConv(C, C, 7, stride, 3, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, C, 3, stride, 2, 2, affine),
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, C, 5, stride, 4, 2, affine),
    "conv_7x1_1x7": lambda C, stride, affine: Conv7x1(C, C, stride, affine),
}


class Sequence(nn.Module):
    """Modules in a row under the name `op`, as the checkpoints have them."""

    def __init__(self, *modules):
        super().__init__()
        self.op = nn.Sequential(*modules)

    def forward(self, x):
        return self.op(x)


class ReLUConvBN(Sequence):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


class DilConv(Sequence):
    """Dilated depthwise convolution, then 1x1."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, dilation, affine=True):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, dilation, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


class SepConv(Sequence):
    """Depthwise separable convolution, applied twice; only the first has the stride."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_in, 1, bias=False),
            nn.BatchNorm2d(C_in, affine=affine),
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, 1, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


class Conv7x1(nn.Sequential):
    """1x7, then 7x1 (AmoebaNet)."""

    def __init__(self, C_in, C_out, stride, affine=True):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
            nn.Conv2d(C_out, C_out, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
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
        if x.shape[1] < 16:
            # The same, for on the CPU the gradients of strided 1x1 convolutions of large channels-last images with
            # fewer than 16 channels overrun their memory (PyTorch 2.14, oneDNN).
            halves = (F.conv2d(x[:, :, i::2, i::2], conv.weight) for i, conv in enumerate((self.conv_1, self.conv_2)))
            return self.bn(torch.cat(list(halves), dim=1))
        shifted = F.pad(x, (-1, 0, -1, 0))  # x[:, :, 1:, 1:], whose gradient would lose the channels-last layout
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], dim=1))
