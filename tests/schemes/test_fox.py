"""FoX's gates: pair by pair, and wherever a cache carries them."""

import math
from dataclasses import replace

import pytest
import torch

from pe_swap.errors import OptionError
from pe_swap.schemes.alibi import geometric_slopes
from pe_swap.schemes.positions import Positions
from tests.references import fox as reference
from tests.support.schemes import build, geometry, positions

SMALL = geometry(hidden_size=24, num_heads=3, head_dim=8)


def with_gates(gate_logits: torch.Tensor, first_query: int) -> Positions:
    kv_len = gate_logits.shape[-1]
    here = positions(first_query, kv_len - first_query, kv_len)
    return replace(here, carried=torch.nn.functional.logsigmoid(gate_logits)[..., None])


@pytest.mark.parametrize("first_query", [0, 6, 8])
def test_scores_are_the_papers(first_query: int) -> None:
    gate_logits = torch.randn(2, 3, 9) * 3
    x = torch.zeros(2, 3, 9, 8)
    ours = build("fox", sizes=SMALL).score_bias(
        x[:, :, first_query:], x, with_gates(gate_logits, first_query), scaling=1.0, layer=0
    )
    expected = reference.score_term(gate_logits, first_query)
    torch.testing.assert_close(ours.double().tril(first_query), expected, atol=1e-5, rtol=0)


def test_a_blocks_positions_keep_what_it_may_look_at() -> None:
    here = replace(positions(0, 7, 7), carried=torch.arange(7.0).expand(1, 3, 7)[..., None])
    assert here.block(2, 4, 4).carried[0, 0, :, 0].tolist() == [0, 1, 2, 3]
    assert positions(0, 3, 3).block(0, 2, 2).carried is None


def test_constant_gates_are_alibi() -> None:
    slope = geometric_slopes(12)[0]
    logit = -math.log(math.expm1(slope))  # sigmoid(logit) = exp(-slope)
    x = torch.zeros(1, 3, 9, 8)
    ours = build("fox", sizes=SMALL).score_bias(x, x, with_gates(torch.full((1, 3, 9), logit), 0), scaling=1.0, layer=0)
    distance = torch.arange(9)[None] - torch.arange(9)[:, None]
    torch.testing.assert_close(ours[0, 0], slope * distance.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("trained_length", "reach"), [(32, 2.0), (1024, 32.0)])
def test_a_start_lets_older_tokens_fade_by_the_trained_length(trained_length: int, reach: float) -> None:
    assert build("fox", sizes=replace(SMALL, trained_length=trained_length)).options.initial_reach == reach


def test_gates_read_the_hidden_state() -> None:
    scheme = build("fox", sizes=SMALL, initial_reach=320)
    hidden = torch.randn(2, 5, 24)
    start = scheme.extra_key_channels(hidden, layer=1)
    assert start.shape == (2, 3, 5, 1)
    torch.testing.assert_close(start, torch.full_like(start, -1 / 320))
    torch.nn.init.normal_(scheme.gate_weights["1"])
    expected = (hidden @ scheme.gate_weights["1"].T + scheme.gate_biases["1"]).sigmoid().log()
    torch.testing.assert_close(scheme.extra_key_channels(hidden, layer=1)[..., 0].transpose(1, 2), expected)


def test_far_back_in_bf16_nothing_is_lost_but_the_gates_rounding() -> None:
    gates = torch.nn.functional.logsigmoid(torch.randn(1, 3, 4096) + 6).bfloat16()
    x = torch.zeros(1, 3, 4096, 8).bfloat16()
    here = replace(positions(4095, 1, 4096), carried=gates[..., None])
    ours = build("fox", sizes=SMALL).score_bias(x[:, :, -1:], x, here, scaling=1.0, layer=0)
    exact = gates.double().cumsum(-1)
    expected = exact[..., -1:, None] - exact[..., None, :]
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-5)  # sums near 16, float32


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"fox: option 'initial_reach' is 0.5; it must be a number above 1 .*or 'match'"):
        build("fox", initial_reach=0.5)
