"""PyTorch's fused attention with an additive mask.

What may not be looked at is minus infinity here, as it is where transformers' own sdpa hands the kernel a boolean mask: a row of padding
that may look nowhere gets zeros. The lowest finite number would do for the forward pass, and ruin the backward: such a row's logsumexp
rounds to that number, every probability recomputed from it is 1, and a loss on the row, as labels beside left padding have one,
sends back a gradient hundreds of times too large.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_swap.attention.plain import add_mask

FORBIDDEN = -math.inf


def kernel_mask(bias: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return a bias and a mask in one additive tensor; the bias itself where there is no mask."""
    return add_mask(bias, attention_mask, FORBIDDEN)


def bare_mask(attention_mask: Tensor | None) -> Tensor | None:
    """Return a mask as the kernel takes it where there is no bias: boolean as it is, additive with `FORBIDDEN` in it."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask.masked_fill(attention_mask <= torch.finfo(attention_mask.dtype).min, FORBIDDEN)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, dropout: float) -> Tensor:
    """Return `softmax(scaling * query . key + mask) . value`, `[batch, heads, q_len, head_dim]`, in the dtype of `query`.

    The mask stays float32 where the kernel takes it beside a narrower query: what a scheme adds to a score may nearly cancel it.

    Args:
        query: `[batch, heads, q_len, head_dim]`.
        key: `[batch, heads, kv_len, head_dim]`.
        value: `[batch, heads, kv_len, head_dim]`.
        mask: logits, or boolean (True: may look), broadcastable to `[batch, heads, q_len, kv_len]`; None where all may be looked at.
        scaling: factor on `query . key`.
        dropout: probability, on the attention probabilities.
    """
    if mask is None or mask.dtype == torch.bool:
        pass
    elif query.device.type != "cpu":
        mask = mask.to(query.dtype).contiguous()  # CUDA kernels read masks of their own dtype and an aligned layout only
    elif query.dtype == torch.float64:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
