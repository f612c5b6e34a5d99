"""The network of one architecture of NAS-Bench-201, as it is retrained and tested."""

import torch
from torch import nn

from costs import count
from nas201.genotypes import EDGES, PRIMITIVES, from_arch_string, to_arch_string
from nas201.model_search import OPS, Stages
from support.devices import region_function


class Cell(nn.Module):
    """A complete directed acyclic graph of four nodes with one operation on each edge; BatchNorm is affine."""

    def __init__(self, operations, C):
        super().__init__()
        ops = (OPS[PRIMITIVES[index]](C, True, True) for index in operations)
        self.edges = nn.ModuleDict({f"{node}<-{source}": op for (node, source), op in zip(EDGES, ops, strict=True)})

    def forward(self, x):  # (B, C, H, W) -> (B, C, H, W)
        nodes, ops = [x], iter(self.edges.values())
        while len(nodes) < 4:
            nodes.append(sum(next(ops)(h) for h in nodes))
        return nodes[-1]


class Network(Stages):
    """`forward(x)`, x (B, 3, H, W), returns (logits, None) as the networks of the other space do: there is no head.

    N cells of the arch string in each of three stages with C, 2C and 4C channels. Raises UserError for an arch string
    that is none. `settings` are those of `region_function`.
    """

    drop_path_prob = 0.0  # the benchmark's recipe has no drop path

    def __init__(self, C, N, num_classes, arch):
        operations = from_arch_string(arch)
        super().__init__(C, N, num_classes, lambda channels: Cell(operations, channels))

    def forward(self, x, **settings):
        return super().forward(x, region_function(Cell.forward, **settings)), None


def cost_table(C, N, classes, image_shape):
    """Return what the networks `Network(C, N, classes, arch)` cost on an image (3, H, W), as `costs.s1_table` does.

    (2,) is the cost without the cells' operations, (1, 6, 5, 2) that of an operation on an edge, all cells together.
    The benchmark's own figures are the same, but count the classifier's bias among the multiply-adds.
    """
    pixels, choices = image_shape[1] * image_shape[2], torch.zeros(len(PRIMITIVES), 2, dtype=torch.int64)
    with torch.device("meta"):
        network = Network(C, N, classes, to_arch_string([0] * len(EDGES)))
    fixed = count(network.stem, pixels) + count(network.lastact, 1) + count(network.classifier, 1)
    for part in network.cells:
        if isinstance(part, Cell):
            with torch.device("meta"):
                choices += torch.stack([count(OPS[name](C, True, True), pixels) for name in PRIMITIVES])
        else:  # a residual block
            C, pixels = 2 * C, pixels // 4
            fixed += count(part, pixels)
    return fixed, choices.expand(1, len(EDGES), *choices.shape)
