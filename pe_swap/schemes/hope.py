"""HoPE: rotary positions with the slow planes left standing.

Chen et al., "HoPE: A Novel Positional Encoding Without Long-Term Decay for Enhanced Context Awareness and Extrapolation" (ACL 2025,
arXiv:2410.21216): of RoPE's planes only those of high frequency turn; the components of the others do not depend on the
position. A plane of low frequency does not finish a turn within the trained length, so that longer input shows it angles it has not met.

Differs from the paper: none in the rotation; the bound between high and low frequencies is stated here as the longest period that
still turns, in positions, the trained length unless given. theta is RoPE's, of the whole head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pe_swap.errors import OptionError
from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.options import LARGEST_LENGTH, SchemeOptions
from pe_swap.schemes.rope import rotation_by, turn
from pe_swap.schemes.sinusoidal import inverse_frequencies


@dataclass(frozen=True)
class HopeOptions(SchemeOptions):
    """Options of `hope`.

    Attributes:
        longest_period: planes that need more positions than this for a full turn do not turn; None is the trained length.
        base: as in `rope`.
        layout: `"half"` or `"interleaved"`: which dimensions share a plane.
    """

    scheme: ClassVar[str] = "hope"

    longest_period: float | None = None
    base: float = 10000
    layout: str = "half"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.longest_period is not None:
            self.require_number("longest_period", 0.0, LARGEST_LENGTH)
            if self.longest_period < 2 * math.pi:
                raise self.refuse(
                    "longest_period", "at least 2 pi, the period of the fastest plane, or None (the trained length)"
                )
        self.require_number("base", 1.0, 1e12)
        self.require_choice("layout", ("half", "interleaved"))

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> HopeOptions:
        """Return the options with the longest period written out; a trained length below 7 leaves the fastest plane turning."""
        if self.longest_period is not None:
            return self
        return replace(self, longest_period=max(float(geometry.trained_length), 7.0))


@SCHEMES.register("hope")
class Hope(Scheme):
    """`query_i . key_j` with the fast planes of both turned by their positions, and the slow ones as they are.

    Start on a pretrained model: none preserves the function, but the planes that stand still do: their part of every score is what it
    was without positions.
    """

    Options = HopeOptions
    summary = "rotary positions in the planes of high frequency only"
    shift_invariant = True

    options: HopeOptions

    def __init__(self, options: HopeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Work out which planes turn, as numbers: there is nothing that a reload could lose.

        Raises:
            OptionError: a head of odd width.
        """
        super().__init__(options, geometry, layers)
        if geometry.head_dim % 2:
            raise OptionError(
                f"hope: head_dim is {geometry.head_dim}; it must be even, as dimensions turn in pairs. Choose a scheme that adds a bias."
            )
        assert options.longest_period is not None, "options are resolved before a scheme is built"
        with torch.device("cpu"):  # also where a model is built without memory
            inv_freq = inverse_frequencies(geometry.head_dim, options.base)
            slowest = 2 * math.pi / options.longest_period
            self._inv_freq: list[float] = inv_freq.where(inv_freq >= slowest, 0.0).float().tolist()

    def inv_freq(self, device: torch.device) -> Tensor:
        """Return radians per position of each plane, zero where it stands still, `[head_dim / 2]`, float32."""
        return torch.tensor(self._inv_freq, dtype=torch.float32, device=device)

    def prepare_positions(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines; see `rotation_by` and `Scheme.prepare_positions`."""
        return rotation_by(position_ids[:, None, :, None].float() * self.inv_freq(position_ids.device), self.options.layout)

    def transform_query_key(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], *, role: Literal["query", "key"], layer: int
    ) -> Tensor:
        """Return `x` turned by its positions; see `Scheme.transform_query_key`."""
        return turn(x, rotation, self.options.layout)
