"""Attention with a bias that depends on `key - query` alone, in O(length) memory.

Such a bias is one vector per head. With the queries in reversed order, the matrix of all pairs is a Hankel matrix, entry `(r, j)`
depending on `r + j`, and a strided view of that vector: `scaled_dot_product_attention` reads it as a mask on the CPU without a
copy. Causality is minus infinity in the vector. Causal queries go in blocks, each against the keys up to its end, so that most of the
masked half is not computed; where a scheme says how far back it looks, each block starts at the first key within that reach. Masks that
vary by row (padding, packing) are added block by block.

A bias that needs a gradient would send PyTorch to its unfused path, so it has a backward of its own, block by block
(`_RelativeBiasAttention`).

Kernels for GPUs read no strided view and keep their mask for the backward pass, which together would be heads x length x length numbers per
layer. There every call goes in blocks, and the backward pass computes a block again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pe_swap.attention.fused import FORBIDDEN, distance_mask, fused_attention, kernel_mask, of_one_width, per_head
from pe_swap.attention.kept_with_cache import is_transformed
from pe_swap.attention.masks import block_of

FirstVisible = Callable[[int], int]

CAUSAL_BLOCK = 768
"""Queries per block where each block has the keys up to its end: small enough to skip most of the masked half, and the fewest for which
PyTorch's kernel takes its large tiles."""

MASKED_BLOCK = 512
"""Queries per block where bias and mask are added up, which takes `batch x heads x 512 x kv_len` numbers."""

SMALLEST_LOGARITHM = -75.0
"""Probabilities below exp of this, 3e-33, are zero in the backward pass. They do not change a float32 sum whose largest term is 1, and
times a gradient they would be denormal numbers, on which some processors spend a hundred cycles each."""

BACKWARD_BLOCK = 256
"""Queries, and keys, per block of the backward pass: its scores are read and written eight times, so they should stay in the cache."""


def relative_bias_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    attention_mask: Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    first_visible: FirstVisible | None = None,
) -> Tensor:
    """Return `softmax(scaling * query . key + bias[j - i] + mask) . value`.

    Args:
        query: `[batch, heads, q_len, width]`.
        key: `[batch, key_heads, kv_len, width]`.
        value: `[batch, key_heads, kv_len, value_width]`.
        bias: `[heads, q_len + kv_len - 1]`, logits; entry `n` is for the pairs with `j - i = n - (q_len - 1)`; may be `-inf`.
        attention_mask: boolean (True: may look) or additive, `[batch or 1, heads or 1, q_len, kv_len]`, or None.
        is_causal: with no mask, key index at most query index; keys beyond the last query (the empty tail of a static cache) are
            then never read.
        scaling: factor on `query . key`.
        dropout: probability, on the attention probabilities.
        first_visible: from the index of a query to that of the first key at which its bias may be finite; None where that is all keys.

    Returns:
        `[batch, heads, q_len, value_width]`, in the dtype of `query`.
    """
    q_len, value_width = query.shape[2], value.shape[-1]
    if is_causal and attention_mask is None:
        key, value, bias = key[:, :, :q_len], value[:, :, :q_len], bias[:, : 2 * q_len - 1]
        bias = bias.masked_fill(torch.arange(bias.shape[1], device=bias.device) >= q_len, FORBIDDEN)
    needs_own_backward = bias.requires_grad and torch.is_grad_enabled() and dropout == 0.0 and query.device.type == "cpu"
    # torch.func and torch.export take PyTorch's unfused path: the one has no rules for a function of ours, the other drops its backward.
    if needs_own_backward and not is_transformed() and not is_exporting():
        output: Tensor = _RelativeBiasAttention.apply(  # type: ignore[no-untyped-call]  # torch's own decorator
            *of_one_width(query, key, value), bias, attention_mask, is_causal, scaling, first_visible
        )
        return output[..., :value_width]
    if q_len == 1:  # in decoding each small call counts
        first = 0 if first_visible is None else first_visible(0)
        if first > 0:
            key, value, bias = key[:, :, first:], value[:, :, first:], bias[:, first:]
            attention_mask = block_of(attention_mask, slice(None), slice(first, None))
        mask = bias[None, :, None] if attention_mask is None else kernel_mask(bias[None, :, None], attention_mask)
        return fused_attention(query, key, value, distance_mask(mask, query), scaling=scaling, dropout=dropout)
    on_cpu = query.device.type == "cpu"
    blocks = forward_blocks(q_len, key.shape[2], is_causal, attention_mask, first_visible, reads_views=on_cpu)

    def attend(
        reversed_query: Tensor, key: Tensor, value: Tensor, bias: Tensor, start: int, stop: int, kv_start: int, kv_stop: int
    ) -> Tensor:
        """Return the output of the queries from `start` to `stop`, backwards."""
        keys = slice(kv_start, kv_stop)
        mask = distance_mask(block_mask(bias, q_len, start, stop, keys, attention_mask), query)
        block = reversed_query[:, :, q_len - stop : q_len - start]
        return fused_attention(block, key[:, :, keys], value[:, :, keys], mask, scaling=scaling, dropout=dropout)

    again_in_backward = not on_cpu and len(blocks) > 1 and torch.is_grad_enabled() and not is_transformed()
    run = partial(checkpoint, attend, use_reentrant=False) if again_in_backward else attend
    inputs = query.flip(2), key, value, bias
    return torch.cat([run(*inputs, *block) for block in reversed(blocks)], dim=2).flip(2)


