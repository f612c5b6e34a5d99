"""Candidate operations, the layers of cells and networks, drop path and the auxiliary head."""

import pytest
import torch
from torch import nn

import genotypes
from model import Cell, NetworkCIFAR, NetworkImageNet, draw_drop_path
from model_search import MixedOp, Network
from operations import OPS, Classifier, FactorizedReduce

from golden import fill, images

CONV = {
    "sep_conv_3x3": [(3, 1), (1, 1), (3, 1), (1, 1)],  # kernel, dilation
    "sep_conv_5x5": [(5, 1), (1, 1), (5, 1), (1, 1)],
    "sep_conv_7x7": [(7, 1), (1, 1), (7, 1), (1, 1)],
    "dil_conv_3x3": [(3, 2), (1, 1)],
    "dil_conv_5x5": [(5, 2), (1, 1)],
}


SKIPS = [("skip_connect", 0), ("skip_connect", 1)]
ONE_NODE = genotypes.Genotype(SKIPS, [2], SKIPS, [2])  # the smallest cell


def layers(module):
    return [type(m).__name__ for m in module.modules() if not list(m.children())]


# Candidate operations


def test_operations_cover_every_named_cell():
    assert sorted(OPS) == sorted(genotypes.OPERATIONS)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_operation_has_the_right_shape_and_parameters(name, stride, affine):
    op = OPS[name](8, stride, affine)
    assert op(images(0, (2, 8, 12, 6))).shape == (2, 8, 12 // stride, 6 // stride)
    for module in op.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight is not None) == affine
            assert module.track_running_stats


