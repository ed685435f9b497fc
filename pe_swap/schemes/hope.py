"""HoPE: rotary positions whose slow planes do not turn.

Chen et al., "HoPE: A Novel Positional Encoding Without Long-Term Decay for Enhanced Context Awareness and Extrapolation" (ACL 2025,
arXiv:2410.21216): of RoPE's planes only those of high frequency turn; the components of the others do not depend on the
position. A plane of low frequency does not finish a turn within the trained length, so that longer input has angles that training
never had.

Differs from the paper: none in the rotation; the bound between high and low frequencies is stated here as the longest period that
still turns, in positions, the trained length unless given. The frequencies are RoPE's, of the whole head.

`python -m pe_swap show hope` draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import LARGEST_LENGTH, none_is
from pe_swap.schemes.rotary import LAYOUT_ON_A_GRID, ResolvedRotaryOptions, RotaryOptions, RotaryScheme, turning_dimensions
from pe_swap.schemes.sinusoids import inverse_frequencies


def fast_planes(inv_freq: Tensor, longest_period: float) -> Tensor:
    """Return the frequencies of planes that turn once within `longest_period` positions, and 0 for those that do not."""
    return inv_freq.where(inv_freq >= 2 * math.pi / longest_period, torch.zeros_like(inv_freq))


@dataclass(frozen=True)
class HopeOptions(RotaryOptions):
    """Options of `hope`, beside those of `RotaryOptions`.

    Attributes:
        longest_period: planes that need more positions than this for a full turn do not turn; None is the trained length.
    """

    scheme: ClassVar[str] = "hope"

    longest_period: float | None = field(default=None, metadata=none_is("the trained length"))

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("longest_period", 0.0, LARGEST_LENGTH)
        if self.longest_period is not None and self.longest_period < 2 * math.pi:
            raise self.refuse("longest_period", "at least 2 pi, the period of the fastest plane, or None (the trained length)")

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedHopeOptions:
        """Return the options with the longest period written out; a trained length below 7 leaves the fastest plane turning."""
        values: dict[str, Any] = {"layout": LAYOUT_ON_A_GRID} if geometry.sides else {}
        return self.written_out(ResolvedHopeOptions, native, longest_period=max(float(geometry.longest_side), 7.0), **values)


@dataclass(frozen=True, kw_only=True)
class ResolvedHopeOptions(ResolvedRotaryOptions, HopeOptions):
    """`HopeOptions` as they are used and saved."""

    longest_period: float


@SCHEMES.register("hope")
class Hope(RotaryScheme):
    """`query_i . key_j` with the fast planes of both turned by their positions, and the slow ones as they are.

    Start on a pretrained model: none preserves the function, but the slow planes do: their part of every score is what it was without
    positions.
    """

    Options = HopeOptions
    summary = "rotary positions in the planes of high frequency only"
    on_a_grid = "itself"

    options: ResolvedHopeOptions

    def __init__(self, options: ResolvedHopeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Work out which planes turn.

        Raises:
            OptionError: a head of odd width.
        """
        inv_freq = inverse_frequencies(
            turning_dimensions("hope", geometry.head_dim, axes=geometry.axes) // geometry.axes, options.base
        )
        super().__init__(options, geometry, layers, fast_planes(inv_freq, options.longest_period))
