"""GPT-NeoX without its parallel residual is a GPT-2 with rope on the first dimensions of each head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tests.support.weights import (
    LAYERS,
    TRAINED_LENGTH,
    VOCABULARY,
    copy_linear,
    copy_norm,
    from_heads,
    gpt2,
    left_padded,
    randomize,
    token_ids,
)

HEADS, WIDTH = 12, 96

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"factor": 3.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 5.0]},
}
"""Every rope type that GPT-NeoX takes, as Llama does, from `rope_parameters`."""


def pair(base: float, fraction: float, our_base: float | None = None, **scaling: Any) -> tuple[Any, Any]:
    """Return our model and GPT-NeoX with the same weights."""
    rope = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": fraction, **scaling}
    if scaling and scaling["rope_type"] != "linear":
        rope["original_max_position_embeddings"] = TRAINED_LENGTH
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": 4 * WIDTH}
    config = GPTNeoXConfig(
        **sizes, vocab_size=VOCABULARY, max_position_embeddings=TRAINED_LENGTH, use_parallel_residual=False, rope_parameters=rope
    )
    theirs = randomize(GPTNeoXForCausalLM(config))
    options = {"base": our_base or base, "fraction": fraction, **scaling}
    ours = gpt2(HEADS, WIDTH, "rope", options, activation_function="gelu", tie_word_embeddings=False)
    copy_norm(ours.transformer.ln_f, theirs.gpt_neox.final_layer_norm)
    with torch.no_grad():
        ours.transformer.wte.weight.copy_(theirs.gpt_neox.embed_in.weight)
        ours.lm_head.weight.copy_(theirs.get_output_embeddings().weight)
    for block, peer in zip(ours.transformer.h, theirs.gpt_neox.layers, strict=True):
        copy_norm(block.ln_1, peer.input_layernorm)
        copy_norm(block.ln_2, peer.post_attention_layernorm)
        fused = peer.attention.query_key_value
        copy_linear(block.attn.c_attn, from_heads(fused.weight, HEADS), from_heads(fused.bias, HEADS))
        copy_linear(block.attn.c_proj, peer.attention.dense.weight, peer.attention.dense.bias)
        copy_linear(block.mlp.c_fc, peer.mlp.dense_h_to_4h.weight, peer.mlp.dense_h_to_4h.bias)
        copy_linear(block.mlp.c_proj, peer.mlp.dense_4h_to_h.weight, peer.mlp.dense_4h_to_h.bias)
    return ours, theirs


@pytest.mark.parametrize(("base", "fraction"), [(10000.0, 1.0), (10000.0, 0.25), (500.0, 0.5)])
@pytest.mark.parametrize("padding", [0, 11])
@torch.no_grad()
def test_logits_are_gpt_neoxs(base: float, fraction: float, padding: int) -> None:
    ours, theirs = pair(base, fraction)
    ids, mask = left_padded(token_ids(), padding)
    expected = theirs(ids, attention_mask=mask).logits
    assert expected.std() > 0.2
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [TRAINED_LENGTH - 3, 3 * TRAINED_LENGTH])
@pytest.mark.parametrize("rope_type", SCALED)
@torch.no_grad()
def test_logits_are_gpt_neoxs_under_every_rope_type(rope_type: str, length: int) -> None:
    ours, theirs = pair(100.0, 1.0, rope_type=rope_type, **SCALED[rope_type])
    plain, _ = pair(100.0, 1.0)
    ids = token_ids()[:, :length]
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, atol=1e-4, rtol=0)
    acts = length > TRAINED_LENGTH or rope_type != "dynamic"
    assert ((plain(ids).logits - expected).abs().max() > 1e-2) == acts


@torch.no_grad()
def test_generated_tokens_are_gpt_neoxs() -> None:
    ours, theirs = pair(10000.0, 1.0)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids, mask = left_padded(token_ids()[:, :20], 7)
    found, expected = (model.generate(ids, attention_mask=mask, **settings) for model in (ours, theirs))
    assert torch.equal(found, expected)
    assert len(set(expected[0, 20:].tolist())) > 2


@torch.no_grad()
def test_another_base_is_another_model() -> None:
    ours, theirs = pair(10000.0, 1.0, our_base=500.0)
    assert (ours(token_ids()).logits - theirs(token_ids()).logits).abs().max() > 1e-2
