"""The network of one NAS-Bench-201 architecture, for retraining and testing."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from costs import count
from nas201.genotypes import EDGES, PRIMITIVES, from_arch_string, to_arch_string
from nas201.model_search import OPS, Stages
from support.devices import region_function

NODES = 4  # nodes of a cell, including its input


class Cell(nn.Module):
    """A complete directed acyclic graph of four nodes with one operation on each edge; BatchNorm is affine.

    `operations` are six indices into PRIMITIVES, in the order of EDGES.
    """

    def __init__(self, operations: Sequence[int], C: int):
        super().__init__()
        self.edges = nn.ModuleDict()
        for (node, source), index in zip(EDGES, operations, strict=True):
            self.edges[f"{node}<-{source}"] = OPS[PRIMITIVES[index]](C, True, True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the cell's output (B, C, H, W) for its input x of the same shape."""
        nodes = [x]
        operations = iter(self.edges.values())  # sorted by node, and within a node by source
        while len(nodes) < NODES:
            nodes.append(sum(next(operations)(h) for h in nodes))  # (B, C, H, W)
        return nodes[-1]


class Network(Stages):
    """Three stages of N cells each, with C, 2C and 4C channels.

    `forward(x)` takes images (B, 3, H, W), where H and W are multiples of 4, and returns the logits
    (B, num_classes) and None. Networks of the DARTS space return the auxiliary head's logits in
    place of None. `compile` and `checkpoint` are passed to `region_function`. Raises UserError if
    `arch` is not an arch string.
    """

    drop_path_prob = 0.0  # the benchmark's recipe has no drop path

    def __init__(self, C: int, N: int, num_classes: int, arch: str):
        operations = from_arch_string(arch)
        super().__init__(C, N, num_classes, lambda channels: Cell(operations, channels))

    def forward(self, x: Tensor, compile: bool = False, checkpoint: bool = False) -> tuple[Tensor, None]:
        return super().forward(x, region_function(Cell.forward, compile, checkpoint)), None


def cost_table(C: int, N: int, classes: int, image_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the costs of networks `Network(C, N, classes, arch)` on one image (3, H, W).

    Returns two int64 tensors, like `costs.s1_table`. The last axis is [parameters, mult-adds].
    The first, (2,), is the cost of a network without the operations in its cells. The second,
    (1, 6, 5, 2), is the cost of each operation on each edge, summed over all cells. The benchmark's
    own figures are the same, except that the benchmark adds the classifier's bias to the mult-adds.
    """
    pixels = image_shape[1] * image_shape[2]
    with torch.device("meta"):
        network = Network(C, N, classes, to_arch_string([0] * len(EDGES)))
    fixed = count(network.stem, pixels) + count(network.lastact, 1) + count(network.classifier, 1)
    # Costs of the operations on one edge, summed over all cells. All edges have the same costs.
    choices = torch.zeros(len(PRIMITIVES), 2, dtype=torch.int64)
    for part in network.cells:
        if isinstance(part, Cell):
            with torch.device("meta"):
                operations = [OPS[name](C, True, True) for name in PRIMITIVES]
            choices += torch.stack([count(operation, pixels) for operation in operations])
        else:  # a residual block: twice the channels, half the height and width
            C = 2 * C
            pixels = pixels // 4
            fixed += count(part, pixels)
    return fixed, choices.expand(1, len(EDGES), *choices.shape)
