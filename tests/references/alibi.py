"""Press et al. 2022: slopes by the rule in section 3 and the authors' rule for other numbers of heads; bias pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor


def slopes(num_heads: int) -> list[float]:
    """Return the slopes: a geometric sequence that starts at its own ratio, `2 ** (-8 / heads)`, for a power of two."""
    if num_heads & (num_heads - 1) == 0:
        ratio = 2.0 ** (-8.0 / num_heads)
        return [ratio ** (h + 1) for h in range(num_heads)]
    below = 1
    while below * 2 < num_heads:
        below *= 2
    return slopes(below) + [slope for i, slope in enumerate(slopes(2 * below)) if i % 2 == 0][: num_heads - below]


def bias(num_heads: int, q_len: int, kv_len: int) -> Tensor:
    """Return `-slope |i - j|`, `[heads, q_len, kv_len]`, float64."""
    rows = [[[-slope * abs(i - j) for j in range(kv_len)] for i in range(q_len)] for slope in slopes(num_heads)]
    return torch.tensor(rows, dtype=torch.float64)
