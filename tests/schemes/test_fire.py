"""FIRE against the paper, pair by pair: decoders and encoders, chunks, padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pe_swap.errors import OptionError
from pe_swap.schemes.fire import Fire
from pe_swap.schemes.positions import Positions
from tests.references import fire as reference
from tests.support.schemes import build, geometry, positions

HEADS = 3


def fire(is_causal: bool = True, **options: object) -> Fire:
    scheme = build("fire", sizes=geometry(num_heads=HEADS, head_dim=4, is_causal=is_causal), **options)
    assert isinstance(scheme, Fire)
    with torch.no_grad():
        for parameter in scheme.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return scheme


def bias(scheme: Fire, where: Positions, layer: int = 0) -> Tensor:
    query = torch.zeros(where.query_ids.shape[0], HEADS, len(where.query_slots), 4)
    key = torch.zeros(where.query_ids.shape[0], HEADS, len(where.key_slots), 4)
    return scheme.score_bias(query, key, where, scaling=0.5, layer=layer)


def expected(scheme: Fire, query_ids: list[int], key_ids: list[int], name: str) -> Tensor:
    threshold = abs(scheme.multipliers[name].item()) * scheme.options.threshold
    parts = (scheme.hidden_weights, scheme.hidden_biases, scheme.output_weights, scheme.output_biases)
    layers = [part[name].detach() for part in parts]
    return reference.bias(query_ids, key_ids, scheme.scales[name].item(), threshold, scheme.geometry.is_causal, *layers)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("functions", ["per_layer", "shared"])
def test_is_the_papers(is_causal: bool, functions: str) -> None:
    scheme = fire(is_causal, functions=functions, threshold=10.0)
    for layer in (0, 2):
        found = bias(scheme, positions(0, 30, 30), layer)
        wanted = expected(scheme, list(range(30)), list(range(30)), "shared" if functions == "shared" else str(layer))
        seen = ~wanted.isnan()
        torch.testing.assert_close(found[0].double()[seen], wanted[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_factor_on_the_threshold_may_turn_negative(is_causal: bool) -> None:
    scheme = fire(is_causal, threshold=10.0)
    where = positions(0, 30, 30)
    before = bias(scheme, where)
    with torch.no_grad():
        scheme.multipliers["0"].neg_()
        scheme.scales["0"].neg_()
    assert torch.equal(bias(scheme, where), before)
    assert scheme.multipliers["0"] < 0


def test_a_cached_chunk_knows_where_it_stands() -> None:
    scheme = fire(threshold=5.0)
    whole = bias(scheme, positions(0, 20, 20))
    torch.testing.assert_close(bias(scheme, positions(13, 7, 20)), whole[:, :, 13:])
    wrong = bias(scheme, positions(0, 7, 20))  # the number of the row, not of the position
    assert (wrong[:, :, :, 0] - whole[:, :, 13:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_on_the_left_moves_nothing(is_causal: bool) -> None:
    scheme = fire(is_causal, threshold=5.0)
    slots, ids = torch.arange(20), torch.stack((torch.arange(20), (torch.arange(20) - 6).clamp(min=0)))
    found = bias(scheme, Positions(slots, slots, ids, ids))
    alone = bias(scheme, positions(0, 14, 14))
    torch.testing.assert_close(found[1, :, 6:, 6:], alone[0])
    torch.testing.assert_close(
        found[0, :, :14, :14].tril() if is_causal else found[0, :, :14, :14], alone[0].tril() if is_causal else alone[0]
    )


def test_its_argument_stays_between_0_and_1_at_any_length() -> None:
    scheme = fire(threshold=5.0)
    near_and_far = Positions(
        torch.tensor([100_000]), torch.arange(100_001), torch.tensor([[100_000]]), torch.arange(100_001)[None]
    )
    found = bias(scheme, near_and_far)[0, :, 0]
    ends = expected(scheme, [100_000], [0, 50_000, 100_000], "0")[:, 0]
    torch.testing.assert_close(found[:, [0, 50_000, 100_000]].double(), ends, atol=1e-5, rtol=1e-5)


def test_two_sides_are_told_apart_in_an_encoder_only() -> None:
    found = bias(fire(is_causal=False), positions(0, 9, 9))
    assert (found - found.transpose(-1, -2)).abs().max() > 1e-2
    assert fire(is_causal=False).output_biases["0"].shape == (2 * HEADS,)
    assert fire().output_biases["0"].shape == (HEADS,)


@pytest.mark.parametrize("is_causal", [True, False])
def test_starts_with_near_keys_before_far_ones(is_causal: bool) -> None:
    scheme = build("fire", sizes=geometry(num_heads=HEADS, head_dim=4, is_causal=is_causal), threshold=20, start="recency")
    place = [math.log(0.1 * step + 1) / math.log(3) for step in range(21)]
    expected = torch.tensor([-8 * x for x in reversed(place)]).expand(1, HEADS, 21)
    torch.testing.assert_close(bias(scheme, positions(20, 1, 21))[:, :, 0], expected, atol=1e-4, rtol=0)
    if not is_causal:
        torch.testing.assert_close(bias(scheme, positions(0, 1, 21))[:, :, 0], expected.flip(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("is_causal", "start"), [(True, "recency"), (False, "zero")])
def test_an_encoder_starts_from_zero_unless_told(is_causal: bool, start: str) -> None:
    scheme = build("fire", sizes=geometry(num_heads=HEADS, head_dim=4, is_causal=is_causal))
    assert scheme.options.start == start
    assert bias(scheme, positions(0, 9, 9)).any() == is_causal


def test_a_zero_start_has_a_gradient_and_then_reaches_everything() -> None:
    scheme = build("fire", sizes=geometry(num_heads=HEADS, head_dim=4), start="zero")
    found = bias(scheme, positions(0, 9, 9))
    assert not found.any()
    (found * torch.randn_like(found)).sum().backward()
    assert scheme.output_weights["0"].grad.abs().max() > 0
    scheme = fire(start="zero")
    found = bias(scheme, positions(0, 9, 9), layer=1)
    (found * torch.randn_like(found)).sum().backward()
    assert all((parameter.grad is not None) == name.endswith(".1") for name, parameter in scheme.named_parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in scheme.parameters() if parameter.grad is not None)


def test_the_threshold_is_a_quarter_of_the_trained_length() -> None:
    assert build("fire", sizes=geometry(trained_length=2048)).options.threshold == 512
    assert build("fire", threshold=7).options.threshold == 7


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"fire: option 'functions' is 'each'; it must be one of 'per_layer', 'shared'"):
        build("fire", functions="each")
    with pytest.raises(OptionError, match=r"'start' is 'none'; it must be one of 'recency', 'zero'"):
        build("fire", start="none")
    with pytest.raises(OptionError, match=r"'threshold' is 0; it must be a number above 0"):
        build("fire", threshold=0)
    with pytest.raises(OptionError, match=r"'hidden_units' is 0; it must be an integer from 1"):
        build("fire", hidden_units=0)
    with pytest.raises(OptionError, match=r"'scale' is -0.1"):
        build("fire", scale=-0.1)
