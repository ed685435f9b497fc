"""GPT-J's attention is GPT-2's with interleaved rope. Its blocks add attention and MLP in parallel, GPT-2's do not: layers are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, GPTJModel

from tests.support.weights import LAYERS, LENGTH, copy_linear, gpt2, randomize

HEADS, HEAD_DIM = 12, 8


def pair(rotary_dim: int) -> tuple[Any, Any]:
    """Return our model and GPT-J with the same attention weights."""
    width = HEADS * HEAD_DIM
    config = GPTJConfig(n_embd=width, n_head=HEADS, n_layer=LAYERS, rotary_dim=rotary_dim, n_positions=LENGTH, vocab_size=61)
    theirs = randomize(GPTJModel(config))
    ours = gpt2(HEADS, width, "rope", {"layout": "interleaved", "fraction": rotary_dim / HEAD_DIM})
    for block, peer in zip(ours.transformer.h, theirs.h, strict=True):
        projections = [peer.attn.q_proj.weight, peer.attn.k_proj.weight, peer.attn.v_proj.weight]
        copy_linear(block.attn.c_attn, torch.cat(projections), None)
        copy_linear(block.attn.c_proj, peer.attn.out_proj.weight, None)
    return ours, theirs


@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("shift", [0, 1000])
@torch.no_grad()
def test_every_layers_attention_is_gptjs(rotary_dim: int, shift: int) -> None:
    ours, theirs = pair(rotary_dim)
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        calls.append((args[0] if args else kwargs["hidden_states"], output[0]))

    for block in theirs.h:  # in a call of the whole model: who works out sines, and what is handed on, changes with versions
        block.attn.register_forward_hook(keep, with_kwargs=True)
    ids = torch.arange(32)[None].expand(2, -1)
    theirs(inputs_embeds=torch.randn(2, 32, HEADS * HEAD_DIM), use_cache=False)
    for block, (hidden, expected) in zip(ours.transformer.h, calls, strict=True):
        found = block.attn(hidden, position_ids=ids + shift)[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert (block.attn(hidden, position_ids=ids * 2)[0] - expected).abs().max() > 1e-2
