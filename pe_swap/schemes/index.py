"""The position itself, as a number in every dimension: the first thing one would try.

The straw man of introductions to the subject; no paper proposes it. Values grow without bound, so that no vector beyond the trained
length occurred in training and, far out, the token is lost in it.

Differs from the textbook: scaled, and every second dimension has a minus sign. The same number in every dimension is exactly what
a layer norm subtracts: it would change nothing in GPT-2 and BERT.

`python -m pe_swap show index` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.scaled import ScaledOptions


def plus_and_minus(values: Tensor, size: int) -> Tensor:
    """Return `(v, -v, v, -v, ...)` for each of `values`, `[..., size]`."""
    signs = 1 - 2 * (torch.arange(size, device=values.device) % 2)
    return values[..., None] * signs


@dataclass(frozen=True)
class IndexOptions(ScaledOptions):
    """Options of `index`: those of `ScaledOptions`."""

    scheme: ClassVar[str] = "index"

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedIndexOptions:
        """Write out the scale, over positions 0 to `trained_length - 1`."""

        def unscaled() -> Tensor:
            return torch.arange(max(geometry.trained_length, 2), device="cpu")

        return self.written_out(ResolvedIndexOptions, native, scale=self.matching_scale(native, unscaled))


@dataclass(frozen=True, kw_only=True)
class ResolvedIndexOptions(IndexOptions):
    """`IndexOptions` as they are used and saved."""

    scale: float


@SCHEMES.register("index")
class Index(Scheme):
    """`x_i = token_i + scale * (i, -i, i, -i, ...)`.

    Start on a pretrained model: `scale="match"`.
    """

    Options = IndexOptions
    summary = "the position itself in every dimension: the naive first try"

    options: ResolvedIndexOptions

    def encode(self, position_ids: Tensor) -> Tensor:
        """Return plus and minus `scale * position`, float32; see `Scheme.encode`."""
        return plus_and_minus(position_ids.float() * self.options.scale, self.geometry.input_size)
