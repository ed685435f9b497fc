"""Pairs of random tokens, asked for again: does the model look up what it has read?

The tasks and their sources: `pe_swap/runs/recall.py`. Random tokens mean nothing to a model of language, which may do well or not; tiny
models that are trained on the task itself tell what a scheme makes of lengths it was not trained at (`configs/recall.yaml`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel

from pe_swap.evaluation.measures.base import (
    MEASURES,
    MeasureOptions,
    Probe,
    Reading,
    answered,
    body_length,
    framed,
    ordinary_tokens,
)
from pe_swap.evaluation.text import Text
from pe_swap.runs.config import PositiveInt, RecallTask
from pe_swap.runs.recall import recall_body


class RecallOptions(MeasureOptions):
    """Options of `recall`."""

    task: RecallTask = Field(default="pairs", description="pairs first, pairs anywhere in the filler, or single tokens in order")
    pairs: PositiveInt = Field(default=4, description="pairs, or tokens to copy")
    trials: PositiveInt = Field(default=32, description="sequences at each length")


@MEASURES.register("recall")
class Recall(Probe):
    """Pairs of random tokens, or single ones, looked up again behind filler, by length (arXiv:2312.04927)."""

    name = "recall"
    for_encoders = True
    Options = RecallOptions
    quantities: ClassVar[dict[str, str]] = {"accuracy": "Share of values that are right"}

    def readings(self, model: PreTrainedModel, text: Text, length: int) -> Iterator[Reading]:
        """Yield the accuracy over all questions."""
        generator, choices = torch.Generator().manual_seed(text.seed), ordinary_tokens(text)
        bodies = [
            recall_body(self.options.task, choices, self.options.pairs, body_length(text, length), generator)
            for _ in range(self.options.trials)
        ]
        framed_bodies = [framed(text, body) for body, _ in bodies]
        places = [[before + place for place in asked] for (_, before), (_, asked) in zip(framed_bodies, bodies, strict=True)]
        right = answered(model, text, [ids for ids, _ in framed_bodies], places)
        yield Reading("accuracy", float(right.double().mean()), right.numel())
