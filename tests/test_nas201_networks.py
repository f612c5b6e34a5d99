"""NAS-Bench-201's networks; the supernet's figures against those of the original network are in test_parity.py."""

import re

import pytest
import torch
from torch import nn

import model_search
import utils
from nas201 import model
from nas201.genotypes import from_arch_string
from nas201.model_search import Cell, Network
from nas201.sources import ALLOWED, unpacked
from support import weights
from support.files import UserError, restricted_unpickle

from golden import fill, images, seeded_alphas


def test_full_size_network_has_the_published_layout():
    network = Network(16, 5, 10)
    assert len(network.state_dict()) == 759
    assert sum(p.numel() for p in network.parameters()) == 1_686_106
    assert len(network.cells) == 17
    assert [i for i, cell in enumerate(network.cells) if not isinstance(cell, Cell)] == [5, 11]


def test_network_takes_alphas_with_and_without_a_cell_dimension():
    network, x, raw = fill(Network(4, 1, 10)).eval(), images(17, (4, 3, 8, 8)), seeded_alphas(3000, (1, 6, 5))
    assert torch.equal(network(x, raw[0]), network(x, raw))  # (6, 5) and (1, 6, 5)


@pytest.mark.parametrize("track", [True, False])
def test_track_running_stats_applies_only_to_searched_cells(track):
    network = Network(4, 1, 10, track_running_stats=track)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            searched = ".edges." in name
            assert module.affine is not searched, name
            assert module.track_running_stats is (track or not searched), name


def published_state():
    """What a published weight file of a small network holds."""
    return {**Network(4, 1, 10).state_dict(), "arch_parameters": torch.rand(6, 5)}


def test_loading_ignores_the_alphas_of_published_weights():
    network, state = Network(4, 1, 10), published_state()
    network.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_loading_refuses_other_names():
    with pytest.raises(RuntimeError, match="surprise"):
        Network(4, 1, 10).load_state_dict({**published_state(), "surprise": torch.zeros(1)})


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weight_file_is_loaded(tmp_path, prefix):
    network, state, path = Network(4, 1, 10), published_state(), tmp_path / "weights.pt"
    torch.save({prefix + name: value for name, value in state.items()}, path)
    weights.load_weights(network, path)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_weight_file_with_other_names_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({**published_state(), "surprise": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="surprise") as error:
        weights.load_weights(Network(4, 1, 10), path)
    assert "arch_parameters" not in str(error.value)


def test_weight_file_of_the_darts_space_with_alphas_is_refused(tmp_path):
    """Only the supernet of NAS-Bench-201 was saved with them."""
    network, path = model_search.Network(2, 10, 1), tmp_path / "weights.pt"
    torch.save({**network.state_dict(), "arch_parameters": torch.rand(6, 5)}, path)
    with pytest.raises(UserError, match="arch_parameters"):
        weights.load_weights(network, path)


def test_cell_of_none_returns_zeros():
    """With `none` alone on every edge nothing gets through."""
    cell = Cell(4, 4, True).eval()
    weights = torch.zeros(6, 5)
    weights[:, 0] = 1.0
    assert torch.equal(cell(torch.randn(2, 4, 8, 8), weights), torch.zeros(2, 4, 8, 8))


def test_cell_of_skips_adds_up_all_paths():
    """With `skip` alone on every edge node k is the sum of all earlier nodes: 1, 1, 2, 4 times the input."""
    cell = Cell(4, 4, True).eval()
    weights = torch.zeros(6, 5)
    weights[:, 1] = 1.0
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(cell(x, weights), 4 * x)


# ---- the network of one architecture


@pytest.mark.parametrize("index", [0, 11, 284])
def test_network_sizes_are_those_on_record(shared_data, index):
    """The benchmark's own records; what it calls flops counts the classifier's bias too."""
    path = shared_data("NATS-tss-v1_0-3ffb9-simple") / f"{index:06d}.pickle.pbz2"
    record = restricted_unpickle(unpacked(path), ALLOWED, path)["200"]
    runs = {name: run for (name, _), run in record["all_results"].items()}
    for name, classes, side in (("cifar10", 10, 32), ("cifar100", 100, 32), ("ImageNet16-120", 120, 16)):
        network = model.Network(16, 5, classes, record["arch_str"])
        assert utils.parameters_in_millions(network) == pytest.approx(runs[name]["params"], abs=1e-9)
        counted = utils.mult_adds_in_millions(network, (3, side, side)) + classes / 1e6
        assert counted == pytest.approx(runs[name]["flop"], abs=1e-9)


@pytest.mark.parametrize("train", [False, True])
def test_network_equals_the_supernet_with_one_operation_per_edge(train):
    arch = "|nor_conv_3x3~0|+|avg_pool_3x3~0|nor_conv_1x1~1|+|none~0|skip_connect~1|nor_conv_3x3~2|"
    supernet, network = fill(Network(4, 2, 10)).train(train), model.Network(4, 2, 10, arch).train(train)
    alphas = torch.full((6, 5), -1e9)
    operations = from_arch_string(arch)
    for edge, operation in enumerate(operations):
        alphas[edge, operation] = 0.0  # the softmax is 1 here and 0 elsewhere
    state = supernet.state_dict()
    for name, value in network.state_dict().items():
        if ".edges." in name:
            place, edge, rest = re.fullmatch(r"(.*\.edges)\.(\d<-\d)\.(.*)", name).groups()
            name = f"{place}.{edge}.{operations[list(network.cells[0].edges).index(edge)]}.{rest}"
        if name in state:
            value.copy_(state[name])
        else:
            assert name.endswith(("op.2.weight", "op.2.bias"))  # affine here alone, as it begins: 1 and 0
    x = images(3, (4, 3, 8, 8))
    logits, logits_aux = network(x)
    assert logits_aux is None
    torch.testing.assert_close(logits, supernet(x, alphas), rtol=1e-4, atol=1e-4)
