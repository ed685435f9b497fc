"""The position itself, as a number in every dimension: the first thing one would try.

The straw man of introductions to the subject; no paper proposes it. Values grow without bound, so that beyond the trained length
every vector is one the model has never seen and, far out, the token is lost in it.

Differs from the textbook: scaled, and every second dimension has a minus sign. The same number in every dimension is exactly what
a layer norm subtracts: GPT-2 and BERT would never see it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES, Geometry, Scheme, root_mean_square
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.sinusoidal import matching_scale


@dataclass(frozen=True)
class IndexOptions(SchemeOptions):
    """Options of `index`.

    Attributes:
        scale: factor on the position; `"match"` gives the trained positions the root mean square of the table they replace.
    """

    scheme: ClassVar[str] = "index"

    scale: float | str = "match"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("scale", 0.0, 1e6, or_text=("match",))

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> IndexOptions:
        """Write out the scale, over positions 0 to `trained_length - 1`."""
        if self.scale != "match":
            return self
        unscaled = root_mean_square(torch.arange(max(geometry.trained_length, 2)))
        return replace(self, scale=matching_scale(self, position_table, unscaled))


@SCHEMES.register("index")
class Index(Scheme):
    """`x_i = token_i + scale * (i, -i, i, -i, ...)`.

    Start on a pretrained model: `scale="match"`.
    """

    Options = IndexOptions
    summary = "the position itself in every dimension: the naive first try"

    options: IndexOptions

    def encode(self, position_ids: Tensor) -> Tensor:
        """Return plus and minus `scale * position`, float32; see `Scheme.encode`."""
        values = position_ids.float() * float(self.options.scale)
        signs = 1 - 2 * (torch.arange(self.geometry.hidden_size, device=position_ids.device) % 2)
        return values[..., None] * signs
