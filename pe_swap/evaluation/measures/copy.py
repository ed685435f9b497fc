"""Random tokens, repeated: does the model find what came a lag ago?

The input is n random tokens and the same n again. From the second token of the repetition on, each token follows from the one before
it and its place n tokens ago, and from nothing else: no knowledge of language helps. GPT-2 does it by induction heads (Olsson et al.,
"In-context Learning and Induction Heads", arXiv:2209.11895, section on random repeated tokens). The lag is half the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel

from pe_swap.errors import DataError
from pe_swap.evaluation.batches import in_batches, on_device
from pe_swap.evaluation.losses import target_hits, target_losses
from pe_swap.evaluation.measures.base import (
    MEASURES,
    MeasureOptions,
    Probe,
    Reading,
    body_length,
    framed,
    ordinary_tokens,
)
from pe_swap.evaluation.text import Text
from pe_swap.runs.config import PositiveInt
from pe_swap.runs.recall import draw, draw_again


class CopyOptions(MeasureOptions):
    """Options of `copy`."""

    trials: PositiveInt = Field(default=16, description="sequences at each length")


@MEASURES.register("copy")
class Copy(Probe):
    """Random tokens repeated once: accuracy and loss in the repetition, by length; the lag is half of it (arXiv:2209.11895)."""

    name = "copy"
    Options = CopyOptions
    quantities: ClassVar[dict[str, str]] = {"accuracy": "Accuracy in the repetition", "loss": "Mean loss in the repetition, nats"}

    def readings(self, model: PreTrainedModel, text: Text, length: int) -> Iterator[Reading]:
        """Yield accuracy and loss from the second token of the repetition on."""
        lag = body_length(text, length) // 2
        if lag < 2:
            raise DataError(f"A length of {length} holds no repetition of two tokens. Use longer lengths.")
        ids = torch.tensor(sequences(text, lag, self.options.trials))
        inputs, targets = ids[:, :-1], ids[:, 1:]
        scored = torch.zeros_like(inputs, dtype=torch.bool)
        scored[:, -(lag - 1) :] = True
        size = text.settings.batch_tokens // inputs.shape[1]
        hits, losses = (
            torch.cat(in_batches(len(inputs), size, on_device(model, compute, inputs, targets, scored)))
            for compute in (target_hits, target_losses)
        )
        yield Reading("accuracy", float(hits.double().mean()), len(hits))
        yield Reading("loss", float(losses.mean()), len(losses))


def sequences(text: Text, lag: int, trials: int) -> list[list[int]]:
    """Return random tokens, repeated once `lag` tokens later, behind the start token; none twice while the vocabulary lasts."""
    generator, choices = torch.Generator().manual_seed(text.seed), ordinary_tokens(text)
    found = []
    for _ in range(trials):
        drawn = draw(choices, lag, generator) if lag <= len(choices) else draw_again(choices, lag, generator)
        found.append(framed(text, [*drawn, *drawn])[0])
    return found
