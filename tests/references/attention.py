"""Attention pair by pair, in float64, with everything that a family does to its scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Number = Callable[[int, int, int, int], float]
"""From batch row, query head, query index and key index to a logit."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    allowed: Callable[[int, int, int], bool],
    score_bias: Number = lambda row, head, i, j: 0.0,
    relative_bias: Number = lambda row, head, i, j: 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output, `[batch, heads, q_len, value_width]`, and the probabilities.

    Args:
        query: `[batch, heads, q_len, width]`.
        key: `[batch, key_heads, kv_len, width]`; query head `h` has key head `h // (heads / key_heads)`.
        value: `[batch, key_heads, kv_len, value_width]`.
        scaling: factor on `query . key`.
        allowed: from batch row, query index and key index to whether the query may look at the key.
        score_bias: what is added inside the cap.
        relative_bias: what is added outside.
        softcap: `c` in `c * tanh(x / c)`.
        sinks: `[heads]`, the logit of a key that has no value.
    """
    batch, heads, q_len, _ = query.shape
    groups, kv_len = heads // key.shape[1], key.shape[2]
    probabilities = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.float64)
    output = torch.zeros(batch, heads, q_len, value.shape[-1], dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            for i in range(q_len):
                weights = [0.0] * kv_len
                for j in range(kv_len):
                    if allowed(row, i, j):
                        score = scaling * float(query[row, head, i].double() @ key[row, head // groups, j].double())
                        score += score_bias(row, head, i, j)
                        score = score if softcap is None else softcap * math.tanh(score / softcap)
                        weights[j] = math.exp(score + relative_bias(row, head, i, j))
                total = sum(weights) + (0.0 if sinks is None else math.exp(float(sinks[head])))
                for j in range(kv_len):
                    probabilities[row, head, i, j] = weights[j] / total
                    output[row, head, i] += weights[j] / total * value[row, head // groups, j].double()
    return output, probabilities
