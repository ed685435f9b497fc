"""The bits of the position: the second thing one would try.

The step between the index and sinusoids in introductions to the subject; no paper proposes it. Values are bounded, but neighbours
may differ in every bit (7 and 8), and bits beyond the trained length were always 0 in training. Differs from the textbook: scaled, and
the bits are repeated until the width is full.

`python -m pe_swap show binary` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.scaled import ScaledOptions

BITS = 24
"""Bits of a position: enough for 16 million."""


def bits(position_ids: Tensor, size: int) -> Tensor:
    """Return the bits of `position_ids`, least significant first, repeated every 24 dimensions, `[..., size]`, float32 0 or 1."""
    place = torch.arange(size, device=position_ids.device) % BITS
    return ((position_ids[..., None] >> place) & 1).float()


@dataclass(frozen=True)
class BinaryOptions(ScaledOptions):
    """Options of `binary`: those of `ScaledOptions`."""

    scheme: ClassVar[str] = "binary"

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedBinaryOptions:
        """Write out the scale, over positions 0 to `trained_length - 1`."""

        def unscaled() -> Tensor:
            return bits(torch.arange(max(geometry.trained_length, 2), device="cpu"), geometry.input_size)

        return self.written_out(ResolvedBinaryOptions, native, scale=self.matching_scale(native, unscaled))


@dataclass(frozen=True, kw_only=True)
class ResolvedBinaryOptions(BinaryOptions):
    """`BinaryOptions` as they are used and saved."""

    scale: float


@SCHEMES.register("binary")
class Binary(Scheme):
    """`x_i = token_i + scale * bits(i)`.

    Start on a pretrained model: `scale="match"`.
    """

    Options = BinaryOptions
    summary = "the bits of the position, repeated over the dimensions"

    options: ResolvedBinaryOptions

    def encode(self, position_ids: Tensor) -> Tensor:
        """Return the scaled bits, float32; see `Scheme.encode`."""
        return bits(position_ids, self.geometry.input_size) * self.options.scale
