"""The supernet of the DARTS space, written for reading: every candidate operation runs in every forward pass.

This is the reference. Faster paths elsewhere work on these same modules and are held equal to it by tests.
"""

from functools import partial

import torch
from torch import nn

from genotypes import PRIMITIVES
from operations import OPS, Classifier, FactorizedReduce, ReLUConvBN, make_cells


class MixedOp(nn.Module):
    """The weighted sum of all candidate operations on one edge."""

    def __init__(self, C, stride):
        super().__init__()
        self._ops = nn.ModuleList()
        for primitive in PRIMITIVES:
            op = OPS[primitive](C, stride, affine=False)
            if "pool" in primitive:
                op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
            self._ops.append(op)

    def forward(self, x, weights):  # weights: (O,)
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


class Cell(nn.Module):
    def __init__(self, steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        self.reduction, self.channels = reduction, multiplier * C
        self._steps, self._multiplier = steps, multiplier
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self._ops = nn.ModuleList()  # edge by edge: node by node, within a node by input
        for i in range(steps):
            for j in range(2 + i):
                self._ops.append(MixedOp(C, stride=2 if reduction and j < 2 else 1))

    def forward(self, s0, s1, weights):  # weights: (E, O)
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            states.append(sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states)))
            offset += len(states) - 1
        return torch.cat(states[-self._multiplier :], dim=1)  # (B, multiplier * C, H, W)


class Network(nn.Module):
    """Supernet; `forward(x, alphas)` takes images (B, 3, H, W), H and W multiples of 4, and alphas (2, 14, 8).

    alphas[0] belongs to normal and alphas[1] to reduction cells, raw or decoded: the softmax over operations is taken
    here. Returns logits (B, num_classes). Reduction cells stand at layers // 3 and 2 * layers // 3.
    """

    def __init__(self, C, num_classes, layers, steps=4, multiplier=4, stem_multiplier=3):
        super().__init__()
        C_stem = stem_multiplier * C
        self.stem = nn.Sequential(nn.Conv2d(3, C_stem, 3, padding=1, bias=False), nn.BatchNorm2d(C_stem))
        self.cells = make_cells(partial(Cell, steps, multiplier), C_stem, C, layers)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = Classifier(self.cells[-1].channels, num_classes)

    def forward(self, x, alphas):
        weights = torch.softmax(alphas, dim=-1)  # (2, E, O)
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, weights[int(cell.reduction)])
        return self.classifier(self.global_pooling(s1).flatten(1))
