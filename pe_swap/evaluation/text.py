"""The documents of an evaluation, as tokens and as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from pe_swap.runs.config import MeasureSection
from pe_swap.runs.data import document_start, tokenized

FirstToken = Literal["window", "document"]


@dataclass(frozen=True)
class Text:
    """What a measure may read: documents already cut to what is measured, and how to measure on them.

    Attributes:
        documents: token ids of each document, without special tokens.
        byte_ends: of each document, for each token, the UTF-8 bytes from the document's start to the token's end; None where the
            tokenizer does not tell.
        tokenizer: whose tokens they are.
        settings: lengths and the like.
        seed: of whatever is drawn.
        first_token: where the tokenizer's first token stands: at the start of every window, or of the document alone.
        is_causal: whether the model looks back only; masked models get a mask token where an answer is asked for.
    """

    documents: Sequence[Sequence[int]]
    byte_ends: Sequence[Sequence[int]] | None
    tokenizer: PreTrainedTokenizerBase
    settings: MeasureSection
    seed: int
    first_token: FirstToken
    is_causal: bool = True

    @property
    def start(self) -> list[int]:
        """The token before a document, or none: what the tokenizer begins texts with, or what separates them."""
        return document_start(self.tokenizer)

    def bytes_of(self, document: int, tokens: Sequence[int]) -> int | None:
        """Return the bytes of some tokens of a document, by their index; None where not known."""
        if self.byte_ends is None:
            return None
        ends = self.byte_ends[document]
        return sum(ends[token] - (ends[token - 1] if token else 0) for token in tokens)


def where_first_token_stands(tokenizer: PreTrainedTokenizerBase, settings: MeasureSection) -> FirstToken:
    """Return where the first token stands: as the settings say, or at every window if the tokenizer adds one to every text.

    A model that never read a text without it (Llama, Gemma) is far worse on windows that start in the middle of a document.
    """
    if settings.first_token != "auto":
        return settings.first_token
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return "window" if ids and ids[0] == tokenizer.bos_token_id else "document"


def tokens_and_bytes(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[list[int]] | None]:
    """Return each document's token ids, without special tokens, and `Text.byte_ends`."""
    if not tokenizer.is_fast:
        return tokenized(texts, tokenizer), None
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [byte_ends(text, [last for _, last in spans]) for text, spans in zip(texts, encoded["offset_mapping"], strict=True)]
    return encoded["input_ids"], ends


def byte_ends(text: str, character_ends: Sequence[int]) -> list[int]:
    """Return the UTF-8 bytes before each of the given ends, which are counted in characters.

    A token's bytes reach from the end before it to its own, so that spaces between tokens count; the last token's reach to the end
    of the text. Tokens that are parts of one character share its end: the first of them has all its bytes.
    """
    if not character_ends:
        return []
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.maximum.accumulate(before[np.asarray(character_ends)])
    ends[-1] = before[-1]
    return [int(end) for end in ends]
