"""Networks of one genotype, as they are retrained and tested: CIFAR-sized images and ImageNet."""

import torch
from torch import nn
from torchvision.ops import stochastic_depth

from operations import OPS, FactorizedReduce, ReLUConvBN


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
        self._inputs = [j for _, j in pairs]
        self._ops = nn.ModuleList(OPS[op](C, 2 if reduction and j < 2 else 1, True) for op, j in pairs)

    def forward(self, s0, s1, drop_prob):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for k in range(0, len(self._ops), 2):
            states.append(sum(self._edge(i, states, drop_prob) for i in (k, k + 1)))
        return torch.cat([states[i] for i in self._concat], dim=1)

    def _edge(self, i, states, drop_prob):
        h = self._ops[i](states[self._inputs[i]])
        if self.training and drop_prob > 0 and not isinstance(self._ops[i], nn.Identity):
            h = stochastic_depth(h, drop_prob, "row")  # drop path
        return h


def make_cells(genotype, C_prev_prev, C_prev, C, layers, reduction_prev):
    """The cells, the channels behind each, in order. Reduction cells stand at layers // 3 and 2 * layers // 3."""
    cells, channels = nn.ModuleList(), []
    for i in range(layers):
        reduction = i in (layers // 3, 2 * layers // 3)
        if reduction:
            C *= 2
        cells.append(Cell(genotype, C_prev_prev, C_prev, C, reduction, reduction_prev))
        reduction_prev = reduction
        concat = genotype.reduce_concat if reduction else genotype.normal_concat
        C_prev_prev, C_prev = C_prev, len(concat) * C
        channels.append(C_prev)
    return cells, channels


def auxiliary_head(C, num_classes, stride, second_bn):
    """Classifier on the features behind the second reduction cell: (B, C, 8, 8) on CIFAR, (B, C, 7, 7) on ImageNet."""
    features = [
        nn.ReLU(),  # not in place, or it would alter the main path
        nn.AvgPool2d(5, stride=stride, padding=0, count_include_pad=False),  # -> (B, C, 2, 2)
        nn.Conv2d(C, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),  # -> (B, 768, 1, 1)
    ]
    if second_bn:
        features.append(nn.BatchNorm2d(768))
    features.append(nn.ReLU())
    head = nn.Sequential()
    head.features = nn.Sequential(*features)
    head.flatten = nn.Flatten()
    head.classifier = nn.Linear(768, num_classes)
    return head


class NetworkCIFAR(nn.Module):
    """`forward(x)`, x (B, 3, 32, 32) or any sides that are multiples of 4, returns (logits, logits_aux).

    logits_aux is None unless training with the auxiliary head, which needs 32x32. `drop_path_prob` is 0.0 until set.
    """

    def __init__(self, C, num_classes, layers, auxiliary, genotype):
        super().__init__()
        self.drop_path_prob = 0.0
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        self.cells, channels = make_cells(genotype, 3 * C, 3 * C, C, layers, reduction_prev=False)
        self._auxiliary_cell = 2 * layers // 3
        self.auxiliary_head = (
            auxiliary_head(channels[self._auxiliary_cell], num_classes, stride=3, second_bn=True) if auxiliary else None
        )
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, x):
        s0 = s1 = self.stem(x)
        return classify(self, s0, s1)


class NetworkImageNet(nn.Module):
    """`forward(x)`, x (B, 3, 224, 224), returns (logits, logits_aux) as NetworkCIFAR does."""

    def __init__(self, C, num_classes, layers, auxiliary, genotype):
        super().__init__()
        self.drop_path_prob = 0.0
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, C // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C // 2),
            nn.ReLU(),
            nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C),
        )
        self.stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(C))
        self.cells, channels = make_cells(genotype, C, C, C, layers, reduction_prev=True)
        self._auxiliary_cell = 2 * layers // 3
        self.auxiliary_head = (
            auxiliary_head(channels[self._auxiliary_cell], num_classes, stride=2, second_bn=False)
            if auxiliary
            else None
        )
        self.global_pooling = nn.AvgPool2d(7)
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, x):
        s0 = self.stem0(x)  # (B, C, H/4, W/4)
        s1 = self.stem1(s0)  # (B, C, H/8, W/8)
        return classify(self, s0, s1)


def classify(network, s0, s1):
    """What both families share behind their stems."""
    logits_aux = None
    for i, cell in enumerate(network.cells):
        s0, s1 = s1, cell(s0, s1, network.drop_path_prob)
        if i == network._auxiliary_cell and network.auxiliary_head is not None and network.training:
            logits_aux = network.auxiliary_head(s1)
    return network.classifier(network.global_pooling(s1).flatten(1)), logits_aux
