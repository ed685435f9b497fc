"""Frequencies and sinusoids of positions, for every scheme that is built from them.

Vaswani et al., "Attention Is All You Need" (2017, arXiv:1706.03762), section 3.5: sine and cosine of `position * theta_k`,
`theta_k = base ** (-2k / size)`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequencies(size: int, base: float, device: torch.device | str = "cpu") -> Tensor:
    """Return `base ** (-2k / size)` for k from 0 to `ceil(size / 2) - 1`, in radians per position, float64."""
    return base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)


def sinusoids(position_ids: Tensor, size: int, base: float, layout: str) -> Tensor:
    """Return `[..., size]` float32 sines and cosines of `position_ids`, `[...]`.

    Angles are float64 until the sine is taken: in float32, one at position 100,000 would be off by up to 0.004 radians.
    For an odd `size` the last frequency has a sine only.

    Args:
        position_ids: positions or distances.
        size: width of a vector.
        base: the longest wavelength is nearly `2 pi base`, in positions.
        layout: `"interleaved"`, sine and cosine of a frequency side by side, or `"split"`, all sines first.
    """
    angles = position_ids[..., None].to(torch.float64) * inverse_frequencies(size, base, position_ids.device)
    sine, cosine = angles.sin().float(), angles.cos().float()
    if layout == "split":
        return torch.cat((sine, cosine[..., : size // 2]), dim=-1)
    return torch.stack((sine, cosine), dim=-1).flatten(-2)[..., :size]
