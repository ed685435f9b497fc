"""FlexAttention: whatever it can honour equals the other backends, and what it cannot is an error.

Nothing is compiled here, which for attention is what users get on a CPU. transformers compiles the making of block masks for each new
length, in seconds: test_flex_compiled.py leaves that on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import BlockMask
from transformers import DynamicCache, PreTrainedModel, StaticCache, T5Config, T5EncoderModel

import pe_swap
from pe_swap.attention import flex
from pe_swap.attention.names import HOOKS_OF
from pe_swap.errors import UnsupportedBackendError
from pe_swap.schemes import SCHEMES, build_options
from pe_swap.schemes.base import ATTENTION_HOOKS
from tests.support.calls import Call, calls, expected
from tests.support.covering import PAIRS
from tests.support.models import (
    CASES,
    DECODERS,
    LENGTH_DEPENDENT,
    ROUNDING,
    VOCABULARY,
    build,
    disturb,
    logits,
    swapped,
    token_ids,
    with_cache,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),  # transformers' own call
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # PyTorch's own import
]


def honoured(case: str) -> bool:
    name, options = CASES[case]
    hooks = SCHEMES[name].hooks_for(build_options(SCHEMES[name].Options, options)) & ATTENTION_HOOKS
    return bool(hooks) and hooks <= HOOKS_OF["flex_attention"]


HONOURED = [case for case in CASES if honoured(case)]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what each call of PyTorch's FlexAttention was given."""
    found: list[dict[str, Any]] = []
    original = flex.flex_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        found.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(flex, "flex_attention", spy)
    return found


def turned_to_flex(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model on our FlexAttention; GPT-2 declares no support for it (huggingface/transformers#34809)."""
    model.config._attn_implementation = "flex_attention"
    assert model.config._attn_implementation == "pe_swap_flex"
    return model


def test_these_are_the_schemes_that_rotate_or_have_a_relative_bias() -> None:
    assert {CASES[case][0] for case in HONOURED} == {"alibi", "hope", "kerple", "rope", "sandwich", "t5"}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(calls())
def test_every_call_equals_the_plain_form(call: Call) -> None:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(call.query.shape[1], call.q_len + call.kv_len - 1, generator=generator, dtype=torch.float64) * 2
    found = flex.flex_bias_attention(
        call.query,
        call.key,
        call.value,
        bias,
        attention_mask=call.attention_mask,
        is_causal=call.is_causal,
        scaling=0.3,
        training=False,
    )
    torch.testing.assert_close(found, expected(call, bias, 0.3), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("case", "family"), [pair for pair in PAIRS if pair[0] in HONOURED])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_whole_rows_equal_sdpas(case: str, family: str, side: str, seen: list[dict[str, Any]]) -> None:
    model, ids = swapped(family, case), token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 7) if side == "left" else slice(13, 20)] = 0
    whole, padded = logits(model, ids), logits(model, ids, attention_mask=mask)
    turned_to_flex(model)
    assert not seen
    torch.testing.assert_close(logits(model, ids, use_cache=False), whole, **ROUNDING)
    found = logits(model, ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(found[mask.bool()], padded[mask.bool()], **ROUNDING)
    assert len(seen) == 4
    assert all(isinstance(call["block_mask"], BlockMask) for call in seen[2:])


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("case", [case for case in HONOURED if case not in LENGTH_DEPENDENT])
@pytest.mark.parametrize("static", [False, True])
def test_chunks_with_a_cache_equal_one_pass(case: str, family: str, static: bool, seen: list[dict[str, Any]]) -> None:
    model, ids = swapped(family, case), token_ids(2, 22)
    whole = logits(model, ids)
    turned_to_flex(model)
    cache = StaticCache(config=model.config, max_cache_len=31) if static else DynamicCache(config=model.config)
    parts = [logits(model, chunk, **with_cache(model, cache)) for chunk in ids.split((9, 1, 8, 1, 3), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **ROUNDING)
    assert len(seen) == 2 * 5


@pytest.mark.parametrize("case", ["alibi", "t5", "rope"])
def test_packed_sequences_do_not_see_each_other(case: str, seen: list[dict[str, Any]]) -> None:
    model, ids = swapped("gpt2", case), token_ids(1, 20)
    position_ids = torch.cat((torch.arange(12), torch.arange(8)))[None]
    apart = torch.cat((logits(model, ids[:, :12]), logits(model, ids[:, 12:])), dim=1)
    assert not torch.allclose(logits(model, ids)[:, 12:], apart[:, 12:], atol=1e-2)
    found = logits(turned_to_flex(model), ids, position_ids=position_ids, use_cache=False)
    torch.testing.assert_close(found, apart, **ROUNDING)
    assert len(seen) == 2


def test_two_schemes_by_layer() -> None:
    model = pe_swap.swap_positional(pe_swap.swap_positional(build("gpt2"), "rope"), "alibi", layers=[1])
    ids = token_ids(2, 20)
    expected_logits = logits(model, ids)
    torch.testing.assert_close(logits(turned_to_flex(model), ids, use_cache=False), expected_logits, **ROUNDING)


def test_bert_takes_it_by_transformers_own_call() -> None:
    model, ids = swapped("bert", "t5"), token_ids(2, 20)
    expected_logits = logits(model, ids)
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(logits(model, ids), expected_logits, **ROUNDING)
    pe_swap.restore_positional(model)
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("scheme", ["none", "sinusoidal"])
def test_zeros_in_place_of_t5_s_bias_are_read_for_every_row_head_and_query(scheme: str) -> None:
    config = T5Config(d_model=48, num_layers=2, num_heads=4, d_kv=12, d_ff=64, vocab_size=VOCABULARY, dropout_rate=0.0)
    model, ids = pe_swap.swap_positional(T5EncoderModel(config).eval(), scheme), token_ids(3, 20)
    expected_states = model(ids).last_hidden_state
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(ids).last_hidden_state, expected_states, **ROUNDING)


def test_dropout_is_refused() -> None:
    model = pe_swap.swap_positional(build("gpt2", attn_pdrop=0.1), "alibi")
    turned_to_flex(model).train()
    with pytest.raises(
        UnsupportedBackendError,
        match=r"^Layer 0 carries the scheme 'alibi' and drops attention probabilities with p = 0\.1, but the attention implementation is "
        r"'flex_attention', which has no dropout\. Set the configuration's attention dropout to 0 before the model is built, or call "
        r"model\.set_attn_implementation\(\"sdpa\"\)\.$",
    ):
        model(token_ids(1, 5))


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("t5", UnsupportedBackendError, "has no backward on a CPU, and the scheme's bias needs a gradient"),
        ("rope", NotImplementedError, "does not support backward on CPU"),
    ],
)
def test_no_gradient_on_a_cpu_goes_missing(case: str, error: type[Exception], message: str) -> None:
    model = turned_to_flex(swapped("gpt2", case))
    disturb(model)
    with torch.enable_grad(), pytest.raises(error, match=message):
        model(token_ids(1, 5)).logits.sum().backward()


@pytest.mark.parametrize(("family", "case"), [("gpt2", "alibi"), ("gpt2", "rope"), ("bert", "t5")])
def test_every_claim_is_checked_on_it(family: str, case: str, seen: list[dict[str, Any]]) -> None:
    model = turned_to_flex(swapped(family, case))
    report = pe_swap.check_positional(model)
    assert report.passed, str(report)
    assert seen
    assert model.config._attn_implementation == "pe_swap_flex"