@pytest.mark.parametrize("name", [name for name in OPS if name != "none"])
@pytest.mark.parametrize("stride", [1, 2])
def test_operation_passes_gradients_on(name, stride):
    op = OPS[name](8, stride, True)
    x = images(0, (2, 8, 12, 6)).requires_grad_()
    op(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    for parameter, value in op.named_parameters():
        assert value.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize("stride", [1, 2])
def test_separable_convolutions_have_the_right_layers(name, stride):
    op = OPS[name](8, stride, True)
    half = ["ReLU", "DepthwiseConv", "Conv2d", "BatchNorm2d"]
    assert layers(op) == half * (len(CONV[name]) // 2)
    convolutions = [m for m in op.modules() if isinstance(m, nn.Conv2d)]
    for i, (conv, (kernel, dilation)) in enumerate(zip(convolutions, CONV[name], strict=True)):
        assert conv.kernel_size == (kernel, kernel)
        assert conv.dilation == (dilation, dilation)
        assert conv.stride == ((stride, stride) if i == 0 else (1, 1))
        assert conv.groups == (8 if kernel > 1 else 1)


def test_conv_7x1_1x7_has_the_right_layers():
    op = OPS["conv_7x1_1x7"](8, 2, True)
    assert layers(op) == ["ReLU", "Conv2d", "Conv2d", "BatchNorm2d"]
    assert [(m.kernel_size, m.stride) for m in op if isinstance(m, nn.Conv2d)] == [((1, 7), (1, 2)), ((7, 1), (2, 1))]


def test_pools_count_no_padding():
    x = torch.ones(1, 2, 4, 4)
    assert torch.equal(OPS["avg_pool_3x3"](2, 1, False)(x), x)  # counting the border's zeros gives 4/9 in a corner
    assert torch.equal(OPS["max_pool_3x3"](2, 1, False)(-x), -x)


def test_none_returns_zeros():
    x = images(1, (2, 4, 6, 6))
    x[0, 0, 0, 0] = float("inf")  # 0 * inf would be nan
    assert torch.equal(OPS["none"](4, 1, False)(x), torch.zeros(2, 4, 6, 6))
    assert torch.equal(OPS["none"](4, 2, False)(x), torch.zeros(2, 4, 3, 3))


def test_skip_connect_is_the_identity_or_a_factorized_reduce():
    x = images(1, (2, 4, 6, 6))
    assert torch.equal(OPS["skip_connect"](4, 1, False)(x), x)
    assert isinstance(OPS["skip_connect"](4, 2, False), FactorizedReduce)


def test_operations_do_not_change_their_input():
    for name in OPS:
        for stride in (1, 2):
            x = images(2, (2, 4, 6, 6))
            OPS[name](4, stride, True)(x)
            assert torch.equal(x, images(2, (2, 4, 6, 6))), name


@pytest.mark.parametrize("channels", [3, 16])
def test_factorized_reduce_equals_two_shifted_convolutions(channels):
    reduce = FactorizedReduce(channels, 8, affine=False).eval()
    x = images(3, (2, channels, 6, 4))
    y = reduce(x) * (1 + reduce.bn.eps) ** 0.5  # running statistics are 0 and 1
    positive = x.clamp(min=0)
    first = torch.einsum("oi,bihw->bohw", reduce.conv_1.weight[:, :, 0, 0], positive[:, :, 0::2, 0::2])
    second = torch.einsum("oi,bihw->bohw", reduce.conv_2.weight[:, :, 0, 0], positive[:, :, 1::2, 1::2])
    torch.testing.assert_close(y, torch.cat([first, second], dim=1))


# Classifiers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classifier_computes_in_float32_under_autocast(dtype):
    linear, x = Classifier(5, 3), images(4, (2, 5, 1, 1)).flatten(1).to(dtype)
    expected = x.float() @ linear.weight.t() + linear.bias
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family, side", [(NetworkCIFAR, 32), (NetworkImageNet, 224)])
def test_logits_are_float32_under_autocast(family, side):
    network = family(4, 7, 3, True, genotypes.EvNASB)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images(5, (2, 3, side, side)))
    assert [of.dtype for of in logits] == [torch.float32, torch.float32]


# Where BatchNorm follows a pool


@pytest.mark.parametrize("stride", [1, 2])
def test_supernet_normalises_only_after_pools(stride):
    ops = MixedOp(8, stride)._ops
    for name, op in zip(genotypes.PRIMITIVES, ops, strict=True):
        if "pool" in name:
            assert layers(op) == ["MaxPool2d" if "max" in name else "AveragePool", "BatchNorm2d"]
            assert isinstance(op[1], nn.BatchNorm2d)
            assert op[1].weight is None
            assert op[1].num_features == 8
        else:
            assert type(op) is type(OPS[name](8, stride, False))
    assert not list(ops[1].parameters())


def test_supernet_has_affine_norms_only_in_the_stem():
    with torch.device("meta"):
        network = Network(4, 10, 2)
    norms = {n: m.affine for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert [n for n, affine in norms.items() if affine] == ["stem.1"]
    assert len(norms) > 100


def test_retrained_cells_do_not_normalise_after_pools():
    network = NetworkCIFAR(4, 10, 3, False, genotypes.DARTS_V1)
    for cell in network.cells:
        pools = [op for op in cell._ops if "Pool" in type(op).__name__]
        assert len(pools) == (5 if cell is not network.cells[0] else 0)
    assert {m.affine for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {True}


def halving_inputs(network):
    """The cells that halve their first input, because the cell before reduces."""
    return [i for i, cell in enumerate(network.cells) if isinstance(cell.preprocess0, FactorizedReduce)]


@pytest.mark.parametrize("depth, reductions", [(3, [1, 2]), (5, [1, 3]), (8, [2, 5])])
def test_cells_of_a_supernet_reduce_at_thirds_of_the_depth(depth, reductions):
    with torch.device("meta"):
        supernet = Network(4, 10, depth)
    assert [i for i, cell in enumerate(supernet.cells) if cell.reduction] == reductions
    assert halving_inputs(supernet) == [i + 1 for i in reductions if i + 1 < depth]


@pytest.mark.parametrize("depth, behind", [(3, [2]), (5, [2, 4]), (8, [3, 6]), (14, [5, 10]), (20, [7, 14])])
def test_cells_of_a_retrained_network_reduce_at_thirds_of_the_depth(depth, behind):
    """The stem of a network for ImageNet reduces too."""
    with torch.device("meta"):
        network = NetworkCIFAR(4, 10, depth, False, ONE_NODE)
        imagenet = NetworkImageNet(4, 10, depth, False, ONE_NODE)
    assert halving_inputs(network) == behind
    assert halving_inputs(imagenet) == [0, *behind]


def test_supernet_edge_is_the_weighted_sum():
    op = fill(MixedOp(4, 2)).eval()
    x, weights = images(4, (2, 4, 6, 6)), torch.arange(1.0, 9.0)
    expected = torch.zeros(2, 4, 3, 3)
    for k in range(8):
        expected += (k + 1) * op._ops[k](x)
    torch.testing.assert_close(op(x, weights), expected)


# Drop path


def one_operation_cell(op, reduction):
    """A cell whose output is one operation on its first input. Its other edge gives zeros."""
    pairs = [(op, 0), ("none", 1)]
    cell = fill(Cell(genotypes.Genotype(pairs, [2], pairs, [2]), 4, 4, 4, reduction, False))
    x = images(6, (400, 4, 4, 4))
    return cell, x


@pytest.mark.parametrize("op", [op for op in OPS if op != "none"])
@pytest.mark.parametrize("reduction", [False, True])
def test_drop_path_drops_all_but_the_stride_one_skip(op, reduction):
    torch.manual_seed(2)
    cell, x = one_operation_cell(op, reduction)
    with torch.no_grad():
        whole, partly = cell(x, x), cell(x, x, *draw_drop_path([cell], len(x), 0.5))
    dropped = (partly == 0).flatten(1).all(1)
    if op == "skip_connect" and not reduction:
        assert torch.equal(whole, partly)
    else:
        assert 0.4 < dropped.float().mean() < 0.6
        torch.testing.assert_close(partly[~dropped], whole[~dropped] * 2)


def test_drop_path_drops_edges_independently():
    torch.manual_seed(3)
    pairs = [("max_pool_3x3", 0), ("avg_pool_3x3", 1)]
    cell = fill(Cell(genotypes.Genotype(pairs, [2], pairs, [2]), 4, 4, 4, False, False))
    x = images(6, (1000, 4, 4, 4))
    both = (cell(x, x, *draw_drop_path([cell], len(x), 0.5)) == 0).flatten(1).all(1).float().mean()
    assert 0.2 < both < 0.3


@pytest.mark.parametrize("network", [NetworkCIFAR, NetworkImageNet])
def test_drop_path_prob_applies_only_in_training(network):
    side = 32 if network is NetworkCIFAR else 224
    model = fill(network(4, 10, 3, False, genotypes.EvNASA))
    x = images(7, (2, 3, side, side))
    assert model.drop_path_prob == 0.0
    with torch.no_grad():
        state = torch.get_rng_state()
        plain = model(x)[0]
        assert torch.equal(torch.get_rng_state(), state)  # nothing drawn
        model.drop_path_prob = 0.6
        torch.manual_seed(4)
        assert not torch.allclose(model(x)[0], plain)
        model.eval()
        dropping = model(x)[0]
        model.drop_path_prob = 0.0
        assert torch.equal(model(x)[0], dropping)


# Auxiliary head


@pytest.mark.parametrize("network, side", [(NetworkCIFAR, 32), (NetworkImageNet, 224)])
def test_auxiliary_head_does_not_change_the_main_path(network, side):
    """With three cells the head reads the last output. An in-place ReLU would alter the logits."""
    x = images(8, (2, 3, side, side))
    without = fill(network(4, 10, 3, False, genotypes.EvNASA))
    with_head = fill(network(4, 10, 3, True, genotypes.EvNASA))
    with torch.no_grad():
        logits, logits_aux = with_head(x)
        assert logits_aux.shape == (2, 10)
        assert without(x)[1] is None
        assert torch.equal(logits, without(x)[0])
        assert with_head.eval()(x)[1] is None


@pytest.mark.parametrize("network, stride, norms", [(NetworkCIFAR, 3, 2), (NetworkImageNet, 2, 1)])
def test_auxiliary_head_has_the_right_layers(network, stride, norms):
    features = network(4, 10, 3, True, genotypes.EvNASA).auxiliary_head.features
    expected = ["ReLU", "AvgPool2d", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU"]
    if norms == 1:
        del expected[6]
    assert layers(features) == expected
    pool = features[1]
    assert (pool.kernel_size, pool.stride, pool.padding, pool.count_include_pad) == (5, stride, 0, False)
    assert not features[0].inplace
