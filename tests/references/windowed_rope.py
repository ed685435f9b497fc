"""Rotary scores at remapped distances, pair by pair, in float64: Jin et al. 2024, section 3.2, and Su 2023."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.references.rope import rotated


def distance_of(i: int, j: int, window: int, group_size: int | None) -> int:
    """Return the distance a query at i and a key at j count; without a `group_size`, ReRoPE's."""
    if i - j < window:
        return i - j
    return window if group_size is None else i // group_size - j // group_size + window - window // group_size


def scores(query: Tensor, key: Tensor, first_query: int, window: int, group_size: int | None, scaling: float) -> Tensor:
    """Return scaled scores of unturned queries and keys, base 10,000, layout half; zero after the query."""
    out = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    head_dim = query.shape[-1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                for j in range(i + first_query + 1):
                    distance = distance_of(i + first_query, j, window, group_size)
                    turned = rotated(query[b, h, i], distance, 10_000, "half", head_dim)
                    out[b, h, i, j] = scaling * (turned @ key[b, h, j].double())
    return out
