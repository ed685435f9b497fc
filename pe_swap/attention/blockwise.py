"""Attention with any bias, in O(length x block) memory, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pe_swap.attention.fused import bare_mask, fused_attention, kernel_mask
from pe_swap.attention.plain import causal_mask, plain_attention
from pe_swap.schemes.base import FoldedBias
from pe_swap.schemes.positions import Positions

QUERY_BLOCK = 256
"""Queries a block. A block's scores take `batch x heads x 256 x kv_len` numbers."""

ScoreBias = Callable[[Tensor, Tensor, Positions], Tensor]
FoldBias = Callable[[Tensor, Tensor, Positions], FoldedBias | None]
ValueBias = Callable[[Tensor, Positions], Tensor]


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Positions,
    score_bias: ScoreBias | None,
    value_bias: ValueBias | None,
    *,
    attention_mask: Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    paired: FoldBias | None = None,
) -> Tensor:
    """Return `softmax(scaling * query . key + score_bias + mask) . value + value_bias`, query block by query block.

    Nothing of a block but its output is kept for the backward pass; it is computed again there.

    Args:
        query: `[batch, heads, q_len, head_dim]`.
        key: `[batch, heads, kv_len, head_dim]`.
        value: `[batch, heads, kv_len, head_dim]`.
        positions: where queries and keys stand.
        score_bias: from a block's queries, its keys and their positions to logits, `[batch or 1, heads, q_block, kv_block]`.
        value_bias: from a block's probabilities and positions to what is added to its output, `[batch, heads, q_block, head_dim]`.
        attention_mask: boolean (True: may look) or additive, `[batch or 1, heads or 1, q_len, kv_len]`, or None.
        is_causal: with no mask, key index at most query index; a block then meets the keys up to its end only.
        scaling: factor on `query . key`.
        dropout: probability, on the attention probabilities.
        paired: from a block's queries, its keys and their positions to others whose products have the bias in them, and what part of it
            they have not; or to None where there are none. Only without `value_bias`.

    Returns:
        `[batch, heads, q_len, head_dim]`, in the dtype of `query`.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    skips_future = is_causal and attention_mask is None

    def attend(start: int, stop: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kv_stop = stop if skips_future else kv_len
        block, block_key, block_value = query[:, :, start:stop], key[:, :, :kv_stop], value[:, :, :kv_stop]
        block_positions = positions.block(start, stop, kv_stop)
        mask = causal_mask(stop - start, kv_stop, query.device, start) if skips_future else _rows(attention_mask, start, stop)
        with_bias = None if paired is None else paired(block, block_key, block_positions)
        if with_bias is not None:
            block, block_key, rest = with_bias
            additive = bare_mask(mask) if rest is None else kernel_mask(rest, mask)
            return fused_attention(block, block_key, block_value, additive, scaling=scaling, dropout=dropout)
        bias = None if score_bias is None else score_bias(block, block_key, block_positions)
        if value_bias is None and bias is not None:
            return fused_attention(block, block_key, block_value, kernel_mask(bias, mask), scaling=scaling, dropout=dropout)
        output, probabilities = plain_attention(
            block, block_key, block_value, bias, attention_mask=mask, is_causal=False, scaling=scaling, dropout=dropout
        )
        return output if value_bias is None else output + value_bias(probabilities, block_positions).to(output.dtype)

    blocks = [(start, min(start + QUERY_BLOCK, q_len)) for start in range(0, q_len, QUERY_BLOCK)]
    if len(blocks) == 1:
        return attend(0, q_len, query, key, value)
    if not torch.is_grad_enabled():
        return torch.cat([attend(start, stop, query, key, value) for start, stop in blocks], dim=2)
    return torch.cat([checkpoint(attend, start, stop, query, key, value, use_reentrant=False) for start, stop in blocks], dim=2)


def _rows(attention_mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Return a mask's rows of a block; a mask of one row serves all."""
    if attention_mask is None or attention_mask.shape[2] == 1:
        return attention_mask
    return attention_mask[:, :, start:stop]