def is_exporting() -> bool:
    """Tell whether `torch.export` is tracing; PyTorch before 2.7 does not say, and there the answer is no."""
    return bool(getattr(torch.compiler, "is_exporting", bool)())


def query_blocks(
    q_len: int, kv_len: int, skips_future: bool, size: int, first_visible: FirstVisible | None
) -> list[tuple[int, int, int, int]]:
    """Return `(start, stop, kv_start, kv_stop)` for each block of queries: the block has the keys from `kv_start` to `kv_stop`."""
    bounds = [(start, min(start + size, q_len)) for start in range(0, q_len, size)]
    return [
        (start, stop, 0 if first_visible is None else first_visible(start), stop if skips_future else kv_len)
        for start, stop in bounds
    ]


def forward_blocks(
    q_len: int,
    kv_len: int,
    is_causal: bool,
    attention_mask: Tensor | None,
    first_visible: FirstVisible | None,
    *,
    reads_views: bool = True,
) -> list[tuple[int, int, int, int]]:
    """Return the blocks of the forward pass; all queries together where no key is skipped and no mask has to be written out.

    Args:
        q_len: number of queries.
        kv_len: number of keys.
        is_causal: see `relative_bias_attention`.
        attention_mask: see `relative_bias_attention`.
        first_visible: see `relative_bias_attention`.
        reads_views: the kernel reads a strided view of the bias; else the bias of a block is written out.
    """
    if attention_mask is not None:
        return query_blocks(q_len, kv_len, False, MASKED_BLOCK, first_visible)
    needs_blocks = is_causal or first_visible is not None or not reads_views
    return query_blocks(q_len, kv_len, is_causal, CAUSAL_BLOCK if needs_blocks else q_len, first_visible)


def hankel(bias: Tensor, q_len: int, start: int, stop: int, keys: slice) -> Tensor:
    """Return the bias of a block whose queries run backwards, `[1, heads, stop - start, number of keys]`, a view.

    Row `r` is query `stop - 1 - r`; its entry for key `j` is `bias[j + r + q_len - stop]`.
    """
    first, num_keys = q_len - stop + keys.start, keys.stop - keys.start
    vector = bias[:, first : first + num_keys + stop - start - 1]
    return vector.unfold(-1, num_keys, 1)[None]


def block_mask(bias: Tensor, q_len: int, start: int, stop: int, keys: slice, attention_mask: Tensor | None) -> Tensor:
    """Return bias and mask of a block whose queries run backwards; see `hankel`."""
    mask = block_of(attention_mask, slice(start, stop), keys)
    mask = mask if mask is None or mask.shape[2] == 1 else mask.flip(2)
    return kernel_mask(hankel(bias, q_len, start, stop, keys), mask)


def sum_of_antidiagonals(padded: Tensor) -> Tensor:
    """Return `out[n] = sum of matrix[r, j] with r + j = n`, `[..., rows + columns - 1]`.

    Rows are read one shorter than they were written, which shifts row `r` by `r`.

    Args:
        padded: the matrix with as many columns of zeros at its right as it has rows, `[..., rows, columns + rows]`.
    """
    rows, width = padded.shape[-2], padded.shape[-1] - 1
    return padded.flatten(-2)[..., : rows * width].reshape(*padded.shape[:-2], rows, width).sum(-2)


