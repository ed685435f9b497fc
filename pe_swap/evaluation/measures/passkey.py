"""A number hidden in filler text, asked for at the end: by length and depth.

The text is filler sentences; at a depth between 0 (its start) and 1 (its end) stands "The pass key is", and digits; the text ends with
"The pass key is", and the digits are to follow. From Mohtashami and Jaggi, "Landmark Attention" (arXiv:2305.16300, section 4.2), with
sentences of our own. A trial is right if every digit is the most probable token, which is when greedy decoding gives the number; a
masked model gets all digits masked at once. Distractors are other numbers, of things with other names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pe_swap.errors import DataError
from pe_swap.evaluation.measures.base import MEASURES, MeasureOptions, Probe, Reading, answered, body_length, framed
from pe_swap.evaluation.text import Text
from pe_swap.runs.config import Integer, PositiveInt
from pe_swap.runs.recall import draw_again

FILLER = (
    "The rain fell on the hills. The river ran down to the sea. A boat came in at noon. The men went home. The road was long. "
)
KEY, AFTER_KEY = " The pass key is", ". Keep the pass key."
NAMES = ("house", "ship", "horse", "field", "bridge", "tower", "mill", "church")


class PasskeyOptions(MeasureOptions):
    """Options of `passkey`."""

    digits: PositiveInt = Field(default=5, description="digits of the number, one token each")
    depths: PositiveInt = Field(default=5, description="depths, evenly from 0 to 1; a single one is 0.5")
    trials: PositiveInt = Field(default=8, description="numbers at each length and depth")
    distractors: Integer = Field(default=0, ge=0, le=len(NAMES), description="other numbers in the filler")


@MEASURES.register("passkey")
class Passkey(Probe):
    """A number hidden in filler and asked for at the end, by length and depth (arXiv:2305.16300)."""

    name = "passkey"
    for_encoders = True
    Options = PasskeyOptions
    quantities: ClassVar[dict[str, str]] = {
        "accuracy": "Share of numbers with every digit right",
        "digit_accuracy": "Share of digits that are right",
    }

    def readings(self, model: PreTrainedModel, text: Text, length: int) -> Iterator[Reading]:
        """Yield the accuracy at every depth."""
        generator, depths = torch.Generator().manual_seed(text.seed), self.options.depths
        for step in range(depths):
            depth = step / (depths - 1) if depths > 1 else 0.5
            prompts = [self.prompt(text, length, depth, generator) for _ in range(self.options.trials)]
            right = answered(model, text, [ids for ids, _ in prompts], [places for _, places in prompts])
            yield Reading("accuracy", float(right.all(dim=1).double().mean()), len(right), {"depth": depth})
            yield Reading("digit_accuracy", float(right.double().mean()), right.numel(), {"depth": depth})

    def prompt(self, text: Text, length: int, depth: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Return a prompt with the answer in it, and the index of each token of the answer.

        Raises:
            DataError: the length has no room for the number and the question, or the vocabulary has no digits.
        """
        digits = digit_tokens(text.tokenizer)
        key = draw_again(digits, self.options.digits, generator)
        question = [*ids_of(text.tokenizer, KEY), *key]
        needle = [*question, *ids_of(text.tokenizer, AFTER_KEY)]
        pieces = [needle]
        for name in NAMES[: self.options.distractors]:
            other = draw_again(digits, self.options.digits, generator)
            pieces.append([*ids_of(text.tokenizer, f" The number of the {name} is"), *other, *ids_of(text.tokenizer, ".")])
        room = body_length(text, length) - len(question) - sum(map(len, pieces))
        if room < 0:
            raise DataError(
                f"A length of {length:,} has no room for the number and the question, which take {length - room:,} tokens here. Use longer "
                "lengths."
            )
        filler = ids_of(text.tokenizer, FILLER)
        filler = (filler * (room // len(filler) + 1))[:room]
        places = [round(depth * room), *torch.randint(room + 1, (len(pieces) - 1,), generator=generator).tolist()]
        body = list(filler)
        for place, piece in sorted(zip(places, pieces, strict=True), key=lambda pair: -pair[0]):
            body[place:place] = piece
        prompt, before = framed(text, [*body, *question])
        last = before + len(body) + len(question)
        return prompt, list(range(last - len(key), last))


def ids_of(tokenizer: PreTrainedTokenizerBase, words: str) -> list[int]:
    """Return the tokens of a text, without special ones."""
    found: list[int] = tokenizer(words, add_special_tokens=False)["input_ids"]
    return found


def digit_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a token for each digit 0 to 9: the one with a space before it where the vocabulary has all ten, else that without.

    Raises:
        DataError: the vocabulary has neither.
    """
    for before in (" ", ""):
        found = [ids_of(tokenizer, f"{before}{digit}") for digit in range(10)]
        single = {ids[0] for ids in found if len(ids) == 1} - set(tokenizer.all_special_ids)
        if len(single) == 10:
            return [ids[0] for ids in found]
    raise DataError("The vocabulary has no token for each digit, so a number cannot be asked for. Leave passkey out.")
