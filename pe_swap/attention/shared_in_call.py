"""What every layer of one forward pass needs alike: position ids, and results that are computed once.

Sines of positions, biases of distances and indices of slots are the same in every layer. For a token decoded with a cache they take
longer than attention itself, so the layers after the first reuse its results.

The object lives as long as one call of the base model and travels in its keyword arguments. Nothing is kept in a module: another
thread, a position tensor changed in place or a deep copy would find stale results there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

ARGUMENT = "pe_swap_shared"
"""The keyword argument it travels in."""

Result = TypeVar("Result")


def as_rows(position_ids: Tensor) -> Tensor:
    """Return position ids as `[batch or 1, length]`, int64; a caller may give them without a batch dimension."""
    return position_ids.long() if position_ids.dim() > 1 else position_ids.long()[None]


class SharedInCall:
    """What the layers of one forward pass share.

    Attributes:
        position_ids: `[batch or 1, q_len]`, int64, 0-based as the family counts them; None where no hook computed them, and slots are
            the ids. On a grid `[batch or 1, q_len, axes]`.
        sides: rows and columns of the grid; empty where tokens stand in a row.
    """

    def __init__(self, position_ids: Tensor | None = None, *, shares: bool = True, sides: tuple[int, ...] = ()) -> None:
        """Start with no results.

        Args:
            position_ids: as the attribute, or `[q_len]`.
            shares: False where every layer shall compute everything itself.
            sides: as the attribute.
        """
        self.sides = sides
        self.position_ids = None if position_ids is None else as_rows(position_ids)
        self._shares = shares
        self._results: dict[Hashable, tuple[Any, tuple[Tensor, ...]]] = {}

    def get(self, key: Hashable, inputs: tuple[Tensor, ...], compute: Callable[[], Result]) -> Result:
        """Return `compute()`, or the result of an earlier layer for the same `key` and `inputs`.

        Nothing is shared with gradients: a layer that is trained keeps a graph of its own, and may run again for its gradients.

        Args:
            key: names the result.
            inputs: the tensors it depends on, compared by identity. They are kept, so that no other tensor can take their identity in
                the meantime.
            compute: a function of `key` and `inputs` alone.
        """
        if torch.is_grad_enabled() or not self._shares or torch.compiler.is_compiling():
            return compute()
        whole_key = (key, *map(id, inputs))
        if whole_key not in self._results:
            self._results[whole_key] = (compute(), inputs)
        result: Result = self._results[whole_key][0]
        return result

    def constant(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """Return `compute()`, or the result of an earlier layer for the same `key`; for results without a gradient.

        Nothing is shared under a compiler, which removes the repetition itself.

        Args:
            key: names the result.
            compute: a function of `key` and of the call's position ids.
        """
        if not self._shares or torch.compiler.is_compiling():
            return compute()
        if key not in self._results:
            self._results[key] = (compute(), ())
        result: Result = self._results[key][0]
        return result


NOTHING_SHARED = SharedInCall(shares=False)
"""For a call of a part of the model, which no hook gave an object of its own."""
