"""The NAS-Bench-201 supernet; its figures against those of the original network are in test_parity.py."""

import pytest
import torch
from torch import nn

from nas201.encoding import decode
from nas201.model_search import Cell, Network

from golden import fill, images, seeded_alphas


def test_full_size_has_the_published_layout():
    network = Network(16, 5, 10)
    assert len(network.state_dict()) == 759
    assert sum(p.numel() for p in network.parameters()) == 1_686_106
    assert len(network.cells) == 17 and [i for i, c in enumerate(network.cells) if not isinstance(c, Cell)] == [5, 11]


def test_alphas_have_a_dimension_of_cells_or_none():
    network, x, raw = fill(Network(4, 1, 10)).eval(), images(17, (4, 3, 8, 8)), seeded_alphas(3000, (1, 6, 5))
    assert torch.equal(network(x, raw[0]), network(x, raw))  # (6, 5) and (1, 6, 5)
    assert torch.equal(decode(raw), torch.eye(5)[raw.argmax(-1)])


def test_batchnorm_settings_and_the_track_flag():
    for track in (True, False):
        network = Network(4, 1, 10, track_running_stats=track)
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                searched = ".edges." in name
                assert module.affine is not searched, name
                assert module.track_running_stats is (track or not searched), name


def test_published_weights_hold_alphas_which_loading_leaves_out():
    network = Network(4, 1, 10)
    network.load_state_dict({**small_weights(network), "arch_parameters": torch.zeros(6, 5)})
    with pytest.raises(RuntimeError, match="surprise"):
        network.load_state_dict({**small_weights(network), "surprise": torch.zeros(1)})


def small_weights(network):
    return {name: entry.clone() for name, entry in network.state_dict().items()}


def test_none_is_exactly_nothing():
    """With `none` alone on every edge nothing gets through."""
    cell = Cell(4, 4, True).eval()
    weights = torch.zeros(6, 5)
    weights[:, 0] = 1.0
    assert torch.equal(cell(torch.randn(2, 4, 8, 8), weights), torch.zeros(2, 4, 8, 8))


def test_skip_path_sums():
    """With `skip` alone on every edge node k is the sum of all earlier nodes: 1, 1, 2, 4 times the input."""
    cell = Cell(4, 4, True).eval()
    weights = torch.zeros(6, 5)
    weights[:, 1] = 1.0
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(cell(x, weights), 4 * x)
