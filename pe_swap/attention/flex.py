"""Attention with a bias that depends on `key - query` alone, through PyTorch's FlexAttention.

The bias is a score function, which reads one number per distance while the kernel computes a score. The mask is transformers' block
mask, with causality, padding, packing and caches in it. Compiled, nothing of heads x q_len x kv_len exists, and blocks that a mask
forbids are not computed.

On a CPU it runs uncompiled. The kernel that PyTorch 2.13 compiles there is wrong, without any scheme too: not a number, or off by up to
24, where keys are 8 more than a multiple of 16 in heads of 16 channels. PyTorch warns that scores are then written out whole; `sdpa` does
not write them.

PyTorch has no dropout here, and no backward on a CPU; both are errors. Gradients of a bias that is trained are PyTorch's own, on
CUDA alone, and have not been run.

`sdpa` never turns to FlexAttention by itself, on CUDA either: it compiles for every new form of a call, and a user chooses that by
name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.masking_utils import flex_attention_mask

from pe_swap.attention.fused import of_one_width, per_head
from pe_swap.errors import UnsupportedBackendError

ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""From a score and its batch, head, query and key indices, all without dimensions, to the score that enters the softmax."""


def flex_bias_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    attention_mask: BlockMask | Tensor | None,
    is_causal: bool,
    scaling: float,
    training: bool,
    softcap: float | None = None,
) -> Tensor:
    """Return `softmax(cap(scaling * query . key) + bias[j - i] + mask) . value`.

    Args:
        query: `[batch, heads, q_len, width]`.
        key: `[batch, key_heads, kv_len, width]`.
        value: `[batch, key_heads, kv_len, value_width]`.
        bias: `[heads, q_len + kv_len - 1]`, float32, logits; entry `n` is for the pairs with `j - i = n - (q_len - 1)`. None for none.
        attention_mask: a block mask; or what a caller of the model made, boolean (True: may look) or additive, broadcastable to
            `[batch, heads, q_len, kv_len]`; or None.
        is_causal: with no mask, key index at most query index.
        scaling: factor on `query . key`.
        training: whether the module trains; transformers keeps a compiled function for either.
        softcap: see `plain_attention`.

    Returns:
        `[batch, heads, q_len, value_width]`, in the dtype of `query`. A query that a block mask lets look nowhere gets zeros.

    Raises:
        UnsupportedBackendError: the bias needs a gradient on a CPU.
        NotImplementedError: another input does; PyTorch's own.
    """
    if bias is not None and bias.requires_grad and torch.is_grad_enabled() and bias.device.type == "cpu":
        raise UnsupportedBackendError(
            "The attention implementation is 'flex_attention', which has no backward on a CPU, and the scheme's bias needs a "
            'gradient. Call model.set_attn_implementation("sdpa"), or run under torch.no_grad().'
        )
    dense_mask: Tensor | None = None
    if isinstance(attention_mask, Tensor):
        dense_mask = attention_mask.expand(*query.shape[:3], key.shape[2])
    value_width = value.shape[-1]
    query, key, value = of_one_width(query, key, value)
    if not is_power_of_two(query.shape[1]):  # as transformers does: the kernel then takes no groups
        key, value = per_head(key, query.shape[1]), per_head(value, query.shape[1])
    output: Tensor = kernel_for(query, training)(
        query,
        key,
        value,
        score_mod=score_function(bias, query.shape[2], dense_mask, is_causal and attention_mask is None, softcap),
        block_mask=attention_mask if isinstance(attention_mask, BlockMask) else None,
        enable_gqa=query.shape[1] != key.shape[1],
        scale=scaling,
    )
    return output[..., :value_width]


def kernel_for(query: Tensor, training: bool) -> Callable[..., Tensor]:
    """Return FlexAttention as it is right on the device of `query`: compiled, as transformers does it, or on a CPU uncompiled.

    Raises:
        UnsupportedBackendError: a compiler runs, which would compile the kernel for a CPU.
    """
    if query.device.type != "cpu":
        return partial(compile_friendly_flex_attention, training=training)
    if torch.compiler.is_compiling():
        raise UnsupportedBackendError(
            "The attention implementation is 'flex_attention', whose compiled kernel for CPUs gives wrong numbers at some lengths, and "
            'the model is being compiled. Call model.set_attn_implementation("sdpa").'
        )
    kernel: Callable[..., Tensor] = flex_attention
    return kernel


def is_power_of_two(number: int) -> bool:
    """Tell whether a positive number is a power of two."""
    return number & (number - 1) == 0


def score_function(
    bias: Tensor | None, q_len: int, dense_mask: Tensor | None, is_causal: bool, softcap: float | None = None
) -> ScoreFunction:
    """Return the function from a scaled score to the one that enters the softmax.

    Args:
        bias: as in `flex_bias_attention`.
        q_len: number of queries.
        dense_mask: boolean or additive, `[batch, heads, q_len, kv_len]`, or None.
        is_causal: key index at most query index.
        softcap: see `plain_attention`.

    Returns:
        A function of one score. What a mask forbids becomes the lowest finite number, as in the eager form.
    """

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[head, key_index - query_index + (q_len - 1)]
        if dense_mask is not None and dense_mask.dtype != torch.bool:
            score = score + dense_mask[batch, head, query_index, key_index]
        elif dense_mask is not None:
            score = torch.where(dense_mask[batch, head, query_index, key_index], score, torch.finfo(score.dtype).min)
        if is_causal:
            score = torch.where(key_index <= query_index, score, torch.finfo(score.dtype).min)
        return score

    return score_mod


def flex_mask(*args: Any, q_offset: int | Tensor = 0, **kwargs: Any) -> BlockMask:
    """Return transformers' block mask for queries that start at slot `q_offset`, as it is now.

    A block mask is a function that runs again inside attention. A static cache hands on its own counter, counts in place, and would
    have counted these queries by then, so that they looked into its empty tail. In earlier versions the counter has a dimension, which
    the mask function may not.

    Args:
        args: see `transformers.masking_utils.flex_attention_mask`.
        q_offset: slot of the first query.
        kwargs: see there.
    """
    first_slot = q_offset.clone().reshape(()) if isinstance(q_offset, Tensor) else q_offset
    mask: BlockMask = flex_attention_mask(*args, q_offset=first_slot, **kwargs)
    return mask
