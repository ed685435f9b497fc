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

NARROW = (torch.bfloat16, torch.float16)

ALIGNED_BYTES = 16
"""What the kernels for GPUs read at once."""


def kernel_mask(bias: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return a bias and a mask in one additive tensor; the bias itself where there is no mask."""
    return add_mask(bias, attention_mask, FORBIDDEN)


def bare_mask(attention_mask: Tensor | None) -> Tensor | None:
    """Return a mask as the kernel takes it where there is no bias: boolean as it is, additive with `FORBIDDEN` in it."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask.masked_fill(attention_mask <= torch.finfo(attention_mask.dtype).min, FORBIDDEN)


def distance_mask(mask: Tensor, query: Tensor) -> Tensor:
    """Return bias and mask, of a bias that depends on the distance alone, in the dtype in which a kernel takes them beside these queries.

    On a GPU that is the queries' own, as in transformers' ALiBi models. A bias `b` in bfloat16 is off by `|b| / 256` at most, and a key
    loses or gains that part of its probability. Where queries and keys do not make up for the bias, the probability falls with `exp(b)`,
    and `|b| exp(b) / 256` is below 0.0015 for any `b < 0`. Where they do, and where a trained bias is positive, it is as coarse as the
    numbers of a bfloat16 model are.
    """
    return mask if query.device.type == "cpu" else mask.to(query.dtype)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, dropout: float) -> Tensor:
    """Return `softmax(scaling * query . key + mask) . value`, `[batch, heads, q_len, value_width]`, in the dtype of `query`.

    The mask stays float32 beside narrower queries, as what a scheme adds to a score may nearly cancel it. The kernel for CPUs takes it so;
    those for GPUs take a mask of the queries' own dtype alone, and so get all in float32.

    Args:
        query: `[batch, heads, q_len, width]`.
        key: `[batch, key_heads, kv_len, width]`.
        value: `[batch, key_heads, kv_len, value_width]`.
        mask: logits, or boolean (True: may look), broadcastable to `[batch, heads, q_len, kv_len]`; None where all may be looked at.
        scaling: factor on `query . key`.
        dropout: probability, on the attention probabilities.
    """
    value_width, dtype, on_cpu = value.shape[-1], query.dtype, query.device.type == "cpu"
    if mask is not None and mask.dtype != torch.bool:
        if not on_cpu and dtype in NARROW and mask.dtype not in NARROW:
            query, key, value = query.to(mask.dtype), key.to(mask.dtype), value.to(mask.dtype)
        mask = mask.to(query.dtype) if not on_cpu or dtype == torch.float64 else mask
        mask = mask if on_cpu else mask.contiguous()
    query, key, value = of_one_width(query, key, value)
    if not on_cpu:
        query, key, value = aligned(query), aligned(key), aligned(value)
    key, value, grouped = for_kernel(query, key, value, has_mask=mask is not None)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )
    output = output if output.shape[-1] == value_width else output[..., :value_width]
    return output if output.dtype == dtype else output.to(dtype)


def of_one_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values with zeros after the narrower ones: fused kernels take one width only.

    On a GPU it is one whose rows are whole units of `ALIGNED_BYTES`, as without that PyTorch turns to attention that is not fused. Zeros
    change no product; those of the values give zeros in the output, after its own numbers.
    """
    width = max(key.shape[-1], value.shape[-1])
    if query.device.type != "cpu":
        unit = ALIGNED_BYTES // query.element_size()
        width = -(-width // unit) * unit
    if query.shape[-1] == width == key.shape[-1] == value.shape[-1]:
        return query, key, value
    query, key, value = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    return query, key, value


def aligned(x: Tensor) -> Tensor:
    """Return queries, keys or values as the kernels for GPUs read them: each row begins at a whole unit of `ALIGNED_BYTES`.

    Keys that lie in a cache beside carried channels do not. PyTorch 2.11 looks at widths when it chooses a kernel, not at where rows
    begin: the kernel then raises an error, or returns wrong numbers.
    """
    unit = ALIGNED_BYTES // x.element_size()
    fits = x.stride(-1) == 1 and all(
        stride % unit == 0 for size, stride in zip(x.shape, x.stride()[:-1], strict=False) if size > 1
    )
    starts_well = torch.compiler.is_compiling() or x.storage_offset() % unit == 0  # a compiler knows no offsets
    return x if fits and starts_well else x.clone(memory_format=torch.contiguous_format)


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
