"""The supernet of the NAS-Bench-201 search space (S2): every candidate runs in every forward pass.

This is the reference implementation, written to be easy to read. `nas201/fast_search.py` computes
the same values faster, with the same modules. Tests check that both implementations agree.

Shapes: B images, C channels of a cell, E = 6 edges of a cell, O = 5 operations of an edge.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nas201.genotypes import PRIMITIVES
from operations import AveragePool, Classifier, ReLUConvBN, Zero

# `OPS[name](C, affine, track)` makes an operation, (B, C, H, W) -> (B, C, H, W). `track` says
# whether the operation's BatchNorm keeps running statistics.
OPS: dict[str, Callable[[int, bool, bool], nn.Module]] = {
    "none": lambda C, affine, track: Zero(1),
    "skip_connect": lambda C, affine, track: nn.Identity(),
    "nor_conv_1x1": lambda C, affine, track: ReLUConvBN(C, C, 1, 1, 0, affine, track),
    "nor_conv_3x3": lambda C, affine, track: ReLUConvBN(C, C, 3, 1, 1, affine, track),
    # Unlike in the DARTS space, no BatchNorm follows the pool.
    "avg_pool_3x3": lambda C, affine, track: AveragePool(1),
}


class ResidualBlock(nn.Module):
    """The fixed block between two stages. The block halves the resolution. BatchNorms are affine."""

    def __init__(self, C_in: int, C_out: int):
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, stride=2, padding=1)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, stride=1, padding=1)
        self.downsample = nn.Sequential(nn.AvgPool2d(2, stride=2), nn.Conv2d(C_in, C_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        # (B, C_in, H, W) -> (B, C_out, H / 2, W / 2)
        return self.downsample(x) + self.conv_b(self.conv_a(x))


class Cell(nn.Module):
    """A cell of `max_nodes` nodes. Node 0 is the input, and the last node is the output.

    Each node is the sum of its edges from all earlier nodes. Each edge is the weighted sum of all
    candidate operations.
    """

    def __init__(self, C: int, max_nodes: int, track_running_stats: bool):
        super().__init__()
        self.max_nodes = max_nodes
        self.edges = nn.ModuleDict()  # sorted by node, and within a node by source
        for node in range(1, max_nodes):
            for source in range(node):
                ops = [OPS[primitive](C, False, track_running_stats) for primitive in PRIMITIVES]
                self.edges[f"{node}<-{source}"] = nn.ModuleList(ops)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return (B, C, H, W) for x (B, C, H, W) and the mixing weights (E, O)."""
        nodes = [x]
        edges = iter(zip(self.edges.values(), weights, strict=True))
        for _ in range(1, self.max_nodes):
            incoming = []
            for h in nodes:
                ops, edge_weights = next(edges)
                incoming.append(sum(w * op(h) for w, op in zip(edge_weights, ops, strict=True)))  # (B, C, H, W)
            nodes.append(sum(incoming))
        return nodes[-1]


class Stages(nn.Module):
    """The structure that all networks of this space share, from stem to classifier.

    Three stages of N cells have C, 2 C and 4 C channels. A residual block connects two stages.
    `make_cell(channels)` makes a cell.
    """

    def __init__(self, C: int, N: int, num_classes: int, make_cell: Callable[[int], nn.Module]):
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

    def forward(self, x: Tensor, cell_of: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images x (B, 3, H, W).

        cell_of(cell, s, *inputs) computes a cell for s (B, channels, H, W).
        """
        # fmt: off
        s = self.stem(x)                                              # (B, C, H, W)
        for cell in self.cells:
            s = cell(s) if isinstance(cell, ResidualBlock) else cell_of(cell, s, *inputs)
        features = self.global_pooling(self.lastact(s)).flatten(1)    # (B, 4 * C)
        return self.classifier(features)                              # (B, num_classes)
        # fmt: on


class Network(Stages):
    """The supernet. The BatchNorms of the searched cells are not affine.

    With `track_running_stats=False` the BatchNorms of the searched cells keep no running
    statistics, so they use batch statistics in eval mode too. The BatchNorms of the stem, the
    residual blocks and `lastact` always keep running statistics.
    """

    not_loaded = ("arch_parameters",)  # alphas (6, 5), which published weight files hold

    def __init__(self, C: int, N: int, num_classes: int, max_nodes: int = 4, *, track_running_stats: bool = True):
        super().__init__(C, N, num_classes, lambda channels: Cell(channels, max_nodes, track_running_stats))

    def load_state_dict(self, state_dict: dict, *args, **kwargs) -> tuple[list[str], list[str]]:
        """Load as torch does, but ignore the entries named in `not_loaded`."""
        state_dict = {name: value for name, value in state_dict.items() if name not in self.not_loaded}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def forward(self, x: Tensor, alphas: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images x (B, 3, H, W).

        `alphas` are (1, E, O) or (E, O), raw or decoded. The mixing weights are the softmax of
        `alphas` over the operations.
        """
        weights = torch.softmax(alphas.reshape(alphas.shape[-2:]), dim=-1)  # (E, O)
        return super().forward(x, Cell.__call__, weights)
