"""What a long context is worth, target by target.

For each target, `gain = loss with the last k tokens - loss with the whole window`, by the same model. The mean hides that most
targets need no long context, so the share of targets whose gain is above 2 nats is given too: these are the key tokens of Fang et
al. ("What is Wrong with Perplexity for Long-context Language Modeling?", arXiv:2410.23771, section 3, alpha = 2), who find them with
another, larger model; here the model itself is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel

from pe_swap.errors import DataError
from pe_swap.evaluation.measures.base import MEASURES, Example, MeasureOptions, Probe, Reading, example_losses
from pe_swap.evaluation.text import Text
from pe_swap.runs.config import PositiveInt

KEY_GAIN = 2.0
"""Nats above which a target is a key token (Fang et al.)."""


class GainOptions(MeasureOptions):
    """Options of `gain`."""

    recent: PositiveInt | None = Field(default=None, description="tokens of the short context; else half the shortest length")
    targets: PositiveInt = Field(default=64, description="at most so many last tokens of each document")


@MEASURES.register("gain")
class Gain(Probe):
    """Loss with the last k tokens minus loss with all, per target: mean, and share of targets above 2 nats (arXiv:2410.23771)."""

    name = "gain"
    Options = GainOptions
    quantities: ClassVar[dict[str, str]] = {
        "mean_gain": "Mean gain, nats",
        "key_share": "Share of targets whose gain is above 2 nats",
    }

    def readings(self, model: PreTrainedModel, text: Text, length: int) -> Iterator[Reading]:
        """Yield the mean gain and the share of key tokens, on the same targets at every length."""
        recent = self.options.recent or max(1, min(text.settings.lengths) // 2)
        shortest, longest = min(text.settings.lengths), max(text.settings.lengths)
        targets = min(self.options.targets, shortest - recent)
        if targets < 1:
            raise DataError(
                f"A short context of {recent:,} tokens leaves no target in a window of {shortest:,}. Set --options.gain.recent lower."
            )
        documents = [[*text.start, *document] for document in text.documents]
        full, short = [], []
        for index, tokens in enumerate(documents):
            if len(tokens) - 1 < longest:
                continue
            full.append(window(text, tokens, index, len(tokens) - 1, length, targets))
            short += [window(text, tokens, index, stop, recent, 1) for stop in range(len(tokens) - targets, len(tokens))]
        if not full:
            raise DataError(
                f"No document has the {longest:,} tokens of the longest length. Use shorter lengths, or longer documents."
            )
        gains = torch.cat(example_losses(model, short, text.settings)[0])
        gains = gains - torch.cat(example_losses(model, full, text.settings)[0])
        yield Reading("mean_gain", float(gains.mean()), len(gains))
        yield Reading("key_share", float((gains > KEY_GAIN).double().mean()), len(gains))


def window(text: Text, tokens: list[int], document: int, stop: int, length: int, targets: int) -> Example:
    """Return the window of `length` inputs before token `stop`, which scores its last `targets` targets."""
    inputs = tokens[stop - length : stop]
    if text.first_token == "window":
        inputs = [*text.start, *inputs[1:]] if text.start else inputs
    return Example(
        document=document,
        inputs=inputs,
        targets=tokens[stop - length + 1 : stop + 1],
        scored=[index >= length - targets for index in range(length)],
        tokens=range(stop - targets + 1 - len(text.start), stop + 1 - len(text.start)),
    )
