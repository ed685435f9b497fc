"""Attention step by step: what every faster form in this folder computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_swap.attention.masks import add_mask, causal_mask


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
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `softmax(cap(scaling * query . key + score_bias) + relative_bias + mask) . value` and the probabilities.

    Args:
        query: `[batch, heads, q_len, width]`.
        key: `[batch, heads, kv_len, width]`.
        value: `[batch, heads, kv_len, value_width]`.
        score_bias: broadcastable to `[batch, heads, q_len, kv_len]`, logits, or None.
        attention_mask: boolean (True: may look) or additive, broadcastable to the scores, or None.
        is_causal: with no mask, key index at most query index.
        scaling: factor on `query . key`.
        dropout: probability, on the probabilities.
        upcast: score in float32 whatever the dtype.
        relative_bias: as `score_bias`, outside the cap.
        softcap: `c` of `cap(x) = c * tanh(x / c)` (Gemma 2), in logits; None for no cap.
        sinks: `[heads]`, the logit of a key without a value (gpt-oss), which takes its share of the softmax; None for none.

    Returns:
        The output, `[batch, heads, q_len, value_width]`, and the probabilities after dropout, in the dtype of `value`. Sums with a
        float32 bias, and their softmax, are float32.
    """
    if upcast:
        scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scaling
    else:
        scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if score_bias is not None:
        scores = scores + score_bias
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if relative_bias is not None:
        scores = scores + relative_bias
    if is_causal and attention_mask is None:
        attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
    scores = add_mask(scores, attention_mask)
    probabilities = softmax_with_sinks(scores, sinks).to(value.dtype)
    probabilities = F.dropout(probabilities, p=dropout, training=dropout > 0)
    return torch.matmul(probabilities, value), probabilities


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return `exp(s_ij) / (sum_j exp(s_ij) + exp(sink))`, `[batch, heads, q_len, kv_len]`, in the dtype of `scores`."""
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]
