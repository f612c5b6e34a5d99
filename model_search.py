"""The supernet of the DARTS search space (S1): every candidate operation runs in every forward pass.

This file is the reference implementation, written to be read. `fast_search.py` computes the same
logits faster, with the same modules. Tests check that both implementations agree.

Shapes: B images, C channels of a cell, E = 14 edges of a cell, O = 8 operations of an edge.
"""

from functools import partial

import torch
from torch import Tensor, nn

from genotypes import PRIMITIVES
from operations import OPS, Classifier, FactorizedReduce, ReLUConvBN, make_cells


class MixedOp(nn.Module):
    """One edge: the weighted sum of all candidate operations. A BatchNorm follows each pool."""

    def __init__(self, C: int, stride: int):
        super().__init__()
        self._ops = nn.ModuleList()
        for primitive in PRIMITIVES:
            op = OPS[primitive](C, stride, affine=False)
            if "pool" in primitive:
                op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
            self._ops.append(op)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return (B, C, H / stride, W / stride) for images x (B, C, H, W) and mixing weights (O,)."""
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


class Cell(nn.Module):
    """A cell with two inputs and `steps` nodes. Each node adds up its edges from all earlier states.

    The output is the concatenation of the last `multiplier` nodes. States are numbered: 0 and 1 are
    the inputs, and 2, 3, ... are the nodes.
    """

    def __init__(
        self,
        steps: int,
        multiplier: int,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
    ):
        super().__init__()
        self.reduction = reduction
        self.channels = multiplier * C  # channels of the output
        self._steps = steps
        self._multiplier = multiplier
        if reduction_prev:  # s0 comes from before the previous cell, so it has twice the resolution
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self._ops = nn.ModuleList()  # the edges, node by node, and sorted by input within a node
        for node in range(steps):
            for state in range(2 + node):
                self._ops.append(MixedOp(C, stride=2 if reduction and state < 2 else 1))

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """Return the cell's output. s0 and s1 are the outputs of the two previous cells; weights are (E, O)."""
        # fmt: off
        states = [self.preprocess0(s0), self.preprocess1(s1)]    # each (B, C, H, W)
        edge = 0
        for _ in range(self._steps):
            node = 0
            for h in states:
                node = node + self._ops[edge](h, weights[edge])  # (B, C, H, W), halved by a reduction
                edge += 1
            states.append(node)
        return torch.cat(states[-self._multiplier :], dim=1)     # (B, multiplier * C, H, W)
        # fmt: on


class Network(nn.Module):
    """The supernet: `forward(x, alphas)` returns logits (B, num_classes).

    `x` holds images (B, 3, H, W), where H and W are multiples of 4. `alphas` (2, E, O) are raw or
    decoded: alphas[0] is for the normal cells and alphas[1] for the reduction cells. The network
    computes the softmax over operations. Cells layers // 3 and 2 * layers // 3 are the reduction
    cells.
    """

    def __init__(
        self,
        C: int,
        num_classes: int,
        layers: int,
        steps: int = 4,
        multiplier: int = 4,
        stem_multiplier: int = 3,
    ):
        super().__init__()
        C_stem = stem_multiplier * C
        self.stem = nn.Sequential(nn.Conv2d(3, C_stem, 3, padding=1, bias=False), nn.BatchNorm2d(C_stem))
        self.cells = make_cells(partial(Cell, steps, multiplier), C_stem, C, layers)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = Classifier(self.cells[-1].channels, num_classes)

    def forward(self, x: Tensor, alphas: Tensor) -> Tensor:
        # fmt: off
        weights = torch.softmax(alphas, dim=-1)                  # (2, E, O)
        s0 = s1 = self.stem(x)                                   # (B, C_stem, H, W)
        for cell in self.cells:
            out = cell(s0, s1, weights[int(cell.reduction)])     # (B, multiplier * C, H, W) of this cell
            s0, s1 = s1, out
        features = self.global_pooling(s1).flatten(1)            # (B, multiplier * C)
        return self.classifier(features)                         # (B, num_classes)
        # fmt: on
