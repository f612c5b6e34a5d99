"""The supernet of the NAS-Bench-201 space, written for reading: every candidate runs in every forward pass.

This is the reference. Faster paths elsewhere work on these same modules and are held equal to it by tests.
"""

import torch
from torch import nn

from nas201.genotypes import PRIMITIVES
from operations import AveragePool, Classifier, ReLUConvBN, Zero

OPS = {  # (B, C, H, W) -> (B, C, H, W); `track`: whether BatchNorm keeps running statistics
    "none": lambda C, affine, track: Zero(1),
    "skip_connect": lambda C, affine, track: nn.Identity(),
    "nor_conv_1x1": lambda C, affine, track: ReLUConvBN(C, C, 1, 1, 0, affine, track),
    "nor_conv_3x3": lambda C, affine, track: ReLUConvBN(C, C, 3, 1, 1, affine, track),
    # Unlike in the DARTS space no BatchNorm follows the pool.
    "avg_pool_3x3": lambda C, affine, track: AveragePool(1),
}


class ResidualBlock(nn.Module):
    """The fixed block between two stages: halves the resolution. Its BatchNorms are affine."""

    def __init__(self, C_in, C_out):
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, stride=2, padding=1)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, stride=1, padding=1)
        self.downsample = nn.Sequential(nn.AvgPool2d(2, stride=2), nn.Conv2d(C_in, C_out, 1, bias=False))

    def forward(self, x):  # (B, C_in, H, W) -> (B, C_out, H/2, W/2)
        return self.downsample(x) + self.conv_b(self.conv_a(x))


class Cell(nn.Module):
    """A complete directed acyclic graph of `max_nodes` nodes; each edge is the weighted sum of all candidates."""

    def __init__(self, C, max_nodes, track_running_stats):
        super().__init__()
        self.max_nodes = max_nodes
        self.edges = nn.ModuleDict()  # node by node, within a node by input
        for node in range(1, max_nodes):
            for source in range(node):
                ops = (OPS[primitive](C, False, track_running_stats) for primitive in PRIMITIVES)
                self.edges[f"{node}<-{source}"] = nn.ModuleList(ops)

    def forward(self, x, weights):  # x: (B, C, H, W), weights: (E, O)
        nodes = [x]
        edges = iter(zip(self.edges.values(), weights, strict=True))
        for _ in range(1, self.max_nodes):
            incoming = []
            for state in nodes:
                ops, edge_weights = next(edges)
                incoming.append(sum(w * op(state) for w, op in zip(edge_weights, ops, strict=True)))
            nodes.append(sum(incoming))
        return nodes[-1]  # (B, C, H, W)


class Stages(nn.Module):
    """Stem, three stages of N cells with C, 2C and 4C channels, residual blocks between them, classifier.

    What all networks of this space have in common. A cell is make_cell(channels); cell_of(cell, s, *inputs)
    computes it for the features s (B, channels, H, W).
    """

    def __init__(self, C, N, num_classes, make_cell):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        self.cells = nn.ModuleList()
        for stage in range(3):
            if stage > 0:
                self.cells.append(ResidualBlock(C, 2 * C))
                C *= 2
            self.cells.extend(make_cell(C) for _ in range(N))
        self.lastact = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = Classifier(C, num_classes)

    def forward(self, x, cell_of, *inputs):
        s = self.stem(x)
        for cell in self.cells:
            s = cell(s) if isinstance(cell, ResidualBlock) else cell_of(cell, s, *inputs)
        return self.classifier(self.global_pooling(self.lastact(s)).flatten(1))


class Network(Stages):
    """The supernet. BatchNorm in its searched cells has no affine parameters.

    `track_running_stats=False` takes the running statistics from the BatchNorms of the searched cells alone: these
    normalise by the batch in eval mode too. Stem, blocks and `lastact` always keep theirs.
    """

    not_loaded = ("arch_parameters",)  # alphas (6, 5), which published weights hold

    def __init__(self, C, N, num_classes, max_nodes=4, *, track_running_stats=True):
        super().__init__(C, N, num_classes, lambda channels: Cell(channels, max_nodes, track_running_stats))

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Load as torch does, but leave out the entries named in `not_loaded`."""
        state_dict = {name: value for name, value in state_dict.items() if name not in self.not_loaded}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def forward(self, x, alphas):
        """Logits (B, num_classes) of images x (B, 3, H, W) with alphas (1, E, O) or (E, O), raw or decoded."""
        weights = torch.softmax(alphas.reshape(alphas.shape[-2:]), dim=-1)  # (E, O)
        return super().forward(x, Cell.__call__, weights)
