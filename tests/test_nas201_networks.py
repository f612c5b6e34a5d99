"""The NAS-Bench-201 supernet against figures of the original network (reference.json)."""

import pytest
import torch
from torch import nn

from nas201.encoding import arch_string, decode
from nas201.model_search import Cell, Network

from golden import NAMES, REFERENCE, assert_close, assert_trajectory, fill, images, keyhash, seeded_alphas, shapes

FULL, SMALL = REFERENCE["s2_supernet"]["full"], REFERENCE["s2_supernet"]["small"]


def small_network():
    return fill(Network(SMALL["C"], SMALL["N"], SMALL["classes"]))


def test_full_size_has_the_published_names_and_parameters():
    network = Network(FULL["C"], FULL["N"], FULL["classes"])
    assert len(network.state_dict()) == FULL["nkeys"] == 759
    assert sum(p.numel() for p in network.parameters()) == FULL["params"] == 1_686_106
    assert keyhash(network) == FULL["keyhash"]
    assert len(network.cells) == 17 and [i for i, c in enumerate(network.cells) if not isinstance(c, Cell)] == [5, 11]


def test_small_names_and_shapes():
    assert shapes(Network(8, 2, 10)) == NAMES["s2_supernet_C8_N2"]


@pytest.mark.parametrize("case", SMALL["cases"], ids=lambda case: str(case["seed"]))
def test_eval_logits(case):
    network, x = small_network().eval(), images(17, (4, 3, 32, 32))
    raw = seeded_alphas(case["seed"], (1, 6, 5))
    assert arch_string(raw) == arch_string(decode(raw)) == case["arch"]
    assert torch.equal(decode(raw), torch.eye(5)[case["onehot"]][None])
    with torch.no_grad():
        assert_close(network(x, raw), case["eval_logits_raw"])
        assert_close(network(x, decode(raw)), case["eval_logits_decoded"])
        assert torch.equal(network(x, raw[0]), network(x, raw))  # (6, 5) and (1, 6, 5)


@pytest.mark.parametrize(
    "key, clip, image_seed, alpha_seed", [("train_traj", 5.0, 300, 4000), ("train_traj_clip1", 1.0, 800, 700)]
)
def test_training_trajectory(key, clip, image_seed, alpha_seed):
    alphas = [decode(seeded_alphas(alpha_seed + s, (1, 6, 5))) for s in range(len(SMALL[key]))]
    assert_trajectory(small_network(), SMALL[key], alphas, image_seed, clip, nesterov=True)


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
