"""Decoding and genotypes of the DARTS space: tie rules, batching, and an independent implementation."""

import numpy as np
import pytest
import torch

from encoding import decode, genotype, random_alphas
from genotype_files import validate
from genotypes import PRIMITIVES

SEP3 = PRIMITIVES.index("sep_conv_3x3")
DIL5 = PRIMITIVES.index("dil_conv_5x5")


def plain_select(cell):
    """Slow and in float64: the kept (edge, operation) of a raw (14, 8) cell, node by node, strongest first."""
    kept, edge = [], 0
    for node in range(4):
        candidates = []
        for _ in range(node + 2):
            exponentials = [np.exp(float(a)) for a in cell[edge]]
            op = 1
            for o in range(2, 8):
                if cell[edge][o] > cell[edge][op]:
                    op = o
            candidates.append((-exponentials[op] / sum(exponentials), edge, op))
            edge += 1
        kept += [(e, op) for _, e, op in sorted(candidates)[:2]]
    return kept


def plain_decode(alphas):
    decoded = np.zeros_like(alphas)
    for g in range(2):
        for edge, op in plain_select(alphas[g]):
            decoded[g, edge, op] = 1
    return decoded


def plain_pairs(cell):
    offsets = [0, 2, 5, 9]
    return [(PRIMITIVES[op], edge - offsets[i // 2]) for i, (edge, op) in enumerate(plain_select(cell))]


def continuous(random, count):
    return random.rand(count, 2, 14, 8).astype(np.float32)


def tied_within_edges(random, count):
    """Few distinct values, so that operations tie."""
    alphas = random.randint(0, 3, (count, 2, 14, 8)) / 4
    alphas[..., 0] = random.rand(count, 2, 14)  # keeps the edges of a node apart
    return alphas.astype(np.float32)


def tied_between_edges(random, count):
    """Edges are copies of three rows, so that most nodes see exact ties."""
    rows = random.rand(count, 2, 3, 8).astype(np.float32)
    pick = random.randint(0, 3, (count, 2, 14, 1))
    return np.take_along_axis(rows, pick, axis=2)


def tied_everywhere(random, count):
    """Copies of three quantised rows."""
    rows = tied_within_edges(random, count)[:, :, :3]
    return np.take_along_axis(rows, random.randint(0, 3, (count, 2, 14, 1)), axis=2)


@pytest.mark.parametrize("make", [continuous, tied_within_edges, tied_between_edges, tied_everywhere])
def test_decode_and_genotype_equal_a_plain_implementation(make):
    population = make(np.random.RandomState(1), 150)
    decoded = decode(torch.from_numpy(population)).numpy()
    for alphas, one_hot in zip(population, decoded, strict=True):
        assert np.array_equal(one_hot, plain_decode(alphas))
        cell = genotype(torch.from_numpy(alphas))
        assert cell.normal == plain_pairs(alphas[0])
        assert cell.reduce == plain_pairs(alphas[1])
        assert cell.normal_concat == cell.reduce_concat == [2, 3, 4, 5]


def test_ties_are_common_in_the_tied_samples():
    alphas = tied_everywhere(np.random.RandomState(1), 150)
    best = alphas[..., 1:].max(-1, keepdims=True)
    assert ((alphas[..., 1:] == best).sum(-1) > 1).mean() > 0.5  # operations
    assert (alphas[:, :, 0] == alphas[:, :, 1]).all(-1).mean() > 0.3  # the two edges of the first node


def test_decode_takes_the_lowest_operation_among_equals():
    alphas = torch.zeros(2, 14, 8)
    alphas[..., 5:] = 0.5
    assert {op for op, _ in genotype(alphas).normal} == {"sep_conv_5x5"}
    assert decode(alphas).nonzero()[:, 2].unique().tolist() == [5]
    assert {op for op, _ in genotype(torch.zeros(2, 14, 8)).reduce} == {"max_pool_3x3"}


def test_decode_takes_the_lower_edge_among_equals():
    equal = torch.full((2, 14, 8), 0.25)
    assert [node for _, node in genotype(equal).normal] == [0, 1] * 4
    assert decode(equal)[1].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 5, 6, 9, 10]

    alphas = torch.zeros(2, 14, 8)
    alphas[:, [10, 12, 13], DIL5] = 0.75  # inputs 1, 3 and 4 of the last node
    assert genotype(alphas).normal[6:] == [("dil_conv_5x5", 1), ("dil_conv_5x5", 3)]


def test_genotype_has_the_strongest_edge_first():
    alphas = torch.zeros(2, 14, 8)
    alphas[0, 1, SEP3] = 0.9  # node 0: input 1 before input 0
    alphas[0, 0, DIL5] = 0.8
    alphas[0, 8, DIL5] = 0.9  # node 2 (edges 5 to 8): input 3, then input 1
    alphas[0, 6, SEP3] = 0.7
    pairs = genotype(alphas).normal
    assert pairs[:2] == [("sep_conv_3x3", 1), ("dil_conv_5x5", 0)]
    assert pairs[4:6] == [("dil_conv_5x5", 3), ("sep_conv_3x3", 1)]


def test_edge_strength_is_the_softmax_not_the_raw_value():
    alphas = torch.zeros(2, 14, 8)
    alphas[0, 2] = 0.9  # the largest raw values, but one among eight equals: softmax 1/8
    alphas[0, 3, SEP3] = 0.5
    alphas[0, 4, DIL5] = 0.4
    assert genotype(alphas).normal[2:4] == [("sep_conv_3x3", 1), ("dil_conv_5x5", 2)]


@pytest.mark.parametrize("others", [0.0, 0.5, 0.999])
def test_decode_never_keeps_none(others):
    alphas = torch.full((2, 14, 8), others)
    alphas[..., 0] = 0.999  # first, or tied for first
    assert decode(alphas)[..., 0].sum() == 0
    assert "none" not in {op for op, _ in genotype(alphas).normal + genotype(alphas).reduce}


def test_strong_none_weakens_its_edge():
    alphas = torch.zeros(2, 14, 8)
    alphas[..., SEP3] = 0.5
    alphas[0, 9, 0] = 0.9
    assert [node for _, node in genotype(alphas).normal[6:]] == [1, 2]


def test_decode_keeps_two_one_hot_edges_per_node():
    decoded = decode(random_alphas(200, torch.Generator().manual_seed(0)))
    assert set(decoded.unique().tolist()) == {0.0, 1.0}
    assert decoded.sum(-1).max() == 1
    for edges in (slice(0, 2), slice(2, 5), slice(5, 9), slice(9, 14)):
        assert (decoded[..., edges, :].sum((-1, -2)) == 2).all()


@pytest.mark.parametrize("make", [continuous, tied_everywhere])
def test_decode_is_idempotent(make):
    decoded = decode(torch.from_numpy(make(np.random.RandomState(2), 300)))
    assert torch.equal(decode(decoded), decoded)


def test_decode_treats_individuals_one_by_one():
    alphas = random_alphas(12, torch.Generator().manual_seed(3))
    single = torch.stack([decode(a) for a in alphas])
    assert torch.equal(decode(alphas), single)
    assert torch.equal(decode(alphas.view(3, 4, 2, 14, 8)), single.view(3, 4, 2, 14, 8))
    assert decode(alphas[:0]).shape == (0, 2, 14, 8)


def test_decode_does_not_change_its_input():
    alphas = random_alphas(3, torch.Generator().manual_seed(4))
    before = alphas.clone()
    decode(alphas)
    decode(alphas.transpose(0, 1).contiguous().transpose(0, 1))  # not contiguous
    genotype(alphas[0])
    assert torch.equal(alphas, before)


def test_decode_takes_input_that_is_not_contiguous():
    alphas = random_alphas(3, torch.Generator().manual_seed(4))
    strided = alphas.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(decode(strided), decode(alphas))


def test_genotypes_are_valid_cells_of_plain_values():
    for alphas in random_alphas(20, torch.Generator().manual_seed(5)):
        cell = genotype(alphas)
        assert validate(cell) == cell
        assert all(type(op) is str and type(node) is int for op, node in cell.normal + cell.reduce)


def test_random_alphas_are_uniform_and_reproducible():
    alphas = random_alphas(50, generator=torch.Generator().manual_seed(6))
    assert alphas.shape == (50, 2, 14, 8)
    assert alphas.dtype == torch.float32
    assert alphas.min() >= 0
    assert alphas.max() < 1
    assert abs(alphas.mean() - 0.5) < 0.01
    assert abs(alphas.var() - 1 / 12) < 0.005
    assert torch.equal(alphas, random_alphas(50, generator=torch.Generator().manual_seed(6)))
    assert not torch.equal(alphas, random_alphas(50, generator=torch.Generator().manual_seed(7)))
