"""`check_positional` sees what it is there to see: every claim, broken on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pe_swap
from pe_swap.patching.binding import LayerBinding
from pe_swap.patching.install import holder_of
from tests.support.covering import covering_pairs
from tests.support.families import tiny
from tests.support.models import BACKENDS, CASES, TRAINED_LENGTH, build, swapped

pytestmark = pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")


def outcome(report: pe_swap.checks.PositionalReport) -> dict[str, bool | None]:
    return {check.name: check.passed for check in report.checks}


@pytest.mark.parametrize(("case", "family"), [*((case, "gpt2") for case in CASES), *covering_pairs(["bert", "bert-decoder"])])
def test_every_scheme_keeps_its_claims(case: str, family: str) -> None:
    model = swapped(family, case)
    state = torch.random.get_rng_state()
    report = pe_swap.check_positional(model.train())
    assert report.passed, str(report)
    assert model.training
    assert model.config._attn_implementation in ("sdpa", "pe_swap_sdpa")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_measured_by_its_own_rounding(backend: str) -> None:
    report = pe_swap.check_positional(swapped("gpt2", "alibi", backend).to(torch.bfloat16))
    assert report.passed, str(report)
    assert report.tolerance == pytest.approx(0.088, abs=1e-3)


def test_an_effect_too_near_to_the_rounding_of_bfloat16_is_no_failure() -> None:
    model = pe_swap.swap_positional(tiny("bart"), "learned")
    assert of_part(pe_swap.check_positional(model), "encoder")["order matters"] is True
    found = pe_swap.check_positional(model.to(torch.bfloat16))
    check = next(check for check in found.checks if (check.part, check.name) == ("encoder", "order matters"))
    assert check.passed is None
    assert check.detail.endswith("too near to tell: check a float32 copy")


def test_float64_is_measured_by_the_rounding_of_angles_in_float32() -> None:
    report = pe_swap.check_positional(swapped("gpt2", "rope").to(torch.float64))
    assert report.passed, report


def test_a_fresh_scheme_is_not_a_failure_and_missing_order_is_said() -> None:
    fresh = pe_swap.check_positional(pe_swap.swap_positional(build("bert"), "t5"))
    assert fresh.passed
    assert "order matters" in str(fresh)
    assert "starts from adding nothing, train it" in str(fresh)
    assert "no order is expected" in str(pe_swap.check_positional(swapped("bert", "none")))


def test_the_report_is_readable() -> None:
    text = str(pe_swap.check_positional(swapped("gpt2", "rope"))).splitlines()
    assert text[0] == "GPT2LMHeadModel with rope, sdpa: all claims hold (rounding: 3.5e-04)"
    assert any(line.startswith("  ok   cached = uncached") for line in text)


def test_keys_at_wrong_positions_in_a_cache_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped("gpt2", "rope")
    scheme = holder_of(model).scheme_at(0)
    rotate, rotation = scheme.transform_query_key, scheme.prepare_positions

    def from_zero(x: Tensor, position_ids: Tensor, *, role: Any, layer: int) -> Tensor:
        ids = position_ids - position_ids[:, :1] if role == "key" else position_ids
        return rotate(x, rotation(ids), role=role, layer=layer)

    monkeypatch.setattr(scheme, "prepare_positions", lambda position_ids: position_ids)
    monkeypatch.setattr(scheme, "transform_query_key", from_zero)
    found = outcome(pe_swap.check_positional(model))
    assert found["cached = uncached"] is False
    assert found["causal"] is True


def test_a_bias_dropped_by_a_backend_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped("gpt2", "t5")
    assert pe_swap.check_positional(model).passed
    monkeypatch.setattr(
        "pe_swap.attention.call.AttentionCall.bias_by_distance",
        lambda context, q_len, kv_len, device: torch.zeros(12, q_len + kv_len - 1),
    )
    found = outcome(pe_swap.check_positional(model))
    assert found["every layer bound"] is False
    assert found["backend = eager"] is False


def test_slots_that_ignore_padding_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped("gpt2", "sinusoidal")
    positional = holder_of(model)
    scheme = positional.scheme_at(0)
    encode = scheme.encode
    monkeypatch.setattr(scheme, "encode", lambda ids: encode(torch.arange(ids.shape[1])[None] + ids[:1, :1]))
    found = outcome(pe_swap.check_positional(model))
    assert found["left-padded = alone"] is False
    assert found["right-padded = alone"] is True


def test_a_look_into_the_future_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped("gpt2", "shaw")
    scheme = holder_of(model).scheme_at(0)
    monkeypatch.setattr(
        scheme, "score_bias", lambda query, key, positions, *, scaling, layer: key.mean((2, 3), keepdim=True) * positions.distance
    )
    found = outcome(pe_swap.check_positional(model))
    assert found["causal"] is False


def test_a_scheme_that_claims_too_much_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped("gpt2", "sinusoidal")
    monkeypatch.setattr(type(holder_of(model).scheme_at(0)), "shift_invariant", True)
    assert outcome(pe_swap.check_positional(model))["shift invariant"] is False


def test_a_layer_without_its_hook_is_a_failure_with_its_reason() -> None:
    model = swapped("gpt2", "alibi")
    model.transformer.h[1].attn._forward_pre_hooks.clear()
    model.transformer.h[1].attn._forward_pre_hooks_with_kwargs.clear()
    report = pe_swap.check_positional(model)
    assert not report.passed
    assert "Layer 1 carries the scheme 'alibi', but its attention was called without" in str(report)


def test_a_layer_bound_to_nothing_is_seen() -> None:
    model = swapped("gpt2", "alibi")
    attention = model.transformer.h[1].attn
    attention._forward_pre_hooks.clear()
    attention._forward_pre_hooks_with_kwargs.clear()
    del attention.pe_swap_binding
    report = pe_swap.check_positional(model)
    assert "FAIL every layer bound" in str(report)
    assert "alibi.relative_bias in layer 1" in str(report)
    assert isinstance(model.transformer.h[0].attn.pe_swap_binding, LayerBinding)


def test_an_unswapped_model_is_refused() -> None:
    with pytest.raises(pe_swap.errors.SwapStateError, match=r"GPT2LMHeadModel is not swapped.*swap_positional"):
        pe_swap.check_positional(build("gpt2"))


ENCODER_DECODERS = [("t5", "alibi", None), ("bart", "sinusoidal", None), ("marian", "shaw", None), ("whisper", "rope", None)]


@pytest.mark.parametrize(("family", "scheme", "part"), [*ENCODER_DECODERS, ("pegasus", "fox", "decoder")])
def test_the_stacks_of_an_encoder_decoder_are_checked_one_by_one(family: str, scheme: str, part: str | None) -> None:
    model = pe_swap.swap_positional(tiny(family), scheme, part=part)
    model.get_encoder().train()
    modes = [module.training for module in model.modules()]
    report = pe_swap.check_positional(model)
    assert report.passed, str(report)
    assert [module.training for module in model.modules()] == modes
    own_stacks = {"encoder", "decoder"} if part is None and family != "whisper" else {"decoder"}
    assert {check.part for check in report.checks} == own_stacks
    for name in own_stacks:
        assert {"every layer bound": True, "own scheme = unswapped": True, "backend = eager": True}.items() <= of_part(
            report, name
        ).items()
    assert of_part(report, "decoder")["cached = uncached"] is True
    assert of_part(report, "decoder")["causal"] is True


def of_part(report: pe_swap.checks.PositionalReport, part: str) -> dict[str, bool | None]:
    return {check.name: check.passed for check in report.checks if check.part == part}


def test_without_position_ids_padding_on_the_left_is_claimed_for_distances_only() -> None:
    claimed = pe_swap.check_positional(pe_swap.swap_positional(tiny("bart"), "alibi"))
    assert of_part(claimed, "decoder")["left-padded = alone"] is True
    absolute = pe_swap.check_positional(pe_swap.swap_positional(tiny("bart"), "sinusoidal"))
    assert of_part(absolute, "decoder")["left-padded = alone"] is None
    assert of_part(absolute, "decoder")["right-padded = alone"] is True


def test_without_position_ids_no_padding_is_claimed_where_the_length_of_a_row_scales_positions() -> None:
    model = pe_swap.swap_positional(tiny("bart"), "rope", rope_type="dynamic", factor=4.0, original_max_position_embeddings=8)
    report = pe_swap.check_positional(model)
    assert report.passed, str(report)
    check = next(check for check in report.checks if (check.part, check.name) == ("decoder", "right-padded = alone"))
    assert check.passed is None
    assert check.difference > report.tolerance


def test_a_bias_dropped_by_a_backend_is_seen_in_both_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pe_swap.swap_positional(tiny("t5"), "alibi")
    heads = holder_of(model, "decoder").geometry.num_heads
    monkeypatch.setattr(
        "pe_swap.attention.call.AttentionCall.bias_by_distance",
        lambda context, q_len, kv_len, device: torch.zeros(heads, q_len + kv_len - 1),
    )
    report = pe_swap.check_positional(model)
    for part in ("encoder", "decoder"):
        assert of_part(report, part)["backend = eager"] is False


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_fault_in_the_decoder_alone_is_seen_there(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pe_swap.swap_positional(tiny(family), "alibi")
    scheme = holder_of(model, "decoder").scheme_at(0)
    bias = scheme.relative_bias
    # A call for one query has no later keys, and a call for several has.
    monkeypatch.setattr(
        scheme, "relative_bias", lambda distance, **kwargs: bias(distance, **kwargs) * (1 + float((distance > 0).any()))
    )
    report = pe_swap.check_positional(model)
    assert of_part(report, "decoder")["cached = uncached"] is False
    assert False not in of_part(report, "encoder").values()
    assert "FAIL decoder: cached = uncached" in str(report)


def test_a_base_that_changes_with_the_length_is_reported_where_it_changes() -> None:
    for original_length in (TRAINED_LENGTH, 32 * TRAINED_LENGTH):
        model = pe_swap.swap_positional(
            build("gpt2"), "rope", rope_type="dynamic", factor=8.0, original_max_position_embeddings=original_length
        )
        check = next(check for check in pe_swap.check_positional(model).checks if check.name == "cached = uncached")
        assert check.passed is None
        assert check.difference > 1e-3
        assert check.detail.startswith(f"prefill, chunk, token, chunk, from position {original_length - 12:,}; not claimed")


def test_a_table_beside_a_base_that_changes_keeps_the_check_within_its_rows() -> None:
    model = pe_swap.swap_positional(build("gpt2"), "learned")
    pe_swap.swap_positional(model, "rope", layers=[1], rope_type="dynamic", factor=2.0, original_max_position_embeddings=1_000)
    report = pe_swap.check_positional(model)
    assert report.passed, str(report)
    assert f"from position {TRAINED_LENGTH - 24}; not claimed" in str(report)
