"""Golovneva et al. 2024, equations 3 to 5, pair by pair, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def score_term(query: Tensor, key: Tensor, table: Tensor, first_query: int, scaling: float) -> Tensor:
    """Return what position adds to each score, `[batch, heads, q_len, kv_len]`; zero after the query."""
    out = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                q, count = query[b, h, i].double(), 0.0
                for j in range(i + first_query, -1, -1):
                    count += 1 / (1 + math.exp(-scaling * float(q @ key[b, h, j].double())))
                    position = min(count, table.shape[0] - 1)
                    below = math.floor(position)
                    above = min(below + 1, table.shape[0] - 1)
                    share = position - below
                    vector = (1 - share) * table[below].double() + share * table[above].double()
                    out[b, h, i, j] = scaling * (q @ vector)
    return out
