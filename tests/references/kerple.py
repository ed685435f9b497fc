"""Chi et al. 2022, section 4: two kernels of the distance, in float64, pair by pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bias(variant: str, scale: list[float], power: list[float], q_len: int, kv_len: int) -> Tensor:
    """Return the kernel with its sign, `[heads, q_len, kv_len]`."""

    def kernel(a: float, p: float, distance: int) -> float:
        return -p * math.log(1 + a * distance) if variant == "log" else -a * distance**p

    rows = [[[kernel(a, p, abs(i - j)) for j in range(kv_len)] for i in range(q_len)] for a, p in zip(scale, power, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)
