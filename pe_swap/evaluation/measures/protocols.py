"""Which targets are scored, and what each of them sees.

A document is tokens `t[0], ..., t[n]`, where `t[0]` is the start token and `t[1]` to `t[n]` are text. The target `t[p]` is predicted
from the inputs `t[start], ..., t[p - 1]` of its window. A window's length is its number of inputs, so a length-L window scores up
to L targets and none is without context.

* nonoverlapping (Press et al., arXiv:2108.12409, section 2): each token is scored once; early targets of a window see little.
* sliding (ibid., appendix B): each token is scored once; all but the first window score their last `stride` targets only.
* same_targets: the last tokens of each document, the very same at every length, seen with more and more context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pe_swap.errors import DataError


@dataclass(frozen=True)
class Window:
    """One forward pass's worth of a document.

    Attributes:
        document: index of the document.
        start: index of the first input token.
        stop: index after the last input token; `t[stop]` is the last target.
        first_target: index of the first scored target, above `start`.
    """

    document: int
    start: int
    stop: int
    first_target: int


def nonoverlapping(document: int, size: int, length: int) -> Iterator[Window]:
    """Yield windows side by side over a document of `size` tokens, start token included; the last may be shorter."""
    for start in range(0, size - 1, length):
        yield Window(document, start, min(start + length, size - 1), start + 1)


def sliding(document: int, size: int, length: int, stride: int) -> Iterator[Window]:
    """Yield windows `stride` apart; each scores the targets that none before it has scored."""
    scored = 1
    stop = min(length, size - 1)
    while scored < size:
        yield Window(document, max(0, stop - length), stop, scored)
        scored = stop + 1
        stop = min(stop + stride, size - 1)


def same_targets(document: int, size: int, length: int, targets: int) -> Iterator[Window]:
    """Yield the one window that ends with the document and scores its last `targets` tokens."""
    yield Window(document, size - 1 - length, size - 1, size - targets)


def windows(protocol: str, sizes: list[int], length: int, *, stride: int, targets: int, longest: int) -> list[Window]:
    """Return all windows of a protocol at a length.

    Args:
        protocol: `"nonoverlapping"`, `"sliding"` or `"same_targets"`.
        sizes: tokens of each document, start token included.
        length: inputs of a window.
        stride: of `sliding`.
        targets: of `same_targets`.
        longest: the longest length of the whole run; `same_targets` keeps to documents that fill it, the same at every length.

    Raises:
        DataError: no document is as long as the length, so that a row would say of it what holds for a shorter one.
    """
    if max(sizes, default=1) - 1 < length:
        raise DataError(
            f"No document has {length:,} tokens (the longest has {max(sizes, default=1) - 1:,}); {protocol} at a length needs one that "
            "fills it. Use shorter lengths, or longer documents."
        )
    found: list[Window] = []
    for document, size in enumerate(sizes):
        if protocol == "nonoverlapping":
            found += nonoverlapping(document, size, length)
        elif protocol == "sliding":
            found += sliding(document, size, length, min(stride, length))
        elif size - 1 >= longest:
            found += same_targets(document, size, length, targets)
    if not found:
        raise DataError(
            f"No document has the {longest:,} tokens that same_targets needs at the longest length (the longest has "
            f"{max(sizes, default=1) - 1:,}). Use shorter lengths, longer documents, or another protocol."
        )
    return found
