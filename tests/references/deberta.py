"""He et al. 2021, equation 4, pair by pair, in float64, with the row of the authors' code."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row(looking_back: int, span: int, max_distance: int | None) -> int:
    """Return the row of a distance (query minus key): clipped, or with a `max_distance` in logarithmic buckets."""
    n, middle = abs(looking_back), span // 2
    if max_distance is not None and n > middle:
        bucket = middle + math.ceil(math.log(n / middle) / math.log((max_distance - 1) / middle) * (middle - 1) - 1e-6)
        looking_back = bucket if looking_back > 0 else -bucket
    return max(0, min(2 * span - 1, looking_back + span))


def score_term(
    query: Tensor, key: Tensor, key_rows: Tensor, query_rows: Tensor, first_query: int, span: int, max_distance: int | None
) -> Tensor:
    """Return `q_i . Kr[d] + k_j . Qr[d]`, unscaled; `key_rows` and `query_rows` are `[heads, 2 span, head_dim]`."""
    out = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for i in range(query.shape[2]):
        for j in range(key.shape[2]):
            at = row(i + first_query - j, span, max_distance)
            out[:, :, i, j] = (query[:, :, i].double() * key_rows[:, at].double()).sum(-1)
            out[:, :, i, j] += (key[:, :, j].double() * query_rows[:, at].double()).sum(-1)
    return out
