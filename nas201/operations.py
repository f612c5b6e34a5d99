"""The candidate operations of NAS-Bench-201 (Dong & Yang, ICLR 2020). Every one maps (B, C, H, W) to (B, C, H, W)."""

from torch import nn

from operations import ReLUConvBN, Sequence, Zero

OPS = {
    "none": lambda C, affine, track: Zero(1),
    "skip_connect": lambda C, affine, track: nn.Identity(),
    "nor_conv_1x1": lambda C, affine, track: conv(C, 1, affine, track),
    "nor_conv_3x3": lambda C, affine, track: conv(C, 3, affine, track),
    # Unlike in the DARTS space no BatchNorm follows the pool.
    "avg_pool_3x3": lambda C, affine, track: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
}


def conv(C, kernel_size, affine, track_running_stats):
    return Sequence(
        nn.ReLU(),
        nn.Conv2d(C, C, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(C, affine=affine, track_running_stats=track_running_stats),
    )


class ResidualBlock(nn.Module):
    """The fixed block between two stages: halves the resolution. Its BatchNorms are affine."""

    def __init__(self, C_in, C_out):
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, stride=2, padding=1)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, stride=1, padding=1)
        self.downsample = nn.Sequential(nn.AvgPool2d(2, stride=2), nn.Conv2d(C_in, C_out, 1, bias=False))

    def forward(self, x):  # (B, C_in, H, W) -> (B, C_out, H/2, W/2)
        return self.downsample(x) + self.conv_b(self.conv_a(x))
