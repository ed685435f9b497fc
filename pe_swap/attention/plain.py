"""Attention step by step: what every faster form in this folder computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_bias: Tensor | None,
    *,
    attention_mask: Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return `softmax(scaling * query . key + score_bias + mask) . value` and the probabilities.

    Args:
        query: `[batch, heads, q_len, head_dim]`.
        key: `[batch, heads, kv_len, head_dim]`.
        value: `[batch, heads, kv_len, head_dim]`.
        score_bias: broadcastable to `[batch, heads, q_len, kv_len]`, logits, or None.
        attention_mask: boolean (True: may look) or additive, broadcastable to the scores, or None.
        is_causal: with no mask, key index at most query index.
        scaling: factor on `query . key`.
        dropout: probability, on the probabilities.
        upcast: score in float32 whatever the dtype.

    Returns:
        The output, `[batch, heads, q_len, head_dim]`, and the probabilities after dropout, in the dtype of `value`. Sums with a
        float32 bias, and their softmax, are float32.
    """
    if upcast:
        scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scaling
    else:
        scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if score_bias is not None:
        scores = scores + score_bias
    if is_causal and attention_mask is None:
        attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
    scores = add_mask(scores, attention_mask)
    probabilities = F.dropout(scores.softmax(dim=-1).to(value.dtype), p=dropout, training=dropout > 0)
    return torch.matmul(probabilities, value), probabilities


def causal_mask(q_len: int, kv_len: int, device: torch.device, first_query: int = 0) -> Tensor:
    """Return True where key index is at most query index, `[q_len, kv_len]`; queries count from `first_query`."""
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(first_query)


def add_mask(scores: Tensor, attention_mask: Tensor | None, forbidden: float | None = None) -> Tensor:
    """Return the scores with a mask applied.

    Forbidden is what a boolean mask forbids, and where an additive mask has the lowest number of its dtype: float16's, -65,504, could
    be outweighed by what a scheme adds to a key that may not be looked at.

    Args:
        scores: broadcastable with the mask, logits.
        attention_mask: boolean (True: may look) or additive, or None.
        forbidden: what a forbidden score becomes. None is the lowest finite number: a row of padding that may look nowhere then has a
            mean of all values instead of not-a-number, as in transformers' eager attention.
    """
    if attention_mask is None:
        return scores
    forbidden = torch.finfo(scores.dtype).min if forbidden is None else forbidden
    if attention_mask.dtype == torch.bool:
        return scores.masked_fill(~attention_mask, forbidden)
    return (scores + attention_mask).masked_fill(attention_mask <= torch.finfo(attention_mask.dtype).min, forbidden)
