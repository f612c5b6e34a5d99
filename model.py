"""Networks of one genotype, as they are retrained and tested: CIFAR-sized images and ImageNet."""

from collections import OrderedDict
from functools import partial

import torch
from torch import nn

from operations import OPS, Classifier, FactorizedReduce, ReLUConvBN, make_cells
from support.devices import cell_function


class Cell(nn.Module):
    def __init__(self, genotype, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0)
        pairs = genotype.reduce if reduction else genotype.normal
        self._concat = genotype.reduce_concat if reduction else genotype.normal_concat
        self.channels = len(self._concat) * C  # of the output
        self._inputs = [j for _, j in pairs]
        self._ops = nn.ModuleList(OPS[op](C, 2 if reduction and j < 2 else 1, True) for op, j in pairs)

    def forward(self, s0, s1, drop_path=None):
        """Return (B, channels, H, W); `drop_path` (operations, B, 1, 1, 1) multiplies what the operations return."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for k in range(0, len(self._ops), 2):
            states.append(sum(self._edge(i, states, drop_path) for i in (k, k + 1)))
        return torch.cat([states[i] for i in self._concat], dim=1)

    def _edge(self, i, states, drop_path):
        h = self._ops[i](states[self._inputs[i]])
        if drop_path is not None and not isinstance(self._ops[i], nn.Identity):
            h = h * drop_path[i].to(h.dtype)
        return h


def draw_drop_path(cells, B, prob):
    """Return for each cell the factors (operations, B, 1, 1, 1): 0, or 1 / the probability that a sample is kept."""
    operations = [len(cell._ops) for cell in cells]
    kept = next(cells[0].parameters()).new_empty(sum(operations), B, 1, 1, 1).bernoulli_(1 - prob)
    return kept.div_(1 - prob).split(operations)


class _Network(nn.Module):
    """What both families share behind their stems. `drop_path_prob` is 0.0 until set."""

    drop_path_prob = 0.0

    def _add_cells(self, C_stem, C, num_classes, layers, auxiliary, genotype, imagenet):
        self.cells = make_cells(partial(Cell, genotype), C_stem, C, layers, reduction_prev=imagenet)
        self._auxiliary_cell = 2 * layers // 3
        self.auxiliary_head = None
        if auxiliary:
            self.auxiliary_head = auxiliary_head(self.cells[self._auxiliary_cell].channels, num_classes, imagenet)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = Classifier(self.cells[-1].channels, num_classes)

    def _classify(self, s0, s1, compile=False, checkpoint=False):
        drop_path, logits_aux = [None] * len(self.cells), None
        cell_of = cell_function(Cell.forward, compile, checkpoint)
        if self.training and (self.drop_path_prob > 0 or compile):  # so the first epoch needs no graphs of its own
            drop_path = draw_drop_path(self.cells, len(s0), self.drop_path_prob)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell_of(cell, s0, s1, drop_path[i])
            if i == self._auxiliary_cell and self.auxiliary_head is not None and self.training:
                logits_aux = self.auxiliary_head(s1)
        return self.classifier(self.global_pooling(s1).flatten(1)), logits_aux


def auxiliary_head(C, num_classes, imagenet):
    """Make the classifier on the features behind the second reduction cell: 8x8 on CIFAR, 7x7 on ImageNet."""
    features = nn.Sequential(
        nn.ReLU(),  # not in place, or it would alter the main path
        nn.AvgPool2d(5, stride=2 if imagenet else 3, padding=0, count_include_pad=False),  # -> (B, C, 2, 2)
        nn.Conv2d(C, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),  # -> (B, 768, 1, 1)
        *([] if imagenet else [nn.BatchNorm2d(768)]),
        nn.ReLU(),
    )
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=Classifier(768, num_classes)))


class NetworkCIFAR(_Network):
    """`forward(x)`, x (B, 3, 32, 32) or any sides that are multiples of 4, returns (logits, logits_aux).

    logits_aux is None unless training with the auxiliary head, which needs 32x32. `settings` are those of
    `cell_function`: with `compile` equal cells share a graph, EvNAS-A's 20 cells nine.
    """

    def __init__(self, C, num_classes, layers, auxiliary, genotype):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        self._add_cells(3 * C, C, num_classes, layers, auxiliary, genotype, imagenet=False)

    def forward(self, x, **settings):
        s = self.stem(x)
        return self._classify(s, s, **settings)


class NetworkImageNet(_Network):
    """`forward(x)`, x (B, 3, 224, 224), returns (logits, logits_aux) as NetworkCIFAR does."""

    def __init__(self, C, num_classes, layers, auxiliary, genotype):
        super().__init__()
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, C // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C // 2),
            nn.ReLU(),
            nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C),
        )
        self.stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(C))
        self._add_cells(C, C, num_classes, layers, auxiliary, genotype, imagenet=True)

    def forward(self, x, **settings):
        s0 = self.stem0(x)  # (B, C, H/4, W/4)
        return self._classify(s0, self.stem1(s0), **settings)  # (B, C, H/8, W/8)
