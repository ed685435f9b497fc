"""Pairs of random tokens, asked for again: does the model look up what it has read?

* `pairs` (multi-query associative recall, Arora et al., "Zoology", arXiv:2312.04927, section 3): pairs of a key and a value, then
  filler, then each key again in another order, and its value is to follow;
* `noisy` (Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", arXiv:2403.17844, section 3): the pairs stand
  anywhere in the filler;
* `selective_copy` (Gu and Dao, "Mamba", arXiv:2312.00752, section 3.1): single tokens stand anywhere among one repeated filler
  token; at the end they are to follow in order.

The number of pairs does not grow with the length, so that length alone makes it harder: filler stands between pair and question.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from pe_swap.errors import DataError
from pe_swap.evaluation.measures.base import (
    MEASURES,
    MeasureOptions,
    Probe,
    Reading,
    answered,
    body_length,
    draw,
    draw_again,
    framed,
    ordinary_tokens,
)
from pe_swap.evaluation.text import Text
from pe_swap.runs.config import PositiveInt

RecallTask = Literal["pairs", "noisy", "selective_copy"]


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


def recall_body(
    task: RecallTask, choices: list[int], pairs: int, size: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Return `size` tokens, and the index of each that is to be predicted.

    Args:
        task: the form.
        choices: tokens to draw from; no filler token is a key or a value.
        pairs: pairs, or tokens to copy.
        size: tokens.
        generator: of what is drawn.

    Raises:
        DataError: `size` has no room, or there are too few tokens.
    """
    if task == "selective_copy":
        *data, filler, mark = draw(choices, pairs + 2, generator)
        pieces, question, asked = [[token] for token in data], [mark, *data], range(size - pairs, size)
        fillers = [filler]
    else:
        drawn = draw(choices, 2 * pairs + 1, generator)
        pieces = [drawn[2 * index : 2 * index + 2] for index in range(pairs)]
        order = torch.randperm(pairs, generator=generator).tolist()
        question = [token for index in order for token in pieces[index]]
        asked = range(size - 2 * pairs + 1, size, 2)
        used = set(drawn[:-1])
        fillers = [token for token in choices if token not in used]
    room = size - len(question) - sum(map(len, pieces))
    if room < 0:
        raise DataError(
            f"A length of about {size:,} has no room for {pairs} pairs and their questions. Use longer lengths, or fewer."
        )
    body = draw_again(fillers, room, generator)
    if task == "pairs":
        body = [token for piece in pieces for token in piece] + body
    else:
        places = sorted(torch.randint(room + 1, (pairs,), generator=generator).tolist())
        for place, piece in reversed(list(zip(places, pieces, strict=True))):
            body[place:place] = piece
    return [*body, *question], list(asked)
