"""Attention with any bias, in O(length x block) memory, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pe_swap.attention.fused import bare_mask, fused_attention, kernel_mask
from pe_swap.attention.masks import block_of, causal_mask
from pe_swap.attention.plain import plain_attention
from pe_swap.schemes.base import FoldedBias
from pe_swap.schemes.positions import Positions

QUERY_BLOCK = 256
"""Queries per block. A block's scores take `batch x heads x 256 x kv_len` numbers."""

ScoreBias = Callable[[Tensor, Tensor, Positions], Tensor]
RelativeBias = Callable[[Positions], Tensor]
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
    relative_bias: RelativeBias | None = None,
    fold_bias: FoldBias | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    first_visible: Callable[[int], int] | None = None,
) -> Tensor:
    """Return `softmax(cap(scaling * query . key + score_bias) + relative_bias + mask) . value + value_bias`, query block by query block.

    Of a block, only its output is kept for the backward pass; the rest is computed again there.

    Args:
        query: `[batch, heads, q_len, width]`.
        key: `[batch, heads, kv_len, width]`.
        value: `[batch, heads, kv_len, value_width]`.
        positions: where queries and keys stand.
        score_bias: from a block's queries, its keys and their positions to logits, `[batch or 1, heads, q_block, kv_block]`.
        value_bias: from a block's probabilities and positions to what is added to its output, `[batch, heads, q_block, value_width]`.
        attention_mask: boolean (True: may look) or additive, `[batch or 1, heads or 1, q_len, kv_len]`, or None.
        is_causal: with no mask, key index at most query index; a block then has the keys up to its end only.
        scaling: factor on `query . key`.
        dropout: probability, on the attention probabilities.
        relative_bias: from a block's positions to logits that stand outside the cap, `[1, heads, q_block, kv_block]`.
        fold_bias: from a block's queries, its keys and their positions to others whose products have the bias in them, and what part of
            it they have not; or to None where there are none. Only without `value_bias`, a cap or sinks.
        softcap: see `plain_attention`.
        sinks: see `plain_attention`.
        first_visible: from the index of a query to that of the first key at which its bias may be finite; None where that is all keys.

    Returns:
        `[batch, heads, q_len, value_width]`, in the dtype of `query`.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    skips_future = is_causal and attention_mask is None
    needs_probabilities = value_bias is not None or softcap is not None or sinks is not None

    def attend(start: int, stop: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kv_start, kv_stop = 0 if first_visible is None else first_visible(start), stop if skips_future else kv_len
        block, keys = query[:, :, start:stop], slice(kv_start, kv_stop)
        block_key, block_value = key[:, :, keys], value[:, :, keys]
        block_positions = positions.block(start, stop, kv_stop, kv_start)
        if skips_future:
            mask: Tensor | None = causal_mask(stop - start, kv_stop - kv_start, query.device, start - kv_start)
        else:
            mask = block_of(attention_mask, slice(start, stop), keys)
        folded = None if fold_bias is None else fold_bias(block, block_key, block_positions)
        if folded is not None:
            block, block_key, rest = folded
            additive = bare_mask(mask) if rest is None else kernel_mask(rest, mask)
            return fused_attention(block, block_key, block_value, additive, scaling=scaling, dropout=dropout)
        inside = None if score_bias is None else score_bias(block, block_key, block_positions)
        outside = None if relative_bias is None else relative_bias(block_positions)
        if softcap is None and inside is not None and outside is not None:
            inside, outside = inside + outside, None
        bias = outside if inside is None else inside
        if not needs_probabilities and bias is not None:
            return fused_attention(block, block_key, block_value, kernel_mask(bias, mask), scaling=scaling, dropout=dropout)
        output, probabilities = plain_attention(
            block,
            block_key,
            block_value,
            inside,
            attention_mask=mask,
            is_causal=False,
            scaling=scaling,
            dropout=dropout,
            relative_bias=outside,
            softcap=softcap,
            sinks=sinks,
        )
        return output if value_bias is None else output + value_bias(probabilities, block_positions).to(output.dtype)

    blocks = [(start, min(start + QUERY_BLOCK, q_len)) for start in range(0, q_len, QUERY_BLOCK)]
    if len(blocks) == 1:
        return attend(0, q_len, query, key, value)
    if not torch.is_grad_enabled():
        return torch.cat([attend(start, stop, query, key, value) for start, stop in blocks], dim=2)
    return torch.cat([checkpoint(attend, start, stop, query, key, value, use_reentrant=False) for start, stop in blocks], dim=2)
