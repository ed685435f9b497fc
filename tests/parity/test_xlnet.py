"""XLNet attends with Transformer-XL's formula, both ways; transformers has no other model with it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import XLNetConfig
from transformers.models.xlnet.modeling_xlnet import XLNetModel, XLNetRelativeAttention

from tests.support.schemes import build, geometry, positions

HEADS, HEAD_DIM, WIDTH = 3, 8, 24

SIZES = geometry(hidden_size=WIDTH, num_heads=HEADS, head_dim=HEAD_DIM, is_causal=False)


@pytest.mark.parametrize("length", [1, 2, 30])
@pytest.mark.parametrize("biases", ["shared", "per_layer"])
@torch.no_grad()
def test_the_output_of_attention_is_xlnets_with_the_same_weights(length: int, biases: str) -> None:
    config = XLNetConfig(d_model=WIDTH, n_head=HEADS, n_layer=1, d_inner=32, vocab_size=61, dropout=0.0)
    theirs = XLNetRelativeAttention(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    hidden = torch.randn(length, 2, WIDTH)
    query, key, value = (torch.einsum("ibh,hnd->ibnd", hidden, weight) for weight in (theirs.q, theirs.k, theirs.v))
    distances = XLNetModel(config).relative_positional_encoding(length, length, bsz=2)
    expected = theirs.rel_attn_core(query, key, value, torch.einsum("ibh,hnd->ibnd", distances, theirs.r))

    scheme = build("transformer_xl", sizes=dataclasses.replace(SIZES, num_layers=2), biases=biases)
    name = "shared" if biases == "shared" else "1"
    scheme.distance_weights["1"].copy_(theirs.r.permute(1, 2, 0).reshape(WIDTH, WIDTH))
    scheme.content_biases[name].copy_(theirs.r_w_bias)
    scheme.distance_biases[name].copy_(theirs.r_r_bias)
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    scaling = HEAD_DIM**-0.5
    bias = scheme.score_bias(query, key, positions(0, length, length), scaling=scaling, layer=1)
    scores = query @ key.transpose(-1, -2) * scaling
    found = (scores + bias).softmax(-1) @ value
    torch.testing.assert_close(found.permute(2, 0, 1, 3), expected, atol=1e-4, rtol=0)
    if length > 1:
        assert (scores.softmax(-1) @ value - found).abs().max() > 1e-2
