"""Turning vectors by angles, and what every scheme of turned queries and keys is built from.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021, arXiv:2104.09864), equation 34: dimensions are taken in
planes of two, and plane k is turned by the angle `position * inv_freq[k]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pe_swap.errors import OptionError
from pe_swap.schemes.base import Scheme
from pe_swap.schemes.geometry import Geometry
from pe_swap.schemes.options import LARGEST_BASE, SchemeOptions, native_or

LARGE = 2**16
"""Numbers in a tensor from which on allocating its temporaries costs more than a few more calls (measured on a CPU)."""

LAYOUT_ON_A_GRID = "interleaved"
"""The layout for images where the model has none, and the options name none: that of the code of Heo et al. (ECCV 2024)."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and signed sines; see `rotation_by`."""


def rotation_by(angles: Tensor, layout: str, factor: float = 1.0) -> Rotation:
    """Return what turns a vector by `angles`: for each dimension the factor on itself, and on its partner in the plane.

    Args:
        angles: of each plane, radians, `[batch or 1, 1, length, rotary_dim / 2]`, float32.
        layout: `"half"` (k with k + rotary_dim / 2) or `"interleaved"` (2k with 2k + 1): which dimensions share a plane.
        factor: on both.

    Returns:
        Cosines, and sines that are negative in a plane's first dimension, `[batch or 1, 1, length, rotary_dim]` each, float32.
    """
    cosine, sine = angles.cos(), angles.sin()
    if factor != 1.0:
        cosine, sine = cosine * factor, sine * factor
    if layout == "half":
        return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)
    return cosine.repeat_interleave(2, dim=-1), torch.stack((-sine, sine), dim=-1).flatten(-2)


