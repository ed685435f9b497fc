"""The learned table: what is kept, and how rows come about."""

import pytest
import torch

from pe_swap.errors import OptionError, PositionRangeError
from pe_swap.schemes.learned import resample
from tests.references import absolute as reference
from tests.support.schemes import build, geometry


def test_at_the_trained_length_it_is_the_old_table_bit_for_bit() -> None:
    table = torch.randn(32, 768)
    scheme = build("learned", table)
    assert scheme.max_length == 32
    assert torch.equal(scheme.encode(torch.arange(32)[None])[0], table)


@pytest.mark.parametrize("extend", ["interpolate", "tile", "group", "mean"])
@pytest.mark.parametrize("length", [20, 32, 33, 64, 129])
def test_rows_are_the_references(extend: str, length: int) -> None:
    table = torch.randn(32, 24)
    torch.testing.assert_close(
        resample(table, length, extend).double(), reference.extended(table, length, extend), atol=1e-5, rtol=0
    )


def test_hand_numbers() -> None:
    table = torch.tensor([[0.0], [3.0], [9.0]])
    # interpolate, 5 rows: places 0, .5, 1, 1.5, 2
    assert resample(table, 5, "interpolate").flatten().tolist() == [0.0, 1.5, 3.0, 6.0, 9.0]
    assert resample(table, 5, "tile").flatten().tolist() == [0.0, 3.0, 9.0, 0.0, 3.0]
    # group: floor(m * 3 / 6)
    assert resample(table, 6, "group").flatten().tolist() == [0.0, 0.0, 3.0, 3.0, 9.0, 9.0]
    # mean: (0 + 3 + 9) / 3 = 4
    assert resample(table, 5, "mean").flatten().tolist() == [0.0, 3.0, 9.0, 4.0, 4.0]


@pytest.mark.parametrize("length", [1500, 2048, 3000, 4096, 16384])
def test_interpolation_keeps_both_ends_exactly(length: int) -> None:
    table = torch.randn(1024, 4)
    longer = resample(table, length, "interpolate")
    assert torch.equal(longer[0], table[0])
    assert torch.equal(longer[-1], table[-1])


def test_encode_gives_the_tables_own_dtype_and_gradients() -> None:
    scheme = build("learned", torch.randn(32, 768)).to(torch.bfloat16)
    vectors = scheme.encode(torch.tensor([[3, 3]]))
    assert vectors.dtype == torch.bfloat16
    vectors.sum().backward()
    assert scheme.table.grad[3].eq(2).all()
    assert scheme.table.grad[4].eq(0).all()


def test_beyond_the_table() -> None:
    with pytest.raises(PositionRangeError, match=r"Position 32 is beyond the 32 .*'learned'.*max_length=") as caught:
        build("learned").encode(torch.tensor([[32]]))
    assert isinstance(caught.value, IndexError)


@pytest.mark.parametrize("length", [0, -1, 2**24 + 1, 1.5, True])
def test_wrong_lengths(length: object) -> None:
    with pytest.raises(
        OptionError, match=rf"learned: option 'max_length' is {length}; it must be an integer from 1 to 16,777,216"
    ):
        build("learned", max_length=length)


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'maxlength'. Did you mean 'max_length'"):
        build("learned", maxlength=64)
    with pytest.raises(OptionError, match=r"'extend' is 'tiles'.*Did you mean 'tile'"):
        build("learned", extend="tiles")


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({}, True),
        ({"max_length": 50}, False),
        ({"max_length": 50, "extend": "tile"}, True),
        ({"max_length": 50, "extend": "mean"}, True),
        ({"max_length": 50, "extend": "group"}, False),
        ({"max_length": 20, "extend": "tile"}, False),
    ],
)
def test_says_whether_it_keeps_the_models_function(options: dict[str, object], keeps: bool) -> None:
    table = torch.randn(32, 768)
    scheme = build("learned", table, **options)
    assert scheme.keeps_function is keeps
    assert torch.equal(scheme.table[:32], table) is keeps


def test_in_a_model_without_a_table_it_starts_at_zero_and_is_as_wide_as_the_tokens() -> None:
    scheme = build("learned", sizes=geometry(input_size=128))
    assert scheme.table.shape == (32, 128)
    assert not scheme.table.any()
    assert not scheme.keeps_function
