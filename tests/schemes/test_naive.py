"""The naive encodings (index, binary) and none."""

import pytest
import torch

from pe_swap.errors import OptionError
from pe_swap.schemes import Native
from pe_swap.schemes.parameters import root_mean_square
from tests.references import absolute as reference
from tests.support.schemes import build, geometry


def test_index_by_hand() -> None:
    # position 6 times 0.5, signs alternating
    assert build("index", scale=0.5).encode(torch.tensor([[6]]))[0, 0, :4].tolist() == [3.0, -3.0, 3.0, -3.0]


def test_index_grows_without_bound() -> None:
    scheme = build("index", scale=1.0)
    far, near = scheme.encode(torch.tensor([[1_000_000]])), scheme.encode(torch.tensor([[10]]))
    assert root_mean_square(far) == pytest.approx(1e5 * root_mean_square(near))


def test_binary_by_hand_and_by_reference() -> None:
    scheme = build("binary", scale=1.0)
    assert scheme.encode(torch.tensor([[6]]))[0, 0, :5].tolist() == [0, 1, 1, 0, 0]  # 6 = 2 + 4
    for place in (0, 1, 7, 8, 1023, 2**20 + 5):
        assert scheme.encode(torch.tensor([[place]]))[0, 0].tolist() == reference.bits(place, 768, 24)


@pytest.mark.parametrize("name", ["index", "binary"])
def test_match_gives_the_trained_positions_the_size_of_the_table(name: str) -> None:
    table = torch.randn(32, 768) * 0.07
    vectors = build(name, table).encode(torch.arange(32)[None])
    assert root_mean_square(vectors) == pytest.approx(root_mean_square(table), rel=1e-5)
    with pytest.raises(OptionError, match=rf"{name}: option 'scale' is 'match'.*Give a number"):
        build(name)


@pytest.mark.parametrize("name", ["index", "binary"])
def test_wrong_options(name: str) -> None:
    with pytest.raises(OptionError, match=rf"{name}: unknown option 'scal'. Did you mean 'scale'"):
        build(name, scal=1)
    with pytest.raises(OptionError, match=r"'scale' is 'matching'; it must be a number above 0 .* or 'match'"):
        build(name, scale="matching")


def test_none_has_no_hooks_and_few_options() -> None:
    assert build("none").hooks == frozenset()
    with pytest.raises(OptionError, match=r"none: unknown option 'base'\. Options: temperature, "):
        build("none", base=1)


@pytest.mark.parametrize("name", ["index", "binary", "sinusoidal"])
def test_without_a_table_the_size_is_that_of_the_tokens(name: str) -> None:
    sizes = geometry(input_size=128)
    vectors = build(name, sizes=sizes, native=Native(token_rms=0.05)).encode(torch.arange(32)[None])
    assert vectors.shape == (1, 32, 128)
    assert root_mean_square(vectors) == pytest.approx(0.05, rel=1e-5)
    both = Native(table=torch.randn(32, 128), token_rms=0.05)
    assert root_mean_square(build(name, sizes=sizes, native=both).encode(torch.arange(32)[None])) == pytest.approx(1, rel=0.05)
