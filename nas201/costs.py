"""What a network of NAS-Bench-201 costs; see the root module `costs`."""

import torch

from costs import cost
from nas201.genotypes import EDGES, PRIMITIVES
from nas201.model_search import Cell, Network
from operations import ReLUConvBN

KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}  # the operations with weights


def s2_table(C, N, classes, image_shape):
    """Return what the network of an architecture costs on an image (3, H, W), C channels and N cells in each stage.

    (2,) is the cost without the cells' operations, (1, 6, 5, 2) that of an operation on an edge, all cells together.
    Parameters and multiply-adds are the benchmark's, which counts the classifier's bias among the latter.
    """
    pixels, choices = image_shape[1] * image_shape[2], torch.zeros(1, len(EDGES), len(PRIMITIVES), 2).long()
    with torch.device("meta"):
        network = Network(C, N, classes)
    fixed = cost(network.stem, pixels) + cost(network.lastact, 1) + cost(network.classifier, 1)
    for part in network.cells:
        if isinstance(part, Cell):
            for name, kernel in KERNELS.items():
                with torch.device("meta"):
                    choices[:, :, PRIMITIVES.index(name)] += cost(ReLUConvBN(C, C, kernel, 1, kernel // 2), pixels)
        else:  # a residual block
            C, pixels = 2 * C, pixels // 4
            fixed += cost(part, pixels)
    return fixed, choices
