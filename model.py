"""The networks that are retrained and tested: stacks of one cell of the DARTS search space (S1).

`NetworkCIFAR` is for small images and `NetworkImageNet` for large ones. Both stack the same cells.
They differ in the stem, which comes before the cells, and in the auxiliary head.

Shapes: B images, C channels, H x W pixels. C doubles and H, W halve at each reduction cell.
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from genotypes import Genotype
from operations import OPS, Classifier, FactorizedReduce, ReLUConvBN, make_cells
from support.devices import region_function

# Shape comments are aligned, which the formatter would undo.
# fmt: off


class Cell(nn.Module):
    """A cell: each node is the sum of two operations, and the output concatenates some of the nodes.

    The input s1 is the output of the previous cell, and s0 is the output of the cell before that.
    """

    def __init__(
        self, genotype: Genotype, C_prev_prev: int, C_prev: int, C: int, reduction: bool, reduction_prev: bool
    ):
        super().__init__()
        if reduction_prev:  # s0 has not been through the reduction, so it is twice as high and wide as s1
            self.preprocess0 = FactorizedReduce(C_prev_prev, C)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, kernel_size=1, stride=1, padding=0)
        self.preprocess1 = ReLUConvBN(C_prev, C, kernel_size=1, stride=1, padding=0)

        pairs = genotype.reduce if reduction else genotype.normal
        self._concat = genotype.reduce_concat if reduction else genotype.normal_concat
        self._inputs = [source for _, source in pairs]
        self._ops = nn.ModuleList()
        for operation, source in pairs:
            stride = 2 if reduction and source < 2 else 1  # the nodes of a reduction cell already have half the size
            self._ops.append(OPS[operation](C, stride, affine=True))
        self.channels = len(self._concat) * C  # channels of the output

    def forward(self, s0: Tensor, s1: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Return the cell's output (B, channels, H', W'), where H' and W' are half of H and W in a reduction cell.

        `drop_path` (operations, B, 1, 1, 1) holds a factor for each operation and image, see
        `draw_drop_path`. None drops nothing.
        """
        s0 = self.preprocess0(s0)                                   # (B, C, H, W)
        s1 = self.preprocess1(s1)                                   # (B, C, H, W)
        states = [s0, s1]
        for i in range(0, len(self._ops), 2):
            node = self._edge(i, states, drop_path) + self._edge(i + 1, states, drop_path)
            states.append(node)                                     # (B, C, H', W')
        return torch.cat([states[i] for i in self._concat], dim=1)  # (B, channels, H', W')

    def _edge(self, i: int, states: list[Tensor], drop_path: Tensor | None) -> Tensor:
        h = self._ops[i](states[self._inputs[i]])                   # (B, C, H', W')
        if drop_path is not None and not isinstance(self._ops[i], nn.Identity):  # a skip is never dropped
            h = h * drop_path[i].to(h.dtype)
        return h


def draw_drop_path(cells: nn.ModuleList | list[Cell], B: int, prob: float) -> tuple[Tensor, ...]:
    """Draw which operations are dropped for which images. Returns the factors (operations, B, 1, 1, 1) of each cell.

    A factor is 0 with probability `prob`. Otherwise it is 1 / (1 - prob), so that the mean stays 1.
    """
    operations = [len(cell._ops) for cell in cells]
    factors = next(cells[0].parameters()).new_empty(sum(operations), B, 1, 1, 1)
    factors.bernoulli_(1 - prob).div_(1 - prob)
    return factors.split(operations)


def auxiliary_head(C: int, num_classes: int, imagenet: bool) -> nn.Sequential:
    """Make the auxiliary classifier, whose loss helps to train the lower cells.

    It takes the features after the second reduction cell, which must be 8x8 (CIFAR) or 7x7
    (ImageNet).
    """
    stride = 2 if imagenet else 3
    features = nn.Sequential(
        nn.ReLU(),                                                  # not in place, because the next cells need s1
        nn.AvgPool2d(5, stride=stride, count_include_pad=False),    # (B, C, 2, 2)
        nn.Conv2d(C, 128, 1, bias=False),                           # (B, 128, 2, 2)
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),                         # (B, 768, 1, 1)
        *([] if imagenet else [nn.BatchNorm2d(768)]),               # the published ImageNet network has none
        nn.ReLU(),
    )
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=Classifier(768, num_classes)))


