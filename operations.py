"""The candidate operations of the DARTS search space (S1), and the layers that all networks share.

`OPS[name](C, stride, affine)` makes an operation. Every operation maps images (B, C, H, W) to
(B, C, H / stride, W / stride). No convolution has a bias. The modules have the same names as in the
published checkpoints, so published weights can be loaded.

Some operations take extra code to avoid a bug in a PyTorch kernel. The comments there describe the
bug, and `benchmarks/conformance.py` demonstrates it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from support import devices
from support.devices import memory_format

OPS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "none": lambda C, stride, affine: Zero(stride),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride=stride, padding=1),
    "avg_pool_3x3": lambda C, stride, affine: AveragePool(stride),
    "skip_connect": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: sep_conv(C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: sep_conv(C, 5, stride, affine),
    "sep_conv_7x7": lambda C, stride, affine: sep_conv(C, 7, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: dil_conv(C, 3, stride, affine),
    "dil_conv_5x5": lambda C, stride, affine: dil_conv(C, 5, stride, affine),
    "conv_7x1_1x7": lambda C, stride, affine: conv_7x1_1x7(C, stride, affine),
}


# ---- convolutions with ReLU before and BatchNorm after


class Sequence(nn.Module):
    """Modules that are applied one after another. They are in the attribute `op`, as in the published checkpoints."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.op = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ReLUConvBN(Sequence):
    """ReLU, convolution, BatchNorm: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine, track_running_stats=track_running_stats),
        )


def separable(C: int, kernel_size: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """Return the layers of a separable convolution: ReLU, depthwise convolution, 1x1 convolution, BatchNorm."""
    padding = dilation * (kernel_size // 2)
    return [
        nn.ReLU(),
        DepthwiseConv(C, kernel_size, stride, padding, dilation),
        nn.Conv2d(C, C, 1, bias=False),
        nn.BatchNorm2d(C, affine=affine),
    ]


def sep_conv(C: int, kernel_size: int, stride: int, affine: bool) -> nn.Module:
    """Make two separable convolutions in a row. Only the first one has the stride."""
    return Sequence(*separable(C, kernel_size, stride, 1, affine), *separable(C, kernel_size, 1, 1, affine))


def dil_conv(C: int, kernel_size: int, stride: int, affine: bool) -> nn.Module:
    """Make one separable convolution with dilation 2."""
    return Sequence(*separable(C, kernel_size, stride, 2, affine))


def conv_7x1_1x7(C: int, stride: int, affine: bool) -> nn.Module:
    """Make a 1x7 and then a 7x1 convolution. AmoebaNet's cells have this operation."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),
    )


# ---- the other operations


class Zero(nn.Module):
    """The operation `none`: an image of zeros, whatever the input."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])  # (B, C, H / stride, W / stride)


class FactorizedReduce(nn.Module):
    """Halve the resolution with two 1x1 convolutions, the second one shifted by one pixel.

    H, W and C_out must be even.
    """

    def __init__(self, C_in: int, C_out: int, affine: bool = True):
        super().__init__()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        C_in = self.conv_1.in_channels
        # fmt: off
        x = torch.relu(x)                                          # (B, C_in, H, W)
        # Negative padding crops, so this is x[:, :, 1:, 1:]. The gradient of a slice would not be
        # channels-last.
        shifted = F.pad(x, (-1, 0, -1, 0))                         # (B, C_in, H - 1, W - 1)
        even = halving_conv(x, self.conv_1.weight, C_in)           # (B, C_out / 2, H / 2, W / 2)
        odd = halving_conv(shifted, self.conv_2.weight, C_in)      # (B, C_out / 2, H / 2, W / 2)
        return self.bn(torch.cat([even, odd], dim=1))              # (B, C_out, H / 2, W / 2)
        # fmt: on


def halving_conv(x: Tensor, kernel: Tensor, C_in: int) -> Tensor:
    """Apply a 1x1 convolution with stride 2: (B, C_in, H, W) -> (B, C_out, H / 2, W / 2).

    With few channels we first copy every second pixel, to avoid a bug. For channels-last images
    with fewer than 8 or 16 channels, the kernel's gradient on a CPU writes beyond its memory
    (oneDNN issue 6035).
    """
    if C_in < 16:
        return F.conv2d(x[:, :, ::2, ::2], kernel)
    return F.conv2d(x, kernel, stride=2)


class AveragePool(nn.AvgPool2d):
    """A 3x3 average pool that ignores the padding. It is computed by `average_pool`."""

    def __init__(self, stride: int):
        super().__init__(3, stride=stride, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return average_pool(x, self.stride)  # (B, C, H / stride, W / stride)


class DepthwiseConv(nn.Conv2d):
    """A convolution of each channel with its own kernel.

    Where PyTorch's gradient is wrong, `depthwise_conv` computes the convolution in another way.
    """

    def __init__(self, C: int, kernel_size: int, stride: int, padding: int, dilation: int):
        super().__init__(C, C, kernel_size, stride, padding, dilation, groups=C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if has_broken_gradient(x, self.dilation[0]):
            return depthwise_conv(x, self.weight, self.stride[0], self.padding[0], self.dilation[0])
        return super().forward(x)  # (B, C, H / stride, W / stride)


# ---- the other parts of networks


class Classifier(nn.Linear):
    """The linear layer after global pooling: features (B, C) -> logits (B, num_classes).

    Autocast does not apply here: the logits have the precision of the weights, usually float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        with devices.autocast(x.device, False):
            return super().forward(x.to(self.weight.dtype))


