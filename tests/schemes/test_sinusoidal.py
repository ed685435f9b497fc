"""Sinusoids: the paper's numbers, far positions, size, and transformers' RoFormer."""

import math

import pytest
import torch
from transformers.models.roformer.modeling_roformer import RoFormerSinusoidalPositionalEmbedding

from pe_swap.errors import OptionError
from pe_swap.schemes.parameters import root_mean_square
from pe_swap.schemes.sinusoids import sinusoids
from tests.references import absolute as reference
from tests.support.schemes import build, geometry


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("size", [7, 64])
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_vectors_are_the_papers_also_far_out(layout: str, size: int, base: float) -> None:
    places = [0, 1, 2, 31, 2000, 100_000]
    ours = sinusoids(torch.tensor(places), size, base, layout)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), reference.sinusoidal(places, size, base, layout), atol=1e-7, rtol=0)


def test_hand_numbers() -> None:
    # size 4: theta_0 = 1, theta_1 = 10000^(-1/2) = 0.01; position 2
    expected = [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)]
    torch.testing.assert_close(sinusoids(torch.tensor(2), 4, 10000, "interleaved"), torch.tensor(expected))


def test_split_is_roformers() -> None:
    theirs = RoFormerSinusoidalPositionalEmbedding(40, 64).create_weight()
    torch.testing.assert_close(sinusoids(torch.arange(40), 64, 10000, "split"), theirs, atol=1e-6, rtol=0)


def test_match_gives_the_size_of_the_table() -> None:
    table = torch.randn(32, 768) * 0.03
    vectors = build("sinusoidal", table).encode(torch.arange(32)[None])
    assert root_mean_square(vectors) == pytest.approx(root_mean_square(table), rel=1e-5)


def test_match_without_a_table() -> None:
    with pytest.raises(OptionError, match=r"sinusoidal: option 'scale' is 'match'.*Give a number"):
        build("sinusoidal")


def test_wrong_options() -> None:
    table = torch.randn(32, 768)
    with pytest.raises(OptionError, match=r"unknown option 'bas'. Did you mean 'base'"):
        build("sinusoidal", table, bas=3)
    with pytest.raises(OptionError, match=r"'base' is 1; it must be a number above 1"):
        build("sinusoidal", table, base=1)
    with pytest.raises(OptionError, match=r"'scale' is nan"):
        build("sinusoidal", table, scale=math.nan)
    with pytest.raises(OptionError, match=r"'base' is inf"):
        build("sinusoidal", table, base=math.inf)


def test_nothing_but_options_is_kept() -> None:
    assert not build("sinusoidal", scale=0.1, sizes=geometry()).state_dict()
