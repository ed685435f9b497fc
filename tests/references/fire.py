"""Li et al. 2024, section 3, and the two-sided form of ours, pair by pair, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def psi(x: float, c: float) -> float:
    """Return `log(|c x| + 1)`."""
    return math.log(abs(c * x) + 1)


def network(x: float, hidden_weight: Tensor, hidden_bias: Tensor, output_weight: Tensor, output_bias: Tensor) -> Tensor:
    """Return one linear layer, rectified units, and one linear layer, for one number."""
    hidden = (hidden_weight * x + hidden_bias).clamp(min=0)
    return output_weight @ hidden + output_bias


def bias(query_ids: list[int], key_ids: list[int], c: float, threshold: float, is_causal: bool, *layers: Tensor) -> Tensor:
    """Return `[heads, q_len, kv_len]`; pairs that a decoder never sees are not-a-number."""
    hidden_weight, hidden_bias, output_weight, output_bias = (layer.double() for layer in layers)
    heads = len(output_bias) if is_causal else len(output_bias) // 2
    out = torch.full((heads, len(query_ids), len(key_ids)), math.nan, dtype=torch.float64)
    for row, i in enumerate(query_ids):
        for column, j in enumerate(key_ids):
            if is_causal and j > i:
                continue
            reach = max(threshold, i) if is_causal else max(threshold, i, j)
            both = network(psi(i - j, c) / psi(reach, c), hidden_weight, hidden_bias, output_weight, output_bias)
            out[:, row, column] = both[heads:] if j > i and not is_causal else both[:heads]
    return out
