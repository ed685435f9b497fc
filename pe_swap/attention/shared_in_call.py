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
from torch import Tensor, nn

ARGUMENT = "positional_memo"
"""The keyword argument it travels in."""

Found = TypeVar("Found")


class SharedInCall:
    """Results of one forward pass without gradients."""

    def __init__(self) -> None:
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
        whole_key = (key, *map(id, of))
        if whole_key not in self._found:
            self._found[whole_key] = (work_out(), of)
        found: Found = self._found[whole_key][0]
        return found


class NothingShared(SharedInCall):
    """Nothing is kept: under a compiler, which sees the repetition itself, and in a call of a part of the model."""

    def once(self, key: Hashable, of: tuple[Tensor, ...], work_out: Callable[[], Found]) -> Found:
        """Return what `work_out` gives."""
        return work_out()


NOTHING_SHARED = NothingShared()


def start_sharing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a call of the base model an empty memo, unless it brings one; a forward pre-hook."""
    if ARGUMENT in kwargs or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return args, kwargs
    return args, {**kwargs, ARGUMENT: SharedInCall()}