def turn(x: Tensor, rotation: Rotation, layout: str) -> Tensor:
    """Return `x` turned in planes of two dimensions: `(a, b)` becomes `(a cos - b sin, b cos + a sin)`.

    Args:
        x: `[batch, heads, length, head_dim]`; dimensions beyond those of `rotation` stay as they are.
        rotation: see `rotation_by`.
        layout: `"half"` or `"interleaved"`: which dimensions share a plane.

    Returns:
        The shape and dtype of `x`; computed in at least float32.
    """
    cosine, signed_sine = rotation  # [batch or 1, 1, length, rotary_dim] each
    rotary_dim = cosine.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat((turn(x[..., :rotary_dim], rotation, layout), x[..., rotary_dim:]), dim=-1)
    if x.dtype != cosine.dtype:  # a comparison costs a small call less than a cast that has nothing to do
        if x.dtype.itemsize < 4:
            return turn(x.float(), rotation, layout).to(x.dtype)
        cosine, signed_sine = cosine.to(x.dtype), signed_sine.to(x.dtype)
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # type: ignore[attr-defined, no-untyped-call]
        if layout == "interleaved":
            return turn_as_complex(x, cosine, signed_sine)
        if x.numel() >= LARGE and not (torch.is_grad_enabled() and x.requires_grad):
            return turn_halves_in_one_buffer(x, cosine, signed_sine)
    # each dimension's partner, [batch, heads, length, rotary_dim]
    partner = (
        x.roll(rotary_dim // 2, dims=-1)
        if layout == "half"
        else x.reshape(*x.shape[:-1], rotary_dim // 2, 2).flip(-1).flatten(-2)
    )
    return torch.addcmul(x * cosine, partner, signed_sine)


def turning_dimensions(scheme: str, head_dim: int, fraction: float = 1.0, axes: int = 1) -> int:
    """Return how many dimensions of a head turn: `head_dim * fraction`.

    Args:
        scheme: the scheme's name, for errors.
        head_dim: width of a head.
        fraction: share of it that turns.
        axes: axes that share the planes equally.

    Raises:
        OptionError: they do not make whole planes, as many per axis.
    """
    exact = head_dim * fraction
    rotary_dim = round(exact)  # 0.58 of 100 is 57.99999999999999 in floating point
    if abs(exact - rotary_dim) > 1e-6 or rotary_dim < 2 * axes or rotary_dim % (2 * axes):
        rule = "an even integer of at least 2, as dimensions turn in pairs"
        if axes > 1:
            rule = f"a multiple of {2 * axes}, as dimensions turn in pairs, as many by each of {axes} axes"
        raise OptionError(
            f"{scheme}: head_dim {head_dim} x fraction {fraction} gives {exact:g} rotary dimensions; they must be {rule}. Choose another "
            "fraction, or a scheme that adds a bias."
        )
    return rotary_dim


@dataclass(frozen=True)
class RotaryOptions(SchemeOptions):
    """What every scheme of turned queries and keys takes. Left out, a rotary model's own values are taken.

    Attributes:
        base: the slowest plane turns by nearly `1 / base` radians per position.
        layout: `"half"` or `"interleaved"`: which dimensions share a plane. `"half"` in a row of tokens, `"interleaved"` in images.
    """

    base: float | None = field(default=None, metadata=native_or(10000))
    layout: str | None = field(default=None, metadata=native_or("half"))

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("base", 1.0, LARGEST_BASE)
        self.require_choice("layout", ("half", "interleaved"))


@dataclass(frozen=True, kw_only=True)
class ResolvedRotaryOptions(RotaryOptions):
    """`RotaryOptions` as they are used and saved."""

    base: float
    layout: str


class RotaryScheme(Scheme):
    """Queries and keys turned by `position * inv_freq`, in planes of two dimensions.

    On a grid each axis has an equal share of the planes, one axis after the other, with the same frequencies (axial rotation; Heo et
    al., "Rotary Position Embedding for Vision Transformer", ECCV 2024, arXiv:2403.13298, section 3.2). Tokens that stand nowhere are not
    turned.

    Attributes:
        rotary_dim: dimensions of a head that turn.
        attention_factor: on sine and cosine.
    """

    shift_invariant = True
    keeps_mean = True

    options: ResolvedRotaryOptions

    def __init__(
        self,
        options: ResolvedRotaryOptions,
        geometry: Geometry,
        layers: tuple[int, ...],
        inv_freq: Tensor,
        attention_factor: float = 1.0,
    ) -> None:
        """Keep the frequencies as numbers: there is nothing that a reload or a move to another device could lose.

        Args:
            options: as `Scheme`.
            geometry: as `Scheme`.
            layers: as `Scheme`.
            inv_freq: radians per position of each plane of one axis, `[rotary_dim / 2 / axes]`, on the CPU; or a row per axis, where they
                differ.
            attention_factor: on sine and cosine.
        """
        super().__init__(options, geometry, layers)
        self.rotary_dim = 2 * inv_freq.shape[-1] * geometry.axes
        self.attention_factor = attention_factor
        self._inv_freq: list[Any] = inv_freq.float().tolist()

    def inv_freq(self, position_ids: Tensor) -> Tensor:
        """Return the radians per position of each plane, float32, on the device of `position_ids`; their shape is that of `inv_freq`."""
        return torch.tensor(self._inv_freq, dtype=torch.float32, device=position_ids.device)

    def angles(self, position_ids: Tensor) -> Tensor:
        """Return `position * inv_freq`, radians, `[batch or 1, 1, length, rotary_dim / 2]`, float32.

        Frequencies are rounded to float32 once, and their product with a position once more.
        """
        return position_ids[:, None, :, None].float() * self.inv_freq(position_ids)

    def prepare_positions(self, position_ids: Tensor) -> Rotation:
        """Return cosines and signed sines; see `rotation_by` and `Scheme.prepare_positions`."""
        return rotation_by(self.angles(position_ids), self.options.layout, self.attention_factor)

    def coordinates(self, position_ids: Tensor, sides: tuple[int, ...]) -> Tensor:
        """Return what frequencies are multiplied by on a grid, `[batch or 1, length, axes]`, float32: row and column, counted from 0."""
        return position_ids.float()

    def angles_on_grid(self, position_ids: Tensor, sides: tuple[int, ...]) -> Tensor:
        """Return `coordinate * inv_freq`, the planes of the first axis first, radians, `[batch or 1, 1, length, rotary_dim / 2]`, float32.

        The angle is 0 for a token that stands nowhere, whose ids are -1.
        """
        angles = self.coordinates(position_ids, sides)[..., None] * self.inv_freq(position_ids)
        return angles.masked_fill(position_ids[..., None] < 0, 0.0).flatten(-2)[:, None]

    def prepare_grid(self, position_ids: Tensor, sides: tuple[int, ...]) -> Rotation:
        """Return cosines and signed sines; see `rotation_by` and `Scheme.prepare_grid`."""
        return rotation_by(self.angles_on_grid(position_ids, sides), self.options.layout, self.attention_factor)

    def transform_query_key(self, x: Tensor, prepared: Rotation, *, role: Literal["query", "key"], layer: int) -> Tensor:
        """Return `x` turned by its positions; see `Scheme.transform_query_key`."""
        return turn(x, prepared, self.options.layout)


# --- Faster forms of the same numbers ---


def turn_as_complex(x: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """Return what `turn` does in the layout `"interleaved"`: a plane is a complex number, times `cos + i sin`.

    One pass over `x` instead of three. Compilers and tracers have no complex numbers.
    """
    if x.storage_offset() % 2 or x.stride(-1) != 1 or any(stride % 2 for stride in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
    rotation = torch.complex(cosine[..., ::2], signed_sine[..., 1::2])
    return torch.view_as_real(torch.view_as_complex(x.view(*x.shape[:-1], x.shape[-1] // 2, 2)) * rotation).flatten(-2)


def turn_halves_in_one_buffer(x: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """Return what `turn` does in the layout `"half"`, with one allocation instead of three.

    Its backward pass, and its small calls, would be slower.
    """
    half = x.shape[-1] // 2
    out = x * cosine
    out[..., :half].addcmul_(x[..., half:], signed_sine[..., :half])
    out[..., half:].addcmul_(x[..., :half], signed_sine[..., half:])
    return out
