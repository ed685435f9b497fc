"""The range of a table of positions, for every scheme that has one."""

from __future__ import annotations

import torch
from torch import Tensor

from pe_swap.errors import PositionRangeError


def require_within(position_ids: Tensor, max_length: int, scheme: str) -> None:
    """Refuse positions below 0 and from `max_length` on. Not checked inside a compiled graph.

    Raises:
        PositionRangeError: there is one.
    """
    if torch.compiler.is_compiling() or not position_ids.numel():
        return
    lowest, highest = (int(end) for end in position_ids.aminmax())
    if lowest < 0:
        raise PositionRangeError(
            f"Position {lowest} is below 0, and the scheme '{scheme}' has vectors for 0 to {max_length - 1}. Give position_ids that "
            "count from 0; padding may have any of them."
        )
    if highest >= max_length:
        raise PositionRangeError(
            f"Position {highest} is beyond the {max_length} that the scheme '{scheme}' has vectors for. Shorten the "
            f'input, or swap to a longer table: swap_positional(model, "learned", max_length=...).'
        )
