"""The scalings of rotary frequencies, plane by plane, in float64.

Interpolation: Chen et al. 2023. NTK-aware: bloc97 2023. YaRN: Peng et al. 2023, with the ramp over planes of the authors' code. Llama 3.1:
its technical description. LongRoPE: Ding et al. 2024. p-RoPE: Barbero et al. 2025.
"""

from __future__ import annotations

import math

TURN = 2 * math.pi


def default(dim: int, base: float) -> list[float]:
    """Return `base ** (-2k / dim)`."""
    return [base ** (-2 * k / dim) for k in range(dim // 2)]


def linear(dim: int, base: float, factor: float) -> list[float]:
    """Positions are divided by the factor, which is frequencies divided by it."""
    return [theta / factor for theta in default(dim, base)]


def ntk(dim: int, base: float, factor: float) -> list[float]:
    """The base for which the slowest plane is slowed by the factor exactly, and the fastest not at all."""
    return default(dim, base * factor ** (dim / (dim - 2)))


def dynamic(dim: int, base: float, factor: float, original: int, length: int) -> list[float]:
    """NTK-aware, by how much longer the input is."""
    if length <= original:
        return default(dim, base)
    return ntk(dim, base, factor * length / original - (factor - 1))


def yarn(
    dim: int, base: float, factor: float, original: int, fast: float = 32.0, slow: float = 1.0, truncate: bool = True
) -> list[float]:
    """Keep planes with more than `fast` turns within the original length, interpolate those with fewer than `slow`."""

    def plane_with(turns: float) -> float:
        # original * base ** (-2k / dim) = 2 pi turns, solved for k
        return dim * math.log(original / (turns * TURN)) / (2 * math.log(base))

    low, high = plane_with(fast), plane_with(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if high == low else 0
    ramps = [min(1.0, max(0.0, (k - low) / (high - low))) for k in range(dim // 2)]
    return [theta * (1 - ramp) + theta / factor * ramp for theta, ramp in zip(default(dim, base), ramps, strict=True)]


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Return `0.1 ln(factor) + 1`, or DeepSeek's ratio of two such."""
    if mscale and mscale_all_dim:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def llama3(dim: int, base: float, factor: float, original: int, low: float, high: float) -> list[float]:
    """Keep short wavelengths, divide long ones, blend between."""
    out = []
    for theta in default(dim, base):
        turns = original * theta / TURN
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        out.append(kept * theta + (1 - kept) * theta / factor)
    return out


def longrope(dim: int, base: float, divisors: list[float]) -> list[float]:
    """One divisor a plane."""
    return [theta / divisor for theta, divisor in zip(default(dim, base), divisors, strict=True)]


def longrope_attention_factor(factor: float, original: int) -> float:
    """Return `sqrt(1 + ln(factor) / ln(original))`."""
    return math.sqrt(1 + math.log(factor) / math.log(original))


def proportional(head_dim: int, base: float, fraction: float, factor: float = 1.0) -> list[float]:
    """The fastest planes turn, with theta of the whole head."""
    turning = round(fraction * head_dim / 2)
    return [theta / factor if k < turning else 0.0 for k, theta in enumerate(default(head_dim, base))]
