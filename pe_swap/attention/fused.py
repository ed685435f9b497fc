"""PyTorch's fused attention with an additive mask.

A forbidden score is minus infinity here, as where transformers' own sdpa hands the kernel a boolean mask: a row of padding that may look
nowhere gets zeros. The lowest finite number would do for the forward pass, but not for the backward: the logsumexp of such a row rounds
to that number, so that every probability recomputed from it is 1. A loss on the row, as labels beside left padding have one, would then
send back a gradient hundreds of times too large.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_swap.attention.masks import add_mask

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
    """Return `softmax(scaling * query . key + mask) . value`, `[batch, heads, q_len, value_width]`, in the dtype of `query`.

    The mask stays float32 where the kernel takes it beside a narrower query: what a scheme adds to a score may nearly cancel it.

    Args:
        query: `[batch, heads, q_len, width]`.
        key: `[batch, key_heads, kv_len, width]`.
        value: `[batch, key_heads, kv_len, value_width]`.
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
    value_width = value.shape[-1]
    query, key, value = of_one_width(query, key, value)
    key, value, grouped = for_kernel(query, key, value, has_mask=mask is not None)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )
    return output if output.shape[-1] == value_width else output[..., :value_width]


def of_one_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values with zeros after the narrower ones: fused kernels take one width only.

    Zeros change no product; those of the values give zeros in the output, after its own numbers.
    """
    width = max(key.shape[-1], value.shape[-1])
    if query.shape[-1] == width == key.shape[-1] == value.shape[-1]:
        return query, key, value
    query, key, value = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    return query, key, value


def for_kernel(query: Tensor, key: Tensor, value: Tensor, *, has_mask: bool) -> tuple[Tensor, Tensor, bool]:
    """Return keys and values as the fused kernel takes them without leaving its fast path, and whether they are still grouped.

    The kernel for CPUs reads the keys of a group without a copy, but has no backward for them; CUDA's do so without a mask only.
    """
    if query.shape[1] == key.shape[1]:
        return key, value, False
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    takes_groups = not needs_grad if query.device.type == "cpu" else not has_mask
    if takes_groups:
        return key, value, True
    return per_head(key, query.shape[1]), per_head(value, query.shape[1]), False


def per_head(x: Tensor, num_heads: int) -> Tensor:
    """Return keys or values, `[batch, key_heads, length, width]`, repeated for each query head of a group, of which they may have one."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)
