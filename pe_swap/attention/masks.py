"""Masks: what a query may look at, boolean (True: may look) or additive."""

from __future__ import annotations

import torch
from torch import Tensor


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


def block_of(attention_mask: Tensor | None, rows: slice, columns: slice = slice(None)) -> Tensor | None:
    """Return a mask's part for a block of queries and keys; a dimension of one serves all."""
    if attention_mask is None:
        return None
    mask = attention_mask if attention_mask.shape[2] == 1 else attention_mask[:, :, rows]
    return mask if mask.shape[3] == 1 else mask[..., columns]


def keys_allowed(query_index: Tensor, kv_len: int, attention_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return how many keys each query may look at, `[batch or 1, q_len]`, int64.

    Counted on the mask, so that padding, caches, packed sequences and both kinds of model need no rule of their own.

    Args:
        query_index: `[q_len]`, int64, the index of each query in the key buffer.
        kv_len: number of keys.
        attention_mask: boolean (True: may look) or additive, `[batch or 1, heads or 1, q_len, kv_len]`, or None.
        is_causal: with no mask, key index at most query index.
    """
    if attention_mask is None:
        return query_index[None] + 1 if is_causal else torch.full_like(query_index, kv_len)[None]
    allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return allowed[:, 0].sum(-1)
