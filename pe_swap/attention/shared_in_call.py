"""What every layer of one forward pass would work out alike, worked out once.

Sines of positions, biases of distances and indices of slots are the same in every layer. A token decoded with a cache spends longer
on them than on the attention itself, so the first layer's are handed to the others.

A memo lives as long as one call of the base model and travels in its keyword arguments. Nothing is kept in a module, where another
thread, a position tensor changed in place or a deep copy would meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

ARGUMENT = "positional_memo"
"""The keyword argument it travels in."""

Found = TypeVar("Found")


class SharedInCall:
    """Where the tokens of one forward pass stand, and results that its layers share.

    Attributes:
        position_ids: `[batch or 1, q_len]`, int64, counted from 0 as the family counts; None in a call of a part of the model.
    """

    def __init__(self, position_ids: Tensor | None = None, *, shares: bool = True) -> None:
        self.position_ids = position_ids
        self._shares = shares
        self._found: dict[Hashable, tuple[Any, tuple[Tensor, ...]]] = {}

    def once(self, key: Hashable, of: tuple[Tensor, ...], work_out: Callable[[], Found]) -> Found:
        """Return what `work_out` gives, from an earlier layer where one asked the same.

        Args:
            key: what is asked.
            of: the tensors it is asked of: these objects, not others of the same values. They are kept, so that no other tensor can
                take their identity in the meantime.
            work_out: a function of `key` and `of` alone.
        """
        if torch.is_grad_enabled():  # a layer that is trained keeps a graph of its own, and may be run again for its gradients
            return work_out()
        return self.constant((key, *map(id, of)), work_out, of)

    def constant(self, key: Hashable, work_out: Callable[[], Found], of: tuple[Tensor, ...] = ()) -> Found:
        """Return what `work_out` gives, from an earlier layer where one asked the same; for results without a gradient.

        Args:
            key: what is asked; the same in all layers of the call.
            work_out: a function of `key` and of the call's position ids.
            of: tensors that are kept as long as the result.
        """
        if not self._shares or torch.compiler.is_compiling():  # a compiler finds what repeats itself
            return work_out()
        if key not in self._found:
            self._found[key] = (work_out(), of)
        found: Found = self._found[key][0]
        return found


NOTHING_SHARED = SharedInCall(shares=False)
