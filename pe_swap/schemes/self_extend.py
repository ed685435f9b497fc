"""Self-Extend: rotary positions, with distant ones counted in groups, at inference.

Jin et al., "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning" (ICML 2024, arXiv:2401.01325), section 3.2: keys nearer
than a window keep their distance; beyond, positions are divided by the group size and rounded down, and shifted so that both parts
join: `floor(i / G) - floor(j / G) + W - floor(W / G)`.

Differs from the paper: none. Defined for causal attention.

`python -m pe_swap show self_extend` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import LARGEST_LENGTH
from pe_swap.schemes.windowed_rope import FastWindowedRope, ResolvedWindowedRopeOptions, WindowedRope, WindowedRopeOptions


def grouped(position_ids: Tensor, group_size: int) -> Tensor:
    """Return `floor(p / G)`."""
    return torch.div(position_ids, group_size, rounding_mode="floor")


@dataclass(frozen=True)
class SelfExtendOptions(WindowedRopeOptions):
    """Options of `self_extend`, beside those of `WindowedRopeOptions`.

    Attributes:
        group_size: positions that share one beyond the window. With a window W, input up to `(trained_length - W) * group_size + W`
            has no distance that training did not have.
    """

    scheme: ClassVar[str] = "self_extend"

    group_size: int = 8

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_int("group_size", 1, LARGEST_LENGTH)

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedSelfExtendOptions:
        """Return the options with the window written out."""
        return self.written_out(ResolvedSelfExtendOptions, native, window=max(1, geometry.trained_length // 2))


@dataclass(frozen=True, kw_only=True)
class ResolvedSelfExtendOptions(ResolvedWindowedRopeOptions, SelfExtendOptions):
    """`SelfExtendOptions` as they are used and saved."""


class SelfExtend(WindowedRope):
    """`query_i . key_j` at distance `n = i - j` below W, else at `floor(i / G) - floor(j / G) + W - floor(W / G)`.

    Which positions share a group depends on the ids themselves: it is not shift-invariant.
    Start on a pretrained model: that of `rope`. Made for a model already trained with `rope`: swap to `rope`, train, and swap to
    `self_extend` with the same base, layout and fraction for longer input; it has no parameters.
    """

    Options = SelfExtendOptions
    summary = "rope with distant positions counted in groups, at inference"
    shift_invariant = False

    options: ResolvedSelfExtendOptions

    def remapped(self, position_ids: Tensor, role: Literal["query", "key"]) -> Tensor:
        """Return `floor(p / G)`, for queries with the shift `W - floor(W / G)`; see `WindowedRope.remapped`."""
        group_size = self.options.group_size
        shift = self.window - self.window // group_size if role == "query" else 0
        return grouped(position_ids, group_size) + shift


# --- Faster forms of the same numbers ---


@SCHEMES.register("self_extend")
class FastSelfExtend(FastWindowedRope, SelfExtend):
    """`SelfExtend` over the keys that can be distant; see `FastWindowedRope`."""
