"""The candidate operations of the DARTS space, and the row of cells that is the same in every network of it.

Every operation maps (B, C, H, W) to (B, C, H / stride, W / stride).
No convolution has a bias. Module names inside are those of the published checkpoints.
"""

import torch
from torch import nn
from torch.nn import functional as F

from support import devices
from support.devices import memory_format

OPS = {
    "none": lambda C, stride, affine: Zero(stride),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride=stride, padding=1),
    "avg_pool_3x3": lambda C, stride, affine: AveragePool(stride),
    "skip_connect": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: sep_conv(C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: sep_conv(C, 5, stride, affine),
    "sep_conv_7x7": lambda C, stride, affine: sep_conv(C, 7, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: Sequence(*separable(C, 3, stride, 2, affine)),
    "dil_conv_5x5": lambda C, stride, affine: Sequence(*separable(C, 5, stride, 2, affine)),
    "conv_7x1_1x7": lambda C, stride, affine: conv_7x1_1x7(C, stride, affine),
}


def on_cpu(x: torch.Tensor) -> bool:
    """Return whether to compute as on a CPU. A test that replaces this runs a GPU's kernels on the CPU."""
    return x.device.type == "cpu"


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
        DepthwiseConv(C, kernel_size, stride, padding, dilation),
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


class AveragePool(nn.AvgPool2d):
    """The 3x3 average over the neighbours that exist; see `average_pool` for how it is computed."""

    def __init__(self, stride: int):
        super().__init__(3, stride=stride, padding=1, count_include_pad=False)

    def forward(self, x):  # (B, C, H, W) -> (B, C, H / stride, W / stride)
        return average_pool(x, self.stride)


def average_pool(x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Return the 3x3 average over the neighbours that exist: (B, C, H, W) -> (B, C, H / stride, W / stride)."""
    if on_cpu(x) or not torch.is_grad_enabled():
        return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)
    return SoundAveragePool.apply(x, stride)


class SoundAveragePool(torch.autograd.Function):
    """`average_pool` whose backward pass runs in the layout NCHW.

    In channels-last, PyTorch's own gives wrong gradients on CUDA for every padded pool, up to the fix of July 2026
    (pytorch/pytorch issue 188344). The forward pass is right in both layouts.
    """

    @staticmethod
    def forward(ctx, x, stride):
        ctx.save_for_backward(x)
        ctx.stride = stride
        return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        stride = (ctx.stride, ctx.stride)
        shape_of_x = x.new_empty(x.shape)  # in NCHW; of x itself, the backward pass needs nothing but the shape
        settings = ((3, 3), stride, (1, 1), False, False, None)  # no ceil_mode, no count_include_pad, no divisor
        grad_x = torch.ops.aten.avg_pool2d_backward(grad.contiguous(), shape_of_x, *settings)
        return grad_x.contiguous(memory_format=memory_format(x.device)), None


def neighbour_mean(x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Compute what `average_pool` does as a depthwise convolution of ones, divided by the number of neighbours."""
    C = x.shape[1]
    count = F.avg_pool2d(x.new_ones(1, 1, *x.shape[2:]), 3, stride, padding=1, divisor_override=1)
    return F.conv2d(x, x.new_ones(C, 1, 3, 3), stride=stride, padding=1, groups=C) / count


class DepthwiseConv(nn.Conv2d):
    """A convolution of each channel with its own kernel; see `depthwise_conv` for how it is computed."""

    def __init__(self, C: int, kernel_size: int, stride: int, padding: int, dilation: int):
        super().__init__(C, C, kernel_size, stride, padding, dilation, groups=C, bias=False)

    def forward(self, x):  # (B, C, H, W) -> (B, C, H / stride, W / stride)
        if has_broken_gradient(x, self.dilation[0]):
            return depthwise_conv(x, self.weight, self.stride[0], self.padding[0], self.dilation[0])
        return super().forward(x)


def depthwise_conv(x: torch.Tensor, kernel: torch.Tensor, stride: int, padding: int, dilation: int) -> torch.Tensor:
    """Convolve each channel of x (B, C, H, W) with its kernel of (C, 1, k, k).

    Where a dilated convolution has a broken gradient, it becomes one that is not dilated: on every second pixel if the
    stride is 2, else on each of the image's four phases.
    """
    if has_broken_gradient(x, dilation):
        if stride == 2:
            return F.conv2d(x[:, :, ::2, ::2], kernel, padding=padding // 2, groups=len(kernel))
        H, W = x.shape[2:]
        x = F.pad(x, (0, W % 2, 0, H % 2))  # zeros, as the convolution's own padding
        return join_phases(F.conv2d(split_phases(x), kernel, padding=padding // 2, groups=len(kernel)))[..., :H, :W]
    return F.conv2d(x, kernel, None, stride, padding, dilation, len(kernel))


def has_broken_gradient(x: torch.Tensor, dilation: int) -> bool:
    """Return whether to go around PyTorch's depthwise convolution of x with this dilation.

    In bfloat16 on some CPUs the kernel's gradient is garbage for dilation 2, from 32x32 pixels on (oneDNN in PyTorch
    2.14, see docs/conformance.md).
    """
    return dilation == 2 and torch.is_grad_enabled() and in_low_precision_on_cpu(x)


def in_low_precision_on_cpu(x: torch.Tensor) -> bool:
    """Return whether a convolution of x would run on a CPU in fewer bits than float32."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return x.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def split_phases(x: torch.Tensor) -> torch.Tensor:
    """Turn (B, C, H, W) into (4 B, C, H / 2, W / 2): even and odd rows, even and odd columns become images.

    Neighbours at distance 2 become neighbours at distance 1, so dilation 2 becomes dilation 1.
    """
    B, C, H, W = x.shape
    x = x.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(4 * B, H // 2, W // 2, C).permute(0, 3, 1, 2)


def join_phases(x: torch.Tensor) -> torch.Tensor:
    """Undo `split_phases`: (4 B, C, H, W) -> (B, C, 2 H, 2 W)."""
    B, C, H, W = x.shape
    x = x.permute(0, 2, 3, 1).reshape(B // 4, 2, 2, H, W, C).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B // 4, 2 * H, 2 * W, C).permute(0, 3, 1, 2)


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
        shifted = F.pad(x, (-1, 0, -1, 0))  # x[:, :, 1:, 1:], whose gradient would lose the channels-last layout
        C_in = self.conv_1.in_channels
        halves = [halving_conv(x, self.conv_1.weight, C_in), halving_conv(shifted, self.conv_2.weight, C_in)]
        return self.bn(torch.cat(halves, dim=1))


def halving_conv(x: torch.Tensor, kernel: torch.Tensor, C_in: int) -> torch.Tensor:
    """Apply a 1x1 convolution with stride 2: (B, C_in, H, W) -> (B, C_out, H / 2, W / 2).

    On a CPU the kernel's gradient overruns its memory for channels-last images of fewer than 8 or 16 channels (oneDNN
    issue 6035), so there every second pixel is taken first.
    """
    if C_in < 16:
        return F.conv2d(x[:, :, ::2, ::2], kernel)
    return F.conv2d(x, kernel, stride=2)


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
