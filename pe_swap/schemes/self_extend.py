"""Self-Extend: rotary positions, with distant ones counted in groups, at inference.

Jin et al., "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning" (ICML 2024, arXiv:2401.01325), section 3.2: keys nearer
than a window keep their distance; beyond, positions are divided by the group size and rounded down, and shifted so that both parts
meet: `floor(i / G) - floor(j / G) + W - floor(W / G)`.

Differs from the paper: none. Defined for causal attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES, FoldedBias, Geometry, Scheme
from pe_swap.schemes.options import LARGEST_LENGTH, SchemeOptions
from pe_swap.schemes.positions import Positions
from pe_swap.schemes.rope import Rope, RopeOptions


@dataclass(frozen=True)
class WindowedRopeOptions(SchemeOptions):
    """What every remapping of rotary positions takes.

    Attributes:
        window: distance from which on keys are remapped, in positions; `"match"` takes half the trained length.
        base: as in `rope`.
        layout: as in `rope`.
        fraction: as in `rope`.
    """

    window: int | str = "match"
    base: float = 10000
    layout: str = "half"
    fraction: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if isinstance(self.window, str) and self.window != "match":
            raise self.refuse("window", f"an integer from 1 to {LARGEST_LENGTH:,}, or 'match' (half the trained length)")
        if not isinstance(self.window, str):
            self.require_int("window", 1, LARGEST_LENGTH)
        self.require_number("base", 1.0, 1e12)
        self.require_choice("layout", ("half", "interleaved"))
        self.require_number("fraction", 0.0, 1.0)

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> WindowedRopeOptions:
        """Return the options with the window written out."""
        return replace(self, window=max(1, geometry.trained_length // 2)) if self.window == "match" else self


class WindowedRope(Scheme):
    """Rotary positions whose distances from the window on are remapped by a subclass.

    Queries and keys are turned by their own positions, and so cached. The remapped score of a distant pair comes from the same
    vectors, each turned on from where it stands to where the remapping puts it, in float32; the bias is what that changes. Pairs
    within the window get exactly zero. Beside a single query, in decoding, distant keys are turned to where it should see them, and no
    bias is left.
    """

    causal_only = True

    options: WindowedRopeOptions

    def __init__(self, options: WindowedRopeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the rotation underneath."""
        super().__init__(options, geometry, layers)
        assert isinstance(options.window, int), "options are resolved before a scheme is built"
        self.window = options.window
        rotary = RopeOptions(base=options.base, layout=options.layout, fraction=options.fraction)
        self.rope = Rope(rotary.resolve(geometry, None), geometry, layers)

    def remapped(self, position_ids: Tensor, role: Literal["query", "key"]) -> Tensor:
        """Return the positions of queries or keys of distant pairs, the shape of `position_ids`."""
        raise NotImplementedError

    def prepare_positions(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotation to its own positions; see `Scheme.prepare_positions`."""
        return self.rope.prepare_positions(position_ids)

    def transform_query_key(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], *, role: Literal["query", "key"], layer: int
    ) -> Tensor:
        """Return `x` turned by its own positions; see `Scheme.transform_query_key`."""
        return self.rope.transform_query_key(x, rotation, role=role, layer=layer)

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return what remapping changes, zero within the window; see `Scheme.score_bias`."""
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        bias = torch.zeros(*query.shape[:3], key.shape[2], dtype=wide, device=query.device)
        distant = self.count_distant(key)
        if not distant:
            return bias
        query, key, key_ids = query.to(wide), key[:, :, :distant].to(wide), positions.key_ids[:, :distant]
        query_turn = self.rope.prepare_positions(self.remapped(positions.query_ids, "query") - positions.query_ids)
        key_turn = self.rope.prepare_positions(self.remapped(key_ids, "key") - key_ids)
        far_query = self.rope.transform_query_key(query, query_turn, role="query", layer=layer)
        far_key = self.rope.transform_query_key(key, key_turn, role="key", layer=layer)
        change = torch.matmul(far_query, far_key.transpose(-1, -2)) - torch.matmul(query, key.transpose(-1, -2))
        is_near = positions.distance[:, :distant] > -self.window
        return torch.cat((change.masked_fill(is_near, 0.0) * scaling, bias[..., distant:]), dim=-1)

    def fold_bias_into_query_key(
        self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int
    ) -> FoldedBias | None:
        """Return both as they are where no pair is distant, and distant keys turned on beside one query; see the base class."""
        if not self.count_distant(key):
            return query, key, None
        if query.shape[2] > 1:
            return None

        def rotation() -> Any:
            key_ids, query_ids = positions.key_ids, positions.query_ids
            seen_from = query_ids - self.remapped(query_ids, "query") + self.remapped(key_ids, "key")
            return self.rope.prepare_positions((seen_from - key_ids).masked_fill(positions.distance > -self.window, 0))

        turn = positions.share_across_layers((self.options, "turn"), rotation)  # near keys turn by nothing: one pass serves all
        return query, self.rope.transform_query_key(key, turn, role="key", layer=layer), None

    def count_distant(self, key: Tensor) -> int:
        """Return how many keys, from the first, can be distant from a query that may look at them: all but those within the window.

        No query stands after the last slot.
        """
        return max(0, key.shape[2] - self.window)


@dataclass(frozen=True)
class SelfExtendOptions(WindowedRopeOptions):
    """Options of `self_extend`.

    Attributes:
        group_size: positions that share one beyond the window. With a window W, input up to `(trained_length - W) * group_size + W`
            meets no distance that training did not.
    """

    scheme: ClassVar[str] = "self_extend"

    group_size: int = 8

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_int("group_size", 1, LARGEST_LENGTH)


@SCHEMES.register("self_extend")
class SelfExtend(WindowedRope):
    """`query_i . key_j` at distance `n = i - j` below W, else at `floor(i / G) - floor(j / G) + W - floor(W / G)`.

    Which positions share a group depends on the ids themselves: it is not shift-invariant.
    Start on a pretrained model: that of `rope`. Made for a model already trained with `rope`: swap to `rope`, train, and swap to
    `self_extend` with the same base, layout and fraction for longer input; it has no parameters.
    """

    Options = SelfExtendOptions
    summary = "rope with distant positions counted in groups, at inference"

    options: SelfExtendOptions

    def remapped(self, position_ids: Tensor, role: Literal["query", "key"]) -> Tensor:
        """Return `floor(p / G)`, for queries with the shift; see `WindowedRope.remapped`."""
        group = self.options.group_size
        shift = self.window - self.window // group if role == "query" else 0
        return torch.div(position_ids, group, rounding_mode="floor") + shift
