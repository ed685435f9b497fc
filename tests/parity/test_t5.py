"""T5's attention with its buckets, in encoder and decoder. T5 does not divide scores by sqrt(head_dim): the query takes that factor up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, T5Config
from transformers.models.t5.modeling_t5 import T5Attention

import pe_swap
from pe_swap.patching.install import holder_of
from tests.support.weights import LAYERS, TRAINED_LENGTH, copy_linear, gpt2, randomize

HEADS, HEAD_DIM, LENGTH = 12, 8, 200
WIDTH = HEADS * HEAD_DIM
OPTIONS = {"num_buckets": 32, "max_distance": 64}


def t5_attention(is_decoder: bool) -> Any:
    """Return one of T5's self-attention layers that holds the bias."""
    sizes = {"d_model": WIDTH, "d_kv": HEAD_DIM, "num_heads": HEADS, "is_decoder": is_decoder}
    buckets = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 64}
    return randomize(T5Attention(T5Config(**sizes, **buckets), has_relative_attention_bias=True, layer_idx=0))


def set_table(model: Any, attention: Any) -> None:
    with torch.no_grad():
        holder_of(model).scheme_at(0).table.copy_(attention.relative_attention_bias.weight * 8)
        attention.relative_attention_bias.weight.mul_(8)


def check(found: Tensor, expected: Tensor, unbiased: Tensor) -> None:
    assert expected.std() > 0.1
    assert (unbiased - expected).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", range(LAYERS))
@torch.no_grad()
def test_decoder_attention_is_t5s(layer: int) -> None:
    theirs, ours = t5_attention(is_decoder=True), gpt2(HEADS, WIDTH, "t5", OPTIONS)
    set_table(ours, theirs)
    attention = ours.transformer.h[layer].attn
    copy_linear(attention.c_attn, torch.cat((theirs.q.weight * HEAD_DIM**0.5, theirs.k.weight, theirs.v.weight)), None)
    copy_linear(attention.c_proj, theirs.o.weight, None)
    hidden = torch.randn(2, LENGTH, WIDTH)
    causal = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected = theirs(hidden, mask=causal)[0]
    found = attention(hidden)[0]
    holder_of(ours).scheme_at(0).table.zero_()
    check(found, expected, attention(hidden)[0])


@pytest.mark.parametrize("layer", range(LAYERS))
@torch.no_grad()
def test_encoder_attention_is_t5s(layer: int) -> None:
    theirs = t5_attention(is_decoder=False)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": 64}
    ours = BertModel(BertConfig(**sizes, max_position_embeddings=TRAINED_LENGTH)).eval()
    pe_swap.swap_positional(ours, "t5", **OPTIONS)
    set_table(ours, theirs)
    attention = ours.encoder.layer[layer].attention.self
    for target, source, factor in (
        (attention.query, theirs.q, HEAD_DIM**0.5),
        (attention.key, theirs.k, 1.0),
        (attention.value, theirs.v, 1.0),
    ):
        target.weight.copy_(source.weight * factor)
        target.bias.zero_()
    hidden = torch.randn(2, LENGTH, WIDTH)
    expected = theirs(hidden)[0]
    found = theirs.o(attention(hidden)[0])
    holder_of(ours).scheme_at(0).table.zero_()
    check(found, expected, theirs.o(attention(hidden)[0]))
