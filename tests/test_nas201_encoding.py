"""Alphas, decoding and arch strings of the NAS-Bench-201 space."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nas201.encoding import arch_string, decode, random_alphas
from nas201.genotypes import from_arch_string, to_arch_string
from support.files import UserError

ARCH = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"


def test_random_alphas_are_uniform_and_reproducible():
    alphas = random_alphas(1000, generator=torch.Generator().manual_seed(1))
    assert alphas.shape == (1000, 1, 6, 5)
    assert alphas.dtype == torch.float32
    assert 0 <= alphas.min() < 0.001
    assert 0.999 < alphas.max() < 1
    assert alphas.mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(alphas, random_alphas(1000, generator=torch.Generator().manual_seed(1)))


def test_decode_is_the_argmax_as_one_hot():
    raw = random_alphas(1000, generator=torch.Generator().manual_seed(2))
    decoded = decode(raw)
    assert decoded.shape == raw.shape
    assert torch.equal(decoded.argmax(-1), raw.argmax(-1))
    assert torch.equal(decoded.sum(-1), torch.ones(1000, 1, 6))
    assert set(decoded.unique().tolist()) == {0.0, 1.0}
    assert (decoded[..., 0] == 1).any()  # `none` can be chosen


def test_decode_is_idempotent():
    decoded = decode(random_alphas(1000, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(decode(decoded), decoded)


def test_decode_takes_any_leading_dimensions():
    raw = random_alphas(20, generator=torch.Generator().manual_seed(2))
    decoded = decode(raw)
    assert torch.equal(decode(raw[3]), decoded[3])
    assert torch.equal(decode(raw[3, 0]), decoded[3, 0])
    assert torch.equal(decode(raw.view(4, 5, 1, 6, 5)), decoded.view(4, 5, 1, 6, 5))


def test_decode_takes_the_lowest_index_among_equals():
    assert from_arch_string(arch_string(torch.zeros(6, 5))) == (0,) * 6
    alphas = torch.zeros(6, 5)
    alphas[:, 2] = alphas[:, 4] = 0.5
    assert arch_string(alphas) == arch_string(decode(alphas))
    assert from_arch_string(arch_string(alphas)) == (2,) * 6


def test_arch_strings_round_trip_for_all_15625_cells():
    strings = set()
    for ops in itertools.product(range(5), repeat=6):
        text = to_arch_string(ops)
        assert from_arch_string(text) == ops
        strings.add(text)
    assert len(strings) == 15625


def test_arch_string_takes_one_individual():
    assert from_arch_string(ARCH) == (3, 3, 4, 1, 3, 1)
    alphas = torch.eye(5)[[3, 3, 4, 1, 3, 1]]
    assert arch_string(alphas) == arch_string(alphas[None]) == ARCH
    for shape in ((2, 6, 5), (30,), (5, 6)):
        with pytest.raises(ValueError, match="alphas of one architecture"):
            arch_string(torch.zeros(shape))


@pytest.mark.parametrize(
    "text, reason",
    [
        (ARCH.replace("avg_pool_3x3", "max_pool_3x3"), "max_pool_3x3"),
        (ARCH.replace("avg_pool_3x3~1|", ""), "2<-1"),
        (ARCH.rpartition("+")[0], "3<-0"),
        ("", "1<-0"),
        (ARCH + "|", ARCH),
        (ARCH + "\n", ARCH),
        (" " + ARCH, ARCH),
        (ARCH.replace("|avg_pool_3x3~1|", "|avg_pool_3x3~1|none~1|"), "none~1"),
        (ARCH.replace("nor_conv_3x3~0|+", "~0|+", 1), "''"),
        ("x" * 100_000, "xxx"),
    ],
)
def test_bad_arch_string_is_refused_with_its_reason(text, reason):
    with pytest.raises(UserError) as error:
        from_arch_string(text)
    message = str(error.value)
    assert reason in message
    assert "\n" not in message
    assert len(message) < 400


@given(st.text(alphabet="|~+012_none3xskipcv", max_size=80) | st.text(max_size=40))
def test_any_text_is_refused_or_round_trips(text):
    try:
        assert to_arch_string(from_arch_string(text)) == text
    except UserError as error:
        assert "\n" not in str(error)
