"""Published accuracies on NAS-Bench-201, to compare a search with.

Accuracies are top-1 in percent after 200 epochs of training, averaged over the benchmark's seeds.
"""

from typing import NamedTuple


class PublishedAccuracy(NamedTuple):
    """Accuracies on one split of a data set."""

    evnas: float  # mean of three EvNAS searches on this data set
    evnas_std: float  # standard deviation of these three searches
    best: float  # the best of all 15,625 architectures
    rsps: float  # random search with parameter sharing
    gdas: float  # GDAS, a gradient-based search


PUBLISHED = {  # {data set: {split: accuracies}}
    "cifar10": {
        "valid": PublishedAccuracy(evnas=88.98, evnas_std=1.40, best=91.61, rsps=84.16, gdas=90.00),
        "test": PublishedAccuracy(evnas=92.18, evnas_std=1.11, best=94.37, rsps=87.66, gdas=93.51),
    },
    "cifar100": {
        "valid": PublishedAccuracy(evnas=66.35, evnas_std=2.59, best=73.49, rsps=59.00, gdas=71.14),
        "test": PublishedAccuracy(evnas=66.74, evnas_std=3.08, best=73.51, rsps=58.33, gdas=70.61),
    },
    "ImageNet16-120": {
        "valid": PublishedAccuracy(evnas=39.61, evnas_std=0.72, best=46.77, rsps=31.56, gdas=41.70),
        "test": PublishedAccuracy(evnas=39.00, evnas_std=0.44, best=47.31, rsps=31.14, gdas=41.84),
    },
}
PUBLISHED_SECONDS = 20_249.7  # duration of one EvNAS search
