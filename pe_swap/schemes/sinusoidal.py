"""Sinusoidal absolute positions.

Vaswani et al., "Attention Is All You Need" (2017, arXiv:1706.03762), section 3.5:
`PE[p, 2k] = sin(p / 10000^(2k / hidden_size))`, `PE[p, 2k + 1] = cos(p / 10000^(2k / hidden_size))`.

Differs from the paper: the vectors are scaled. The paper multiplies token embeddings by `sqrt(hidden_size)` instead; a pretrained
model's are small, and unscaled vectors (root mean square 0.71, norm 19.6 at 768) would drown them. The layout `split`, all sines
before all cosines, is that of tensor2tensor, Marian and RoFormer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pe_swap.errors import OptionError
from pe_swap.schemes.base import SCHEMES, Geometry, Scheme, root_mean_square
from pe_swap.schemes.options import SchemeOptions


@dataclass(frozen=True)
class SinusoidalOptions(SchemeOptions):
    """Options of `sinusoidal`.

    Attributes:
        base: the longest wavelength is nearly `2 pi base`, in positions.
        layout: `"interleaved"`, sine and cosine of a frequency side by side, or `"split"`, all sines first.
        scale: factor on the vectors; `"match"` gives them the root mean square of the table they replace.
    """

    scheme: ClassVar[str] = "sinusoidal"

    base: float = 10000
    layout: str = "interleaved"
    scale: float | str = "match"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("base", 1.0, 1e12)
        self.require_choice("layout", ("interleaved", "split"))
        self.require_number("scale", 0.0, 1e6, or_text=("match",))

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> SinusoidalOptions:
        """Write out the scale: the table's root mean square over that of sines and cosines, `sqrt(1/2)`."""
        if self.scale != "match":
            return self
        return replace(self, scale=matching_scale(self, position_table, math.sqrt(0.5)))


def matching_scale(options: SchemeOptions, position_table: Tensor | None, unscaled: float) -> float:
    """Return the factor that gives vectors of root mean square `unscaled` the size of `position_table`.

    Raises:
        OptionError: there is no table to match.
    """
    if position_table is None:
        raise OptionError(
            f"{options.scheme}: option 'scale' is 'match', but this model was loaded already swapped and has no table left to match. "
            "Give a number, or swap the model it was made from."
        )
    return root_mean_square(position_table) / unscaled


def inverse_frequencies(size: int, base: float) -> Tensor:
    """Return `base ** (-2k / size)` for k from 0 to `ceil(size / 2) - 1`, in radians per position, float64."""
    return base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def sinusoids(position_ids: Tensor, size: int, base: float, layout: str) -> Tensor:
    """Return `[..., size]` float32 sines and cosines of `position_ids`, `[...]`.

    Angles are float64 until the sine is taken: in float32, one at position 100,000 would be off by up to 0.004 radians.
    For an odd `size` the last frequency has a sine only.
    """
    inv_freq = inverse_frequencies(size, base).to(position_ids.device)
    angles = position_ids[..., None].to(torch.float64) * inv_freq
    sine, cosine = angles.sin().float(), angles.cos().float()
    if layout == "split":
        return torch.cat((sine, cosine[..., : size // 2]), dim=-1)
    return torch.stack((sine, cosine), dim=-1).flatten(-2)[..., :size]


@SCHEMES.register("sinusoidal")
class Sinusoidal(Scheme):
    """`x_i = token_i + scale * PE[i]`.

    Start on a pretrained model: `scale="match"`, the size of the vectors that the model is used to. Not function-preserving.
    """

    Options = SinusoidalOptions
    summary = "sines and cosines of the position, added to the tokens"

    options: SinusoidalOptions

    def encode(self, position_ids: Tensor) -> Tensor:
        """Return the scaled sinusoids, float32; see `Scheme.encode`."""
        options = self.options
        vectors = sinusoids(position_ids, self.geometry.hidden_size, options.base, options.layout)
        return vectors * float(options.scale)
