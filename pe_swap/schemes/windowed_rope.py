"""Rotary positions whose distances are remapped from a window on: what `self_extend` and `rerope` share.

Pairs nearer than a window W have rotary's own scores. All others get the score at another distance, which the subclass says by giving
queries and keys of distant pairs other positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pe_swap.schemes.base import FoldedBias
from pe_swap.schemes.geometry import Geometry
from pe_swap.schemes.options import LARGEST_LENGTH, MATCH, native_or
from pe_swap.schemes.parameters import at_least_float32
from pe_swap.schemes.positions import Positions
from pe_swap.schemes.rotary import ResolvedRotaryOptions, RotaryOptions, RotaryScheme, turning_dimensions
from pe_swap.schemes.sinusoids import inverse_frequencies


@dataclass(frozen=True)
class WindowedRopeOptions(RotaryOptions):
    """What every remapping of rotary positions takes, beside `RotaryOptions`.

    Attributes:
        window: distance from which on keys are remapped, in positions; `"match"` takes half the trained length.
        fraction: share of each head's dimensions that turn, as in `rope`.
    """

    window: int | str = MATCH
    fraction: float | None = field(default=None, metadata=native_or(1.0))

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if isinstance(self.window, str) and self.window != MATCH:
            raise self.refuse("window", f"an integer from 1 to {LARGEST_LENGTH:,}, or 'match' (half the trained length)")
        self.require_int("window", 1, LARGEST_LENGTH, or_text=(MATCH,))
        self.require_number("fraction", 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ResolvedWindowedRopeOptions(ResolvedRotaryOptions, WindowedRopeOptions):
    """`WindowedRopeOptions` as they are used and saved."""

    window: int
    fraction: float


class WindowedRope(RotaryScheme):
    """Rotary positions whose distances from the window on are remapped by a subclass.

    Queries and keys are turned by their own positions, and cached so. The remapped score of a distant pair comes from the same
    vectors, each rotated further, from its own position to its remapped position, in float32; the bias is the difference. Pairs
    within the window get exactly zero.
    """

    causal_only = True

    options: ResolvedWindowedRopeOptions

    def __init__(self, options: ResolvedWindowedRopeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Work out the frequencies of the rotation.

        Raises:
            OptionError: dimensions that do not make whole planes.
        """
        rotary_dim = turning_dimensions(options.scheme, geometry.head_dim, options.fraction)
        super().__init__(options, geometry, layers, inverse_frequencies(rotary_dim, options.base))
        self.window = options.window

    def remapped(self, position_ids: Tensor, role: Literal["query", "key"]) -> Tensor:
        """Return the positions of queries or keys of distant pairs, the shape of `position_ids`."""
        raise NotImplementedError

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return `remapped score - own score` of distant pairs, and zero within the window; see `Scheme.score_bias`."""
        dtype = at_least_float32(query.dtype)
        query, key = query.to(dtype), key.to(dtype)
        far_query = self.turned_further(query, positions.query_ids, role="query", layer=layer)
        far_key = self.turned_further(key, positions.key_ids, role="key", layer=layer)
        change = torch.matmul(far_query, far_key.transpose(-1, -2)) - torch.matmul(query, key.transpose(-1, -2))
        return change.masked_fill(positions.distance > -self.window, 0.0) * scaling

    def turned_further(self, x: Tensor, position_ids: Tensor, *, role: Literal["query", "key"], layer: int) -> Tensor:
        """Return `x`, turned by its own positions already, turned by its remapped ones."""
        rotation = self.prepare_positions(self.remapped(position_ids, role) - position_ids)
        return self.transform_query_key(x, rotation, role=role, layer=layer)


# --- Faster forms of the same numbers ---


class FastWindowedRope(WindowedRope):
    """`WindowedRope` over those keys alone that can be distant; with a single query, in decoding, without a bias.

    A subclass has this before the class whose distances it speeds up.
    """

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias; see `WindowedRope.score_bias`."""
        distant = self.distant_keys(key)
        bias = torch.zeros(*query.shape[:3], key.shape[2], dtype=at_least_float32(query.dtype), device=query.device)
        if not distant:
            return bias
        there = positions.block(0, query.shape[2], distant)
        change = super().score_bias(query, key[:, :, :distant], there, scaling=scaling, layer=layer)
        return torch.cat((change, bias[..., distant:]), dim=-1)

    def fold_bias_into_query_key(
        self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int
    ) -> FoldedBias | None:
        """Return both as they are where no pair is distant, and distant keys turned further for one query; see the base class.

        For a single query, keys can be turned to where its remapped position would have them, so that no bias is left.
        """
        if not self.distant_keys(key):
            return query, key, None
        if query.shape[2] > 1:
            return None

        def rotation() -> Any:
            key_ids, query_ids = positions.key_ids, positions.query_ids
            for_this_query = query_ids - self.remapped(query_ids, "query") + self.remapped(key_ids, "key")
            return self.prepare_positions((for_this_query - key_ids).masked_fill(positions.distance > -self.window, 0))

        turn = positions.share_across_layers((self.options, "turn"), rotation)  # near keys turn by nothing: one pass serves all
        return query, self.transform_query_key(key, turn, role="key", layer=layer), None

    def distant_keys(self, key: Tensor) -> int:
        """Return how many keys, from the first, can be distant from a query that may look at them: all but those within the window.

        No query stands after the last slot.
        """
        return max(0, key.shape[2] - self.window)
