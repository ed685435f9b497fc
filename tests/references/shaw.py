"""Shaw et al. 2018, equations 3 to 5, pair by pair, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def score_term(
    query: Tensor, key: Tensor, table: Tensor, first_query: int, max_distance: int, scaling: float, with_key: bool
) -> Tensor:
    """Return what position adds to each score, `[batch, heads, q_len, kv_len]`; `with_key` adds Huang et al. 2020, method 4."""
    out = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for i in range(query.shape[2]):
        for j in range(key.shape[2]):
            vector = table[max(-max_distance, min(max_distance, j - (i + first_query))) + max_distance].double()
            out[:, :, i, j] = (query[:, :, i].double() @ vector) * scaling
            if with_key:
                out[:, :, i, j] += (key[:, :, j].double() @ vector) * scaling
    return out


def value_term(probabilities: Tensor, table: Tensor, first_query: int, max_distance: int) -> Tensor:
    """Return what position adds to each output, `[batch, heads, q_len, head_dim]`."""
    out = torch.zeros(*probabilities.shape[:3], table.shape[1], dtype=torch.float64)
    for i in range(probabilities.shape[2]):
        for j in range(probabilities.shape[3]):
            vector = table[max(-max_distance, min(max_distance, j - (i + first_query))) + max_distance].double()
            out[:, :, i] += probabilities[:, :, i, j, None].double() * vector
    return out
