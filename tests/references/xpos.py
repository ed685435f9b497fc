"""Sun et al. 2023: scores of turned vectors with a decay in every plane, pair by pair, as complex numbers in float64."""

from __future__ import annotations

import cmath

from torch import Tensor


def score(query: Tensor, key: Tensor, i: int, j: int, layout: str, base: float, gamma: float, scale_base: float) -> float:
    """Return the unscaled score of one `[head_dim]` query at position `i` and one key at `j`."""
    planes = len(query) // 2
    total = 0.0
    for k in range(planes):
        first, second = (k, k + planes) if layout == "half" else (2 * k, 2 * k + 1)
        zeta = (k / planes + gamma) / (1 + gamma)
        theta = base ** (-2 * k / (2 * planes))
        # zeta ** (i / s) * zeta ** (-j / s) is the difference's power, and exp(i a) times the conjugate of exp(i b) is exp(i (a - b))
        q = complex(float(query[first]), float(query[second])) * cmath.exp(1j * theta * (i - j))
        total += zeta ** ((i - j) / scale_base) * (q * complex(float(key[first]), -float(key[second]))).real
    return total