class _RelativeBiasAttention(torch.autograd.Function):
    """The fused forward, with a backward that also gives the gradient of the bias vector, in O(length x block) memory.

    With `P = exp(S - logsumexp)` recomputed for a block: `dV = P^T dO`, `dS = P * (dO V^T - rowsum(dO * O))`,
    `dQ = scaling dS K`, `dK = scaling dS^T Q`, and `dbias[n]` the sum of `dS` over the pairs with `j - i = n - (q_len - 1)`
    (Dao et al., "FlashAttention", arXiv:2205.14135, appendix B, and one more sum).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        attention_mask: Tensor | None,
        skips_future: bool,
        scaling: float,
        first_visible: FirstVisible | None,
    ) -> Tensor:
        """Run the kernel block by block, keeping the logsumexp of every row."""
        q_len = query.shape[2]
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
        for start, stop, kv_start, kv_stop in forward_blocks(q_len, key.shape[2], skips_future, attention_mask, first_visible):
            keys = slice(kv_start, kv_stop)
            mask = block_mask(bias, q_len, start, stop, keys, attention_mask)
            mask = mask.to(query.dtype) if query.dtype == torch.float64 else mask
            block_output, block_logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, start:stop].flip(2),
                key[:, :, keys],
                value[:, :, keys],
                0.0,
                False,
                attn_mask=mask,
                scale=scaling,
            )
            output[:, :, start:stop] = block_output.flip(2)
            logsumexp[:, :, start:stop] = block_logsumexp.flip(2)
        ctx.save_for_backward(query, key, value, bias, attention_mask, output, logsumexp)
        ctx.skips_future, ctx.scaling, ctx.first_visible = skips_future and attention_mask is None, scaling, first_visible
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Recompute the probabilities block by block."""
        (grad_output,) = grad_outputs
        query, key, value, bias, attention_mask, output, logsumexp = ctx.saved_tensors
        scaling, work, leading = ctx.scaling, logsumexp.dtype, query.shape[:2]
        q_len, kv_len = query.shape[2], key.shape[2]
        # A row that may look nowhere has none that is finite; its probabilities are exp(-inf), whatever stands here.
        logsumexp = torch.where(logsumexp.isfinite(), logsumexp, 0.0).flip(2)[..., None]
        # Backwards, as the rows of `hankel`.
        queries, grads, outputs = (x.to(work).flip(2).flatten(0, 1) for x in (query, grad_output, output))
        groups = query.shape[1] // key.shape[1]
        all_keys, all_values = (per_head(x.to(work), query.shape[1]).flatten(0, 1) for x in (key, value))
        queries = queries * scaling
        delta = (grads * outputs).sum(-1, keepdim=True)
        grad_query, grad_key, grad_value, grad_bias = (
            torch.zeros_like(x, dtype=work, memory_format=torch.contiguous_format) for x in (queries, all_keys, all_values, bias)
        )
        buffers: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        blocks = query_blocks(q_len, kv_len, ctx.skips_future, BACKWARD_BLOCK, ctx.first_visible)
        for start, stop, kv_start, kv_stop in blocks:
            rows = slice(q_len - stop, q_len - start)
            block_query, block_grad = queries[:, rows], grads[:, rows]
            mask = block_mask(bias, q_len, start, stop, slice(kv_start, kv_stop), attention_mask)
            for key_start in range(kv_start, kv_stop, BACKWARD_BLOCK):
                keys = slice(key_start, min(key_start + BACKWARD_BLOCK, kv_stop))
                shape = (stop - start, keys.stop - key_start)
                if shape not in buffers:
                    buffers[shape] = _backward_buffers(queries, *shape)
                scores, grad_probabilities, padded = buffers[shape]
                torch.sub(
                    mask[..., key_start - kv_start : keys.stop - kv_start],
                    logsumexp[:, :, rows],
                    out=scores.view(*leading, *shape),
                )
                scores.baddbmm_(block_query, all_keys[:, keys].transpose(1, 2))
                probabilities = torch.threshold_(scores, SMALLEST_LOGARITHM, FORBIDDEN).exp_()
                grad_value[:, keys].baddbmm_(probabilities.transpose(1, 2), block_grad)
                torch.bmm(block_grad, all_values[:, keys].transpose(1, 2), out=grad_probabilities).sub_(delta[:, rows])
                grad_scores = _product_into(padded[..., : shape[1]], grad_probabilities, probabilities)
                grad_query[:, rows].baddbmm_(grad_scores, all_keys[:, keys])
                grad_key[:, keys].baddbmm_(grad_scores.transpose(1, 2), block_query)
                first = q_len - stop + key_start
                summed = sum_of_antidiagonals(padded).view(*leading, -1).sum(0)
                grad_bias[:, first : first + summed.shape[-1]] += summed
        grad_query = (grad_query * scaling).view(query.shape).flip(2).to(query.dtype)
        grad_key, grad_value = (
            grad.view(len(x), -1, groups, *x.shape[2:]).sum(2).to(x.dtype) for grad, x in ((grad_key, key), (grad_value, value))
        )
        return grad_query, grad_key, grad_value, grad_bias.to(bias.dtype), None, None, None, None


def _product_into(room: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `room`, whose rows may lie apart, with `a * b` in it; a compiler takes no such `out`."""
    return room.copy_(a * b) if torch.compiler.is_compiling() else torch.mul(a, b, out=room)


def _backward_buffers(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for a block's scores, what comes back to its probabilities, and what comes back to its scores beside zeros.

    Blocks share them: for a new tensor a block, the system would have to find and clear pages each time.
    """
    scores, grad_probabilities = (like.new_empty(len(like), rows, columns) for _ in range(2))
    return scores, grad_probabilities, like.new_zeros(len(like), rows, columns + rows)
