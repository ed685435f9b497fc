"""Vectors added to the tokens, from their definitions, number by number in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal(positions: list[int], size: int, base: float, layout: str) -> Tensor:
    """Vaswani et al. 2017, section 3.5: `[positions, size]`; `split` puts the sines first."""
    rows = []
    for position in positions:
        sines = [math.sin(position / base ** (2 * k / size)) for k in range((size + 1) // 2)]
        cosines = [math.cos(position / base ** (2 * k / size)) for k in range(size // 2)]
        if layout == "split":
            rows.append(sines + cosines)
        else:
            rows.append([(sines if i % 2 == 0 else cosines)[i // 2] for i in range(size)])
    return torch.tensor(rows, dtype=torch.float64)


def extended(table: Tensor, length: int, extend: str) -> Tensor:
    """Return `table` with `length` rows, one row at a time, in float64."""
    old = [row.double() for row in table]
    rows = []
    for m in range(length):
        if extend == "tile":
            rows.append(old[m % len(old)])
        elif extend == "group":
            rows.append(old[math.floor(m * len(old) / length)])
        elif extend == "mean":
            rows.append(old[m] if m < len(old) else sum(old) / len(old))
        else:
            place = m * (len(old) - 1) / (length - 1)
            low = min(int(place), len(old) - 2)
            rows.append(old[low] * (1 - (place - low)) + old[low + 1] * (place - low))
    return torch.stack(rows)


def bits(position: int, size: int, number_of_bits: int) -> list[int]:
    """Return the bits of a position, least significant first, repeated until `size` entries are full."""
    digits = list(reversed(format(position, f"0{number_of_bits}b")))
    return [int(digits[i % number_of_bits]) for i in range(size)]
