"""ReRoPE: rotary positions whose distances stop growing at a window, at inference.

Su Jianlin, "Rectified Rotary Position Embeddings" (2023, kexue.fm/archives/9708 and its code): distances below a window W are
rotary's own, all others count as W.

Differs from the source: its code also scales queries by `max(1, log(n) / log(trained_length))`; here that is `logit_scale="log_n"`,
which every scheme takes. Defined for causal attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES
from pe_swap.schemes.self_extend import WindowedRope, WindowedRopeOptions


@dataclass(frozen=True)
class ReRopeOptions(WindowedRopeOptions):
    """Options of `rerope`: those of every remapping of rotary positions."""

    scheme: ClassVar[str] = "rerope"


@SCHEMES.register("rerope")
class ReRope(WindowedRope):
    """`query_i . key_j` at distance `min(i - j, W)`.

    Start on a pretrained model: that of `rope`. Made for a model already trained with `rope`: swap to `rope`, train, and swap to
    `rerope` with the same base, layout and fraction for longer input; it has no parameters.
    """

    Options = ReRopeOptions
    summary = "rope with distances that stop at a window, at inference"
    shift_invariant = True

    options: ReRopeOptions

    def remapped(self, position_ids: Tensor, role: Literal["query", "key"]) -> Tensor:
        """Return W for queries and 0 for keys; see `WindowedRope.remapped`."""
        return torch.full_like(position_ids, self.window if role == "query" else 0)
