"""The bits of the position: the second thing one would try.

The step between the index and sinusoids in introductions to the subject; no paper proposes it. Values are bounded, but neighbours
may differ in every bit (7 and 8), and bits beyond the trained length have never been on. Differs from the textbook: scaled, and
the bits are repeated until the hidden size is full.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES, Geometry, Scheme, root_mean_square
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.sinusoidal import matching_scale

BITS = 24
"""Bits of a position: enough for 16 million."""


@dataclass(frozen=True)
class BinaryOptions(SchemeOptions):
    """Options of `binary`.

    Attributes:
        scale: factor on the bits; `"match"` gives the trained positions the root mean square of the table they replace.
    """

    scheme: ClassVar[str] = "binary"

    scale: float | str = "match"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("scale", 0.0, 1e6, or_text=("match",))

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> BinaryOptions:
        """Write out the scale, over positions 0 to `trained_length - 1`."""
        if self.scale != "match":
            return self
        unscaled = root_mean_square(bits(torch.arange(max(geometry.trained_length, 2)), geometry.hidden_size))
        return replace(self, scale=matching_scale(self, position_table, unscaled))


def bits(position_ids: Tensor, size: int) -> Tensor:
    """Return the bits of `position_ids`, least significant first, repeated every 24 dimensions, `[..., size]`, float32 0 or 1."""
    place = torch.arange(size, device=position_ids.device) % BITS
    return ((position_ids[..., None] >> place) & 1).float()


@SCHEMES.register("binary")
class Binary(Scheme):
    """`x_i = token_i + scale * bits(i)`.

    Start on a pretrained model: `scale="match"`.
    """

    Options = BinaryOptions
    summary = "the bits of the position, repeated over the dimensions"

    options: BinaryOptions

    def encode(self, position_ids: Tensor) -> Tensor:
        """Return the scaled bits, float32; see `Scheme.encode`."""
        return bits(position_ids, self.geometry.hidden_size) * float(self.options.scale)
