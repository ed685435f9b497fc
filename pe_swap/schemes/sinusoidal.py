"""Sinusoidal absolute positions.

Vaswani et al., "Attention Is All You Need" (2017, arXiv:1706.03762), section 3.5:
`PE[p, 2k] = sin(p / 10000^(2k / size))`, `PE[p, 2k + 1] = cos(p / 10000^(2k / size))`. The formula is in `sinusoids.py`.

Differs from the paper: the vectors are scaled. The paper multiplies token embeddings by `sqrt(hidden_size)` instead; a pretrained
model's are small, and unscaled vectors (root mean square 0.71, norm 19.6 at 768) would drown them. The layout `split`, all sines
before all cosines, is that of tensor2tensor, Marian and RoFormer.

`python -m pe_swap show sinusoidal` draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import LARGEST_BASE
from pe_swap.schemes.scaled import ScaledOptions
from pe_swap.schemes.sinusoids import sinusoids


@dataclass(frozen=True)
class SinusoidalOptions(ScaledOptions):
    """Options of `sinusoidal`, beside those of `ScaledOptions`.

    Attributes:
        base: the longest wavelength is nearly `2 pi base`, in positions.
        layout: `"interleaved"`, sine and cosine of a frequency side by side, or `"split"`, all sines first.
    """

    scheme: ClassVar[str] = "sinusoidal"

    base: float = 10000
    layout: str = "interleaved"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("base", 1.0, LARGEST_BASE)
        self.require_choice("layout", ("interleaved", "split"))

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedSinusoidalOptions:
        """Write out the scale: the table's root mean square over that of sines and cosines, `sqrt(1/2)`."""
        return self.written_out(ResolvedSinusoidalOptions, native, scale=self.matching_scale(native, math.sqrt(0.5)))


@dataclass(frozen=True, kw_only=True)
class ResolvedSinusoidalOptions(SinusoidalOptions):
    """`SinusoidalOptions` as they are used and saved."""

    scale: float


@SCHEMES.register("sinusoidal")
class Sinusoidal(Scheme):
    """`x_i = token_i + scale * PE[i]`.

    Start on a pretrained model: `scale="match"`, the size of the vectors that the model is used to. Not function-preserving.
    """

    Options = SinusoidalOptions
    summary = "sines and cosines of the position, added to the tokens"
    on_a_grid = "joined"

    options: ResolvedSinusoidalOptions

    def encode(self, position_ids: Tensor) -> Tensor:
        """Return the scaled sinusoids, float32; see `Scheme.encode`."""
        options = self.options
        return sinusoids(position_ids, self.geometry.input_size, options.base, options.layout) * options.scale
