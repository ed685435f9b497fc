"""What a scheme keeps from one call to the next: projections of its weights, and tables of distances.

A token decoded with a cache would work them out again, for the whole table, each time. They are kept beside the keys, on the cache
object: as long as those, and no longer. Nothing is kept in a module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

ATTRIBUTE = "pe_swap_kept"
"""The attribute of a cache that it stands in."""


class Stamp:
    """A value, or a tensor as it was: the very object, and how often it had been written to."""

    def __init__(self, x: Tensor | Hashable) -> None:
        self._of = (weakref.ref(x), x._version) if isinstance(x, Tensor) else x

    def is_of(self, x: Tensor | Hashable) -> bool:
        """Tell whether `x` is that value, or that tensor unchanged."""
        if not isinstance(x, Tensor):
            return self._of == x
        return isinstance(self._of, tuple) and self._of[0]() is x and self._of[1] == x._version


class Kept:
    """Results by what they are of: weights, told by identity and by how often they were written to, and plain values.

    A copy of the cache, or one that comes out of a file, starts with nothing.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[Any, list[Stamp]]] = {}

    def keep(self, key: Hashable, of: tuple[Tensor | Hashable, ...], work_out: Callable[[], Any]) -> Any:
        """Return what `work_out` gives, or gave for the same `key` and `of`; another `of` takes its place.

        Args:
            key: what is asked.
            of: what the result depends on besides `key`.
            work_out: a function of `key` and `of` alone.
        """
        if torch.is_grad_enabled() or any(isinstance(x, Tensor) and x.is_inference() for x in of):  # those count no writes
            return work_out()
        found = self._found.get(key)
        if found is None or not all(stamp.is_of(x) for stamp, x in zip(found[1], of, strict=True)):
            found = self._found[key] = (work_out(), [Stamp(x) for x in of])
        return found[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        """Return an empty one."""
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        """Pickle as an empty one."""
        return Kept, ()


def kept_beside(cache: Cache | None, first_slot: int | Tensor) -> Kept | None:
    """Return what is kept beside a cache, or None where nothing can be: under a compiler or tracer, or where the cache is static.

    An empty cache is the start of something new, and starts with nothing kept.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if cache is None or not isinstance(first_slot, int) or traced:
        return None
    found: Kept | None = vars(cache).get(ATTRIBUTE)
    if found is None or first_slot == 0:
        found = Kept()
        setattr(cache, ATTRIBUTE, found)
    return found
