"""ReRoPE: rotary positions whose distances stop growing at a window, at inference.

Su Jianlin, "Rectified Rotary Position Embeddings" (2023, kexue.fm/archives/9708 and its code): distances below a window W are
rotary's own, all others count as W.

Differs from the source: its code also scales queries by `max(1, log(n) / log(trained_length))`; here that is `logit_scale="log_n"`,
which every scheme takes. Defined for causal attention.

`python -m pe_swap show rerope` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.windowed_rope import FastWindowedRope, ResolvedWindowedRopeOptions, WindowedRope, WindowedRopeOptions


@dataclass(frozen=True)
class ReRopeOptions(WindowedRopeOptions):
    """Options of `rerope`: those of every remapping of rotary positions."""

    scheme: ClassVar[str] = "rerope"

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedReRopeOptions:
        """Return the options with the window written out."""
        return self.written_out(ResolvedReRopeOptions, native, window=max(1, geometry.trained_length // 2))


@dataclass(frozen=True, kw_only=True)
class ResolvedReRopeOptions(ResolvedWindowedRopeOptions, ReRopeOptions):
    """`ReRopeOptions` as they are used and saved."""


class ReRope(WindowedRope):
    """`query_i . key_j` at distance `min(i - j, W)`.

    Start on a pretrained model: that of `rope`. Made for a model already trained with `rope`: swap to `rope`, train, and swap to
    `rerope` with the same base, layout and fraction for longer input; it has no parameters.
    """

    Options = ReRopeOptions
    summary = "rope with distances that stop at a window, at inference"

    options: ResolvedReRopeOptions

    def remapped(self, position_ids: Tensor, role: Literal["query", "key"]) -> Tensor:
        """Return W for queries and 0 for keys; see `WindowedRope.remapped`."""
        return torch.full_like(position_ids, self.window if role == "query" else 0)


# --- Faster forms of the same numbers ---


@SCHEMES.register("rerope")
class FastReRope(FastWindowedRope, ReRope):
    """`ReRope` over the keys that can be distant; see `FastWindowedRope`."""
