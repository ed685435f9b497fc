"""Su et al. 2021, equation 34, as complex numbers, in float64."""

from __future__ import annotations

import cmath

import torch
from torch import Tensor


def rotated_by(vector: Tensor, angles: list[float], layout: str) -> Tensor:
    """Return one vector with plane k, a complex number, times `exp(i angles[k])`; dimensions beyond the planes stay."""
    out = vector.double().clone()
    for k, angle in enumerate(angles):
        first, second = (k, k + len(angles)) if layout == "half" else (2 * k, 2 * k + 1)
        turned = complex(float(out[first]), float(out[second])) * cmath.exp(1j * angle)
        out[first], out[second] = turned.real, turned.imag
    return out


def rotated(vector: Tensor, position: int, base: float, layout: str, rotary_dim: int) -> Tensor:
    """Return one `[head_dim]` vector turned by its position: plane k by `position theta_k`."""
    return rotated_by(vector, [position * base ** (-2 * k / rotary_dim) for k in range(rotary_dim // 2)], layout)


def rotated_all(x: Tensor, position_ids: Tensor, base: float, layout: str, rotary_dim: int) -> Tensor:
    """Return `[batch, heads, length, head_dim]` turned, vector by vector; `position_ids` is `[batch, length]`."""
    out = torch.empty_like(x, dtype=torch.float64)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for t in range(x.shape[2]):
                out[b, h, t] = rotated(x[b, h, t], int(position_ids[b, t]), base, layout, rotary_dim)
    return out
