"""Dai et al. 2019, section 3.3, pair by pair, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoid(distance: int, size: int) -> Tensor:
    """Return `R_distance`, `[size]`: sines of all frequencies, then cosines."""
    angles = [distance / 10_000 ** (2 * k / size) for k in range(size // 2)]
    return torch.tensor([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles], dtype=torch.float64)


def score_term(
    query: Tensor, key: Tensor, weight: Tensor, u: Tensor, v: Tensor, first_query: int, scaling: float, reach: int | None
) -> Tensor:
    """Return what position adds to each score; `weight` is `[heads * head_dim, hidden_size]`, `u` and `v` `[heads, head_dim]`."""
    _, heads, q_len, head_dim = query.shape
    out = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for i in range(q_len):
        for j in range(key.shape[2]):
            distance = i + first_query - j
            if reach is not None:
                distance = max(-reach, min(reach, distance))
            r = (weight.double() @ sinusoid(distance, weight.shape[1])).reshape(heads, head_dim)
            by_distance = ((query[:, :, i].double() + v.double()) * r).sum(-1)
            out[:, :, i, j] = scaling * ((u.double() * key[:, :, j].double()).sum(-1) + by_distance)
    return out
