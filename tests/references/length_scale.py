"""Factors on queries by length, one at a time, in float64: Su 2023, and Gelberg et al. 2026."""

from __future__ import annotations

import math


def log_n(num_keys: int, trained_length: int) -> float:
    """Return `max(1, log(n) / log(trained_length))`."""
    return max(1.0, math.log(num_keys) / math.log(trained_length))


def drope_temperature(num_keys: int, trained_length: int, coefficient: float) -> float:
    """Return `1 + c ln(s)` for input `s` times as long as in training, 1 for shorter."""
    return 1.0 + coefficient * math.log(max(1.0, num_keys / trained_length))
