"""Rotary position embedding.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021, arXiv:2104.09864), equation 34: queries and keys
are turned by `position * theta_k` in each of `head_dim / 2` planes, `theta_k = base ** (-2k / head_dim)`, so that their product
depends on the difference of positions.

Differs from the paper: which dimensions share a plane is a matter of layout. `interleaved` is the paper's (2k with 2k + 1; GPT-J,
RoFormer), `half` pairs k with k + head_dim / 2 (GPT-NeoX, Llama). They are equal up to a permutation of the projections' rows.
`fraction` turns the first dimensions only, as GPT-J and GPT-NeoX do, with the turned dimensions in place of `head_dim` in theta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pe_swap.errors import OptionError
from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.sinusoidal import inverse_frequencies


@dataclass(frozen=True)
class RopeOptions(SchemeOptions):
    """Options of `rope`.

    Attributes:
        base: the slowest plane turns by nearly `1 / base` radians a position.
        layout: `"half"` or `"interleaved"`: which dimensions share a plane.
        fraction: share of each head's dimensions that turn.
    """

    scheme: ClassVar[str] = "rope"

    base: float = 10000
    layout: str = "half"
    fraction: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("base", 1.0, 1e12)
        self.require_choice("layout", ("half", "interleaved"))
        self.require_number("fraction", 0.0, 1.0)


def turn(x: Tensor, cosine: Tensor, sine: Tensor, layout: str) -> Tensor:
    """Return `x` turned in planes of two dimensions.

    Args:
        x: `[batch, heads, length, rotary_dim]`.
        cosine: `[batch or 1, 1, length, rotary_dim / 2]`, float32, of each plane's angle.
        sine: the same shape.
        layout: `"half"` or `"interleaved"`.

    Returns:
        The shape and dtype of `x`; computed in at least float32.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    # x * cos + partner * sin, the partner's sine negative in a plane's first dimension: three passes over memory.
    if layout == "half":
        partner = wide.roll(wide.shape[-1] // 2, dims=-1)
        cosine, sine = torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)
    else:
        partner = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        cosine, sine = cosine.repeat_interleave(2, dim=-1), torch.stack((-sine, sine), dim=-1).flatten(-2)
    return torch.addcmul(wide * cosine, partner, sine.to(wide.dtype)).to(x.dtype)


@SCHEMES.register("rope")
class Rope(Scheme):
    """`query_i . key_j` with both turned by their positions: it depends on `i - j`.

    Start on a pretrained model: none preserves the function, as projections trained without rotation meet one.
    """

    Options = RopeOptions
    summary = "queries and keys turned by their position"
    shift_invariant = True

    options: RopeOptions

    def __init__(self, options: RopeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Check that the turned dimensions make whole planes."""
        super().__init__(options, geometry, layers)
        exact = geometry.head_dim * options.fraction
        rotary_dim = round(exact)  # 0.58 of 100 is 57.99999999999999 in floating point
        if abs(exact - rotary_dim) > 1e-6 or rotary_dim < 2 or rotary_dim % 2:
            raise OptionError(
                f"rope: head_dim {geometry.head_dim} x fraction {options.fraction} gives {exact:g} rotary dimensions; they must be "
                "an even integer of at least 2, as dimensions turn in pairs. Choose another fraction (1.0 needs an even head_dim)."
            )
        self.rotary_dim = rotary_dim

    def angles(self, position_ids: Tensor) -> Tensor:
        """Return `position * theta_k`, radians, `[batch or 1, 1, length, rotary_dim / 2]`, float32.

        theta is computed in float64 and rounded to float32, and so is its product with a position: two roundings. transformers' own
        rotary models compute theta in float32.
        """
        inv_freq = inverse_frequencies(self.rotary_dim, self.options.base).float().to(position_ids.device)
        return position_ids[:, None, :, None].float() * inv_freq

    def rotate(self, x: Tensor, position_ids: Tensor, *, role: Literal["query", "key"], layer: int) -> Tensor:
        """Return `x` turned by its positions; see `Scheme.rotate`."""
        angles = self.angles(position_ids)
        cosine, sine = angles.cos(), angles.sin()
        if self.rotary_dim == x.shape[-1]:
            return turn(x, cosine, sine, self.options.layout)
        turned = turn(x[..., : self.rotary_dim], cosine, sine, self.options.layout)
        return torch.cat((turned, x[..., self.rotary_dim :]), dim=-1)
