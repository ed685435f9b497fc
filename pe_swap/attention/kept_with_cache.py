"""What a scheme keeps from one call to the next: projections of its weights, and tables of distances.

A token decoded with a cache would work them out again, for the whole table, each time. They are kept for as long as the cache lives,
and no longer; neither the model nor the cache holds them, so that copies and files of either are what they would be.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

Of = tuple[Tensor | Hashable, ...]
"""What a result depends on."""


class Kept:
    """Results by what they are of: weights, told by every one of their numbers, and plain values.

    PyTorch's count of writes would be cheaper to ask than the numbers, and is not kept by fused optimizers, nor by `weight.data`.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[Any, Of]] = {}

    def keep(self, key: Hashable, of: Of, work_out: Callable[[], Any]) -> Any:
        """Return what `work_out` gives, or gave for the same `key` and `of`; another `of` takes its place.

        Args:
            key: what is asked.
            of: what the result depends on besides `key`.
            work_out: a function of `key` and `of` alone.
        """
        if torch.is_grad_enabled():
            return work_out()
        found = self._found.get(key)
        if found is None or len(found[1]) != len(of) or not all(map(is_same, found[1], of)):
            found = work_out(), tuple(x.clone() if isinstance(x, Tensor) else x for x in of)
            self._found[key] = found
        return found[0]


def is_same(x: Tensor | Hashable, y: Tensor | Hashable) -> bool:
    """Tell whether two values are equal; tensors in dtype, device and every number."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y
    return x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)


_KEPT: weakref.WeakKeyDictionary[Cache, Kept] = weakref.WeakKeyDictionary()


def kept_for(cache: Cache | None, first_slot: int | Tensor) -> Kept | None:
    """Return what is kept for a cache, or None where nothing can be: under a compiler or tracer, or where the cache is static.

    An empty cache is the start of something new, and starts with nothing kept.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if cache is None or not isinstance(first_slot, int) or traced:
        return None
    found = _KEPT.get(cache)
    if found is None or first_slot == 0:
        found = _KEPT[cache] = Kept()
    return found
