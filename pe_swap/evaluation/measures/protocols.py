"""Perplexity: which targets are scored, and from which context each is predicted.

A document is tokens `t[0], ..., t[n]`, where `t[0]` is the start token and `t[1]` to `t[n]` are text. The target `t[p]` is predicted
from the inputs `t[start], ..., t[p - 1]` of its window. A window's length is its number of inputs, so a length-L window scores up
to L targets and none is without context. Where the tokenizer begins every text with a token, that token takes the place of every
window's first input: the same targets, each with one token of text less before it.

* nonoverlapping (Press et al., arXiv:2108.12409, section 2): each token is scored once; early targets of a window have little context.
* sliding (ibid., appendix B): each token is scored once; all but the first window score their last `stride` targets only.
* same_targets: the last tokens of each document, the very same at every length, with more and more context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pe_swap.errors import DataError
from pe_swap.evaluation.measures.base import MEASURES, Example, Perplexity
from pe_swap.evaluation.text import Text
from pe_swap.runs.config import MeasureSection


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


class Protocol(Perplexity):
    """A perplexity of models that look back only."""

    fills_longest: ClassVar[bool] = False
    """Whether only documents count that fill the longest length of the evaluation."""

    def windows(self, document: int, size: int, length: int, settings: MeasureSection) -> Iterator[Window]:
        """Yield the windows over a document of `size` tokens, start token included."""
        raise NotImplementedError

    def all_windows(self, sizes: Sequence[int], length: int, settings: MeasureSection) -> list[Window]:
        """Return all windows at a length.

        Args:
            sizes: tokens of each document, start token included.
            length: inputs of a window.
            settings: the evaluation's lengths, `stride` and `targets`.

        Raises:
            DataError: no document is as long as the length, so that a row would say of it what holds for a shorter one.
        """
        needed = max(settings.lengths) if self.fills_longest else length
        if max(sizes, default=1) - 1 < needed:
            raise DataError(
                f"No document has {needed:,} tokens (the longest has {max(sizes, default=1) - 1:,}); {self.name} needs one that fills "
                f"{'the longest length' if self.fills_longest else 'the length'}. Use shorter lengths, or longer documents."
            )
        return [
            window
            for document, size in enumerate(sizes)
            if size - 1 >= (needed if self.fills_longest else 1)
            for window in self.windows(document, size, length, settings)
        ]

    def examples(self, text: Text, length: int) -> list[Example]:
        """Return the inputs and targets of every window."""
        tokens = [[*text.start, *document] for document in text.documents]
        found = []
        for window in self.all_windows([len(document) for document in tokens], length, text.settings):
            document = tokens[window.document]
            inputs = document[window.start : window.stop]
            if text.first_token == "window":
                inputs = [*text.start, *inputs[1:]] if text.start else inputs
            found.append(
                Example(
                    document=window.document,
                    inputs=inputs,
                    targets=document[window.start + 1 : window.stop + 1],
                    scored=[index >= window.first_target for index in range(window.start + 1, window.stop + 1)],
                    tokens=range(window.first_target - len(text.start), window.stop + 1 - len(text.start)),
                )
            )
        return found


@MEASURES.register("nonoverlapping")
class Nonoverlapping(Protocol):
    """Perplexity over windows side by side; each token is scored once (Press et al., arXiv:2108.12409)."""

    name = "nonoverlapping"

    def windows(self, document: int, size: int, length: int, settings: MeasureSection) -> Iterator[Window]:
        """Yield windows side by side; the last may be shorter."""
        for start in range(0, size - 1, length):
            yield Window(document, start, min(start + length, size - 1), start + 1)


@MEASURES.register("sliding")
class Sliding(Protocol):
    """Perplexity over windows `stride` apart, so that every target but the first has much context (ibid., appendix B)."""

    name = "sliding"

    def windows(self, document: int, size: int, length: int, settings: MeasureSection) -> Iterator[Window]:
        """Yield windows `stride` apart; each scores the targets that none before it has scored."""
        stride = settings.stride or max(1, length // 2)
        scored = 1
        stop = min(length, size - 1)
        while scored < size:
            yield Window(document, max(0, stop - length), stop, scored)
            scored = stop + 1
            stop = min(stop + stride, size - 1)


@MEASURES.register("same_targets")
class SameTargets(Protocol):
    """Perplexity of the last tokens of each document, the very same at every length."""

    name = "same_targets"
    fills_longest = True

    def windows(self, document: int, size: int, length: int, settings: MeasureSection) -> Iterator[Window]:
        """Yield the one window that ends with the document and scores its last `targets` tokens."""
        targets = settings.targets or max(1, min(settings.lengths) // 2)
        yield Window(document, size - 1 - length, size - 1, size - targets)
