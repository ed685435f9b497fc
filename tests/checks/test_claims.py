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


@pytest.mark.parametrize(("family", "part"), [("t5", None), ("bart", "decoder")])
def test_a_decoder_with_an_input_of_its_own_is_refused(family: str, part: str | None) -> None:
    model = pe_swap.swap_positional(tiny(family), "alibi", part=part)
    with pytest.raises(pe_swap.errors.UnsupportedModelError, match="check_positional runs models of one input"):
        pe_swap.check_positional(model)


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
