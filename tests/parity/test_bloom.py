"""BLOOM is a GPT-2 with alibi, but for a norm after its token embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from tests.support.weights import LAYERS, VOCABULARY, copy_linear, copy_norm, from_heads, gpt2, left_padded, randomize, token_ids


def pair(heads: int, slopes: str = "press") -> tuple[Any, Any]:
    """Return our model and BLOOM with the same weights."""
    width = heads * 8
    config = BloomConfig(hidden_size=width, n_head=heads, n_layer=LAYERS, vocab_size=VOCABULARY)
    theirs = randomize(BloomForCausalLM(config))
    ours = gpt2(heads, width, "alibi", {"slopes": slopes})
    copy_norm(ours.transformer.ln_f, theirs.transformer.ln_f)
    with torch.no_grad():
        ours.transformer.wte.weight.copy_(theirs.transformer.word_embeddings.weight)
    for block, peer in zip(ours.transformer.h, theirs.transformer.h, strict=True):
        copy_norm(block.ln_1, peer.input_layernorm)
        copy_norm(block.ln_2, peer.post_attention_layernorm)
        fused = peer.self_attention.query_key_value
        copy_linear(block.attn.c_attn, from_heads(fused.weight, heads), from_heads(fused.bias, heads))
        copy_linear(block.attn.c_proj, peer.self_attention.dense.weight, peer.self_attention.dense.bias)
        copy_linear(block.mlp.c_fc, peer.mlp.dense_h_to_4h.weight, peer.mlp.dense_h_to_4h.bias)
        copy_linear(block.mlp.c_proj, peer.mlp.dense_4h_to_h.weight, peer.mlp.dense_4h_to_h.bias)
    return ours, theirs


@torch.no_grad()
def logits(ours: Any, theirs: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = theirs.transformer.word_embeddings_layernorm(theirs.transformer.word_embeddings(ids))
    return ours(inputs_embeds=embeds, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits


@pytest.mark.parametrize("heads", [8, 12, 20, 25])
@pytest.mark.parametrize("padding", [0, 11])
def test_logits_are_blooms(heads: int, padding: int) -> None:
    ids, mask = left_padded(token_ids(), padding)
    ours, theirs = logits(*pair(heads), ids, mask)
    assert theirs.std() > 0.2
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-4, rtol=0)


def test_other_slopes_are_another_model() -> None:
    ids = token_ids()
    ours, theirs = logits(*pair(12, slopes="geometric"), ids, torch.ones_like(ids))
    assert (ours - theirs).abs().max() > 1e-2
