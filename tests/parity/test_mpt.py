"""MPT is a GPT-2 with alibi and without biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MptConfig, MptForCausalLM

from tests.support.weights import LAYERS, LENGTH, VOCABULARY, copy_linear, copy_norm, gpt2, randomize, token_ids


def pair(heads: int, slopes: str = "press") -> tuple[Any, Any]:
    """Return our model and MPT with the same weights."""
    width = heads * 8
    config = MptConfig(d_model=width, n_heads=heads, n_layers=LAYERS, vocab_size=VOCABULARY, max_seq_len=LENGTH)
    theirs = randomize(MptForCausalLM(config))
    ours = gpt2(heads, width, "alibi", {"slopes": slopes}, activation_function="gelu")
    copy_norm(ours.transformer.ln_f, theirs.transformer.norm_f)
    with torch.no_grad():
        ours.transformer.wte.weight.copy_(theirs.transformer.wte.weight)
    for block, peer in zip(ours.transformer.h, theirs.transformer.blocks, strict=True):
        copy_norm(block.ln_1, peer.norm_1)
        copy_norm(block.ln_2, peer.norm_2)
        copy_linear(block.attn.c_attn, peer.attn.Wqkv.weight, None)
        copy_linear(block.attn.c_proj, peer.attn.out_proj.weight, None)
        copy_linear(block.mlp.c_fc, peer.ffn.up_proj.weight, None)
        copy_linear(block.mlp.c_proj, peer.ffn.down_proj.weight, None)
    return ours, theirs


@pytest.mark.parametrize("heads", [8, 12, 20])
@torch.no_grad()
def test_logits_are_mpts(heads: int) -> None:
    ours, theirs = pair(heads)
    expected = theirs(token_ids()).logits
    assert expected.std() > 0.2
    torch.testing.assert_close(ours(token_ids()).logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_other_slopes_are_another_model() -> None:
    ours, theirs = pair(12, slopes="geometric")
    assert (ours(token_ids()).logits - theirs(token_ids()).logits).abs().max() > 1e-2