class _Network(nn.Module):
    """What both networks share: the cells after the stem, the auxiliary head and the classifier."""

    drop_path_prob = 0.0  # for each operation and image; the training loop raises it from epoch to epoch

    def _add_cells(
        self, C_stem: int, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype, imagenet: bool
    ) -> None:
        # ImageNet's stem ends with a stride of 2, so the first cell is made like a cell after a
        # reduction.
        self.cells = make_cells(partial(Cell, genotype), C_stem, C, layers, reduction_prev=imagenet)
        self._auxiliary_cell = 2 * layers // 3  # the second reduction cell
        self.auxiliary_head = None
        if auxiliary:
            self.auxiliary_head = auxiliary_head(self.cells[self._auxiliary_cell].channels, num_classes, imagenet)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = Classifier(self.cells[-1].channels, num_classes)

    def _classify(
        self, s0: Tensor, s1: Tensor, compile: bool = False, checkpoint: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        cell_of = region_function(Cell.forward, compile, checkpoint)
        drop_path = [None] * len(self.cells)
        # In the first epoch the probability is 0. A compiled network draws factors even then, so
        # that the first epoch uses the same graphs as the later epochs.
        if self.training and (self.drop_path_prob > 0 or compile):
            drop_path = draw_drop_path(self.cells, len(s0), self.drop_path_prob)

        logits_aux = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell_of(cell, s0, s1, drop_path[i])        # (B, channels, H, W)
            if i == self._auxiliary_cell and self.auxiliary_head is not None and self.training:
                logits_aux = self.auxiliary_head(s1)                # (B, num_classes)
        s = self.global_pooling(s1).flatten(1)                      # (B, channels)
        return self.classifier(s), logits_aux                       # (B, num_classes)


class NetworkCIFAR(_Network):
    """The network for small images (B, 3, H, W), H and W multiples of 4: CIFAR has 32 x 32.

    `C` is the number of channels in the first cells, `layers` the number of cells. `auxiliary` adds
    the auxiliary head, which needs images of 32 x 32.

    `forward(x)` returns (logits, logits_aux), each (B, num_classes); logits_aux is None unless the
    network is training and has the auxiliary head. For `compile` and `checkpoint` see
    `support.devices.region_function`. Equal cells share a compiled graph: the 20 cells of EvNAS-A
    need nine graphs.
    """

    def __init__(self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        self._add_cells(3 * C, C, num_classes, layers, auxiliary, genotype, imagenet=False)

    def forward(self, x: Tensor, compile: bool = False, checkpoint: bool = False) -> tuple[Tensor, Tensor | None]:
        s = self.stem(x)                                            # (B, 3 * C, H, W)
        return self._classify(s, s, compile, checkpoint)


class NetworkImageNet(_Network):
    """The network for large images (B, 3, H, W), H and W multiples of 32: ImageNet has 224 x 224.

    The arguments and results are the same as those of NetworkCIFAR. The auxiliary head needs images
    of 224 x 224.
    """

    def __init__(self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype):
        super().__init__()
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, C // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C // 2),
            nn.ReLU(),
            nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C),
        )
        self.stem1 = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C, C, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C),
        )
        self._add_cells(C, C, num_classes, layers, auxiliary, genotype, imagenet=True)

    def forward(self, x: Tensor, compile: bool = False, checkpoint: bool = False) -> tuple[Tensor, Tensor | None]:
        s0 = self.stem0(x)                                          # (B, C, H / 4, W / 4)
        s1 = self.stem1(s0)                                         # (B, C, H / 8, W / 8)
        return self._classify(s0, s1, compile, checkpoint)
