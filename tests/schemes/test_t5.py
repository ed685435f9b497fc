"""T5's buckets: the golden table, and transformers' own function at every distance."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from pe_swap.errors import OptionError
from pe_swap.schemes import Native
from pe_swap.schemes.t5 import bucket_of
from tests.support.schemes import build, geometry

DISTANCES = [0, 1, 2, 7, 8, 15, 16, 17, 18, 19, 20, 24, 31, 32, 48, 63, 64, 96, 112, 127, 128, 200, 1000]
CAUSAL = [0, 1, 2, 7, 8, 15, 16, 16, 16, 17, 17, 19, 21, 21, 24, 26, 26, 29, 30, 31, 31, 31, 31]
PAST = [0, 1, 2, 7, 8, 9, 10, 10, 10, 10, 10, 11, 11, 12, 13, 13, 14, 15, 15, 15, 15, 15, 15]
FUTURE = [0, 17, 18, 23, 24, 25, 26, 26, 26, 26, 26, 27, 27, 28, 29, 29, 30, 31, 31, 31, 31, 31, 31]


@pytest.mark.parametrize(("sign", "is_causal", "expected"), [(-1, True, CAUSAL), (-1, False, PAST), (1, False, FUTURE)])
def test_golden_buckets(sign: int, is_causal: bool, expected: list[int]) -> None:
    assert bucket_of(sign * torch.tensor(DISTANCES), 32, 128, is_causal).tolist() == expected


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (64, 256), (8, 12), (20, 1000)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_every_distance_has_transformers_bucket(num_buckets: int, max_distance: int, is_causal: bool) -> None:
    distance = torch.arange(-10_000, 10_001)
    theirs = T5Attention._relative_position_bucket(distance, not is_causal, num_buckets, max_distance)
    assert torch.equal(bucket_of(distance, num_buckets, max_distance, is_causal), theirs)


@pytest.mark.parametrize("is_causal", [True, False])
def test_every_reachable_entry_gets_a_gradient(is_causal: bool) -> None:
    scheme = build("t5", sizes=geometry(is_causal=is_causal))
    distance = torch.arange(-200, 201)
    scheme.relative_bias(distance, layer=0).sum().backward()
    # an encoder never uses the first bucket of the future half: distance 0 belongs to the past
    unused = [] if is_causal else [16]
    assert (scheme.table.grad == 0).all(dim=1).nonzero().flatten().tolist() == unused


@pytest.mark.parametrize("is_causal", [True, False])
def test_starts_with_near_keys_before_far_ones(is_causal: bool) -> None:
    scheme = build("t5", sizes=geometry(is_causal=is_causal), start="recency")
    distance = torch.arange(-300, 1)
    side = 32 if is_causal else 16
    bias = scheme.relative_bias(distance, layer=0).double()
    alone = distance.abs() < side // 2
    weight = 1 / (1 + distance.double().abs())
    torch.testing.assert_close(bias.exp()[:, alone], weight[alone].expand(12, -1), rtol=1e-6, atol=0)
    buckets = bucket_of(distance, 32, 128, is_causal)
    for bucket in buckets.unique():
        nearest = distance[buckets == bucket].abs().min()
        begins = torch.expm1(-bias[0, buckets == bucket][0])
        assert nearest - 1 < begins < nearest + 1e-3  # logarithmic buckets begin between two whole distances
    if not is_causal:
        assert torch.equal(scheme.relative_bias(-distance, layer=0)[:, :-1], scheme.relative_bias(distance, layer=0)[:, :-1])


@pytest.mark.parametrize(("is_causal", "start"), [(True, "recency"), (False, "zero")])
def test_an_encoder_starts_from_zero_unless_told(is_causal: bool, start: str) -> None:
    scheme = build("t5", sizes=geometry(is_causal=is_causal))
    assert scheme.options.start == start
    assert scheme.table.any() == is_causal


def test_bias_is_the_buckets_row() -> None:
    scheme = build("t5")
    torch.nn.init.normal_(scheme.table)
    bias = scheme.relative_bias(torch.tensor([-20, 0]), layer=2)
    assert torch.equal(bias, scheme.table[[17, 0]].T)


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'num_bucket'. Did you mean 'num_buckets'"):
        build("t5", num_bucket=3)
    with pytest.raises(OptionError, match=r"t5: option 'num_buckets' is 6; it must be a multiple of 4 in an encoder"):
        build("t5", sizes=geometry(is_causal=False), num_buckets=6)
    assert build("t5", num_buckets=6).table.shape == (6, 12)
    with pytest.raises(OptionError, match=r"t5: option 'num_buckets' is 7; it must be even"):
        build("t5", num_buckets=7)
    with pytest.raises(OptionError, match=r"'num_buckets' is 4000000"):
        build("t5", num_buckets=4_000_000)
    with pytest.raises(OptionError, match=r"'max_distance' is 16; it must be above num_buckets / 2 = 16"):
        build("t5", max_distance=16)


def test_in_a_model_with_such_a_bias_it_is_that_bias() -> None:
    native = Native(options={"num_buckets": 16, "max_distance": 40}, bias_table=torch.randn(16, 12))
    own = build("t5", native=native)
    assert own.options.to_dict() == {"num_buckets": 16, "max_distance": 40, "start": "model"}
    assert torch.equal(own.table, native.bias_table)
    assert own.keeps_function
    for options in ({"num_buckets": 32}, {"max_distance": 128}, {"start": "recency"}):
        other = build("t5", native=native, **options)
        assert other.options.start == "recency"
        assert not other.keeps_function
    assert build("t5").options.num_buckets == 32
    with pytest.raises(
        OptionError, match=r"t5: option 'start' is 'model'; it must be 'recency' or 'zero', as this model has no bias"
    ):
        build("t5", start="model")