def make_cells(
    make: Callable[[int, int, int, bool, bool], nn.Module],
    C_stem: int,
    C: int,
    layers: int,
    reduction_prev: bool = False,
) -> nn.ModuleList:
    """Make the `layers` cells of a network, which follow a stem of C_stem output channels.

    Cells layers // 3 and 2 * layers // 3 reduce: they halve the resolution and double C. A cell is
    make(C_prev_prev, C_prev, C, reduction, reduction_prev), and its attribute `channels` is the
    number of its output channels. `reduction_prev` says whether the stem's last layer reduces.
    """
    cells = nn.ModuleList()
    C_prev_prev = C_stem
    C_prev = C_stem
    for i in range(layers):
        reduction = i in (layers // 3, 2 * layers // 3)
        if reduction:
            C = 2 * C
        cell = make(C_prev_prev, C_prev, C, reduction, reduction_prev)
        cells.append(cell)
        reduction_prev = reduction
        C_prev_prev = C_prev
        C_prev = cell.channels
    return cells


# ---- how pools and depthwise convolutions are computed


def on_cpu(x: Tensor) -> bool:
    """Return whether to compute as on a CPU.

    Tests replace this function: on a CPU they then run the kernels that a GPU would run.
    """
    return x.device.type == "cpu"


def average_pool(x: Tensor, stride: int = 1) -> Tensor:
    """Average the 3x3 pixels around each pixel, without the padding. Returns (B, C, H / stride, W / stride)."""
    if on_cpu(x) or not torch.is_grad_enabled():
        return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)
    return SoundAveragePool.apply(x, stride)


class SoundAveragePool(torch.autograd.Function):
    """`average_pool` with a backward pass in the layout NCHW.

    On CUDA, PyTorch's own backward pass is wrong in channels-last for every padded pool, up to the
    fix of July 2026 (pytorch/pytorch issue 188344). The forward pass is right in both layouts.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.stride = stride
        return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        stride = (ctx.stride, ctx.stride)
        like_x = x.new_empty(x.shape)  # in NCHW; the backward pass uses only the shape of x
        settings = ((3, 3), stride, (1, 1), False, False, None)  # no ceil_mode, no padding counted, no divisor
        grad_x = torch.ops.aten.avg_pool2d_backward(grad.contiguous(), like_x, *settings)
        return grad_x.contiguous(memory_format=memory_format(x.device)), None


def neighbour_mean(x: Tensor, stride: int = 1) -> Tensor:
    """Compute `average_pool` with a depthwise convolution: the sum of the neighbours, divided by their number."""
    C = x.shape[1]
    ones = x.new_ones(1, 1, *x.shape[2:])
    count = F.avg_pool2d(ones, 3, stride, padding=1, divisor_override=1)  # (1, 1, H / stride, W / stride)
    return F.conv2d(x, x.new_ones(C, 1, 3, 3), stride=stride, padding=1, groups=C) / count


def depthwise_conv(x: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """Convolve each channel of x (B, C, H, W) with its own kernel; `kernel` holds all of them, (C, 1, k, k).

    PyTorch's gradient of a dilated convolution can be wrong, see `has_broken_gradient`. In that
    case we compute an undilated convolution with the same result. With stride 2, the undilated
    convolution runs on every second pixel. With stride 1, it runs on each of the four phases of the
    image (`split_phases`).
    """
    C = len(kernel)
    if not has_broken_gradient(x, dilation):
        return F.conv2d(x, kernel, None, stride, padding, dilation, C)
    if stride == 2:
        return F.conv2d(x[:, :, ::2, ::2], kernel, padding=padding // 2, groups=C)
    H, W = x.shape[2:]
    # fmt: off
    x = F.pad(x, (0, W % 2, 0, H % 2))                           # make H and W even, with zeros like the padding's
    phases = split_phases(x)                                     # (4 B, C, H / 2, W / 2)
    y = F.conv2d(phases, kernel, padding=padding // 2, groups=C)
    return join_phases(y)[..., :H, :W]                           # (B, C, H, W)
    # fmt: on


def has_broken_gradient(x: Tensor, dilation: int) -> bool:
    """Return whether PyTorch computes a wrong gradient for a depthwise convolution of x.

    In bfloat16 on some CPUs, the gradient of a kernel with dilation 2 is wrong for images of 32x32
    pixels or more (oneDNN in PyTorch 2.14, see docs/conformance.md).
    """
    return dilation == 2 and torch.is_grad_enabled() and in_low_precision_on_cpu(x)


def in_low_precision_on_cpu(x: Tensor) -> bool:
    """Return whether a convolution of x would run on a CPU in bfloat16 or float16."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return x.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def split_phases(x: Tensor) -> Tensor:
    """Cut images (B, C, H, W) into their four phases (4 B, C, H / 2, W / 2).

    A phase has every second row and every second column of the image. Pixels at distance 2 in the
    image are neighbours in a phase. So a convolution with dilation 2 on the image is one with
    dilation 1 on each phase.
    """
    B, C, H, W = x.shape
    # fmt: off
    x = x.permute(0, 2, 3, 1)                                    # (B, H, W, C)
    x = x.reshape(B, H // 2, 2, W // 2, 2, C)
    x = x.permute(0, 2, 4, 1, 3, 5)                              # (B, 2, 2, H / 2, W / 2, C)
    return x.reshape(4 * B, H // 2, W // 2, C).permute(0, 3, 1, 2)
    # fmt: on


def join_phases(x: Tensor) -> Tensor:
    """Undo `split_phases`: (4 B, C, H, W) -> (B, C, 2 H, 2 W)."""
    B, C, H, W = x.shape
    # fmt: off
    x = x.permute(0, 2, 3, 1)                                    # (4 B, H, W, C)
    x = x.reshape(B // 4, 2, 2, H, W, C)
    x = x.permute(0, 3, 1, 4, 2, 5)                              # (B, H, 2, W, 2, C)
    return x.reshape(B // 4, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
    # fmt: on
