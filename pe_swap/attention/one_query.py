"""Attention of a single query over a cache, where a scheme adds one bias of the distance in all layers: decoding a token.

The numbers are those of `pe_swap.attention.relative`. What is different is the way there: between two products, PyTorch waits for
Python, and the weights of a layer push Python's own code out of the processor's caches. So the bias is ready before the first layer
attends, and a layer goes from the arguments of its call to the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pe_swap.attention.call import AttentionCall, CallShared
from pe_swap.attention.fused import distance_mask, fused_attention
from pe_swap.attention.inputs import HARMLESS_KEYWORDS

HOOKS = frozenset({"relative_bias"})
"""What a scheme may do here, and nothing else."""


def bias_of_one_query(call: CallShared, hooks: frozenset[str], kv_len: int, layer: int) -> Tensor | None:
    """Return the bias of a call's query over all keys of its cache, `[1, heads, 1, kv_len]`, float32.

    None where that is not all there is to add, or where layers share nothing: with gradients, under a compiler, with a static cache.

    Args:
        call: what the layers share; its cache has `kv_len - 1` keys so far.
        hooks: the attention hooks of the scheme.
        kv_len: number of keys, that of the query included.
        layer: any layer that the scheme serves.
    """
    alone = hooks == HOOKS and call.scheme.bias_is_shared and call.scheme.windowed_reach(layer) is None
    if not alone or call.kept is None or call.first_query != kv_len - 1 or torch.is_grad_enabled():
        return None
    return call.bias_by_distance(1, kv_len, call.query_slots.device, layer=layer)[None, :, None]


def one_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    attention_call: AttentionCall,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> Tensor | None:
    """Return `softmax(scaling * query . key + bias) . value`, `[batch, 1, heads, value_width]`, or None where the call asks for more.

    More is a mask, a soft cap, sinks, a keyword that may be any of these, or other keys than the hook of the layer knew of.

    Args:
        query: `[batch, heads, 1, head_dim]`.
        key: `[batch, key_heads, kv_len, head_dim]`.
        value: `[batch, key_heads, kv_len, value_width]`.
        attention_mask: as the attention function was given it.
        attention_call: what the layer's hook handed on.
        scaling: factor on `query . key`; None for `head_dim ** -0.5`.
        dropout: probability, on the attention probabilities.
        keywords: everything else that the attention function was called with.
    """
    bias = attention_call.call.bias_of_one_query
    if bias is None or attention_mask is not None or attention_call.query_is_scaled or not keywords.keys() <= HARMLESS_KEYWORDS:
        return None
    if key.shape[2] != bias.shape[3] or query.shape[2] != 1 or key.device != bias.device:
        return None
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    return (
        fused_attention(query, key, value, distance_mask(bias, query), scaling=scaling, dropout=dropout)
        .transpose(1, 2)
        .contiguous()
    )
