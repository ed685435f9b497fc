"""Chi et al. 2023, section 5: products of sinusoidal vectors, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def position_vector(position: int, width: int, first: int) -> Tensor:
    """Return the sines and cosines of one position, `[width]`; frequencies counted from `first`."""
    k = torch.arange(first, first + width // 2, dtype=torch.float64)
    angles = position / 10_000.0 ** (2 * k / width)
    return torch.cat((angles.sin(), angles.cos()))


def bias(num_heads: int, q_len: int, kv_len: int, width: int, first: int) -> Tensor:
    """Return `p_i . p_j / (8 h / heads)`, `[heads, q_len, kv_len]`, nothing taken away."""
    queries = torch.stack([position_vector(i, width, first) for i in range(q_len)])
    keys = torch.stack([position_vector(j, width, first) for j in range(kv_len)])
    return torch.stack([queries @ keys.T / (8 * h / num_heads) for h in range(1, num_heads + 1)])
