"""Masked language models at several lengths: the same tokens masked at each.

Perplexity is not defined for them; what is reported is the exponential of the mean loss on masked tokens. Every masked token is
replaced by the mask token (no random or kept ones, as in training), so that a number means one thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pe_swap.errors import DataError
from pe_swap.evaluation.measures.base import MEASURES, Example, Perplexity
from pe_swap.evaluation.text import Text


@MEASURES.register("masked")
class Masked(Perplexity):
    """Exponential of the loss on masked tokens, of encoders; the same tokens are masked at every length."""

    name = "masked"
    for_decoders = False
    for_encoders = True

    def examples(self, text: Text, length: int) -> list[Example]:
        """Return the windows of every document, with their masked tokens."""
        tokenizer = text.tokenizer
        if tokenizer.mask_token_id is None:
            raise DataError(
                "The tokenizer has no mask token, so a masked language model cannot be evaluated. Name its own tokenizer."
            )
        before = [] if tokenizer.cls_token_id is None else [int(tokenizer.cls_token_id)]
        after = [] if tokenizer.sep_token_id is None else [int(tokenizer.sep_token_id)]
        around = len(before) + len(after)
        if length <= around:
            raise DataError(f"A length of {length} leaves no room between [CLS] and [SEP]. It must be at least {around + 1}.")
        longest = max(map(len, text.documents), default=0) + around
        if longest < length:
            raise DataError(
                f"No document has {length:,} tokens (the longest has {longest:,}); a length needs one that fills it. Use shorter lengths, "
                "or longer documents."
            )
        chosen = masks([len(document) for document in text.documents], text.settings.mask_probability, text.seed)
        mask_token = int(tokenizer.mask_token_id)
        return [
            Example(document, inputs, targets, scored, tokens)
            for document, (ids, mask) in enumerate(zip(text.documents, chosen, strict=True))
            for inputs, targets, scored, tokens in masked_windows(
                ids, mask, length, before=before, after=after, mask_token=mask_token
            )
        ]


def masks(sizes: Sequence[int], probability: float, seed: int) -> list[Tensor]:
    """Return which tokens of each document are masked, boolean, `[size]`; at least one, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        chosen = torch.rand(size, generator=generator) < probability
        if size and not chosen.any():
            chosen[int(torch.randint(size, (1,), generator=generator))] = True
        found.append(chosen)
    return found


def masked_windows(
    tokens: Sequence[int], mask: Tensor, length: int, *, before: Sequence[int], after: Sequence[int], mask_token: int
) -> Iterator[tuple[list[int], list[int], list[bool], list[int]]]:
    """Yield inputs, targets, which are scored, and the index in the document of each scored one; the last window may be shorter.

    `length` counts the tokens `before` (`[CLS]`) and `after` (`[SEP]`) too.
    """
    inner = length - len(before) - len(after)
    for start in range(0, len(tokens), inner):
        piece, chosen = list(tokens[start : start + inner]), mask[start : start + inner].tolist()
        inputs = [mask_token if masked else token for token, masked in zip(piece, chosen, strict=True)]
        nowhere = [False]
        yield (
            [*before, *inputs, *after],
            [*before, *piece, *after],
            [*nowhere * len(before), *chosen, *nowhere * len(after)],
            [start + index for index, masked in enumerate(chosen) if masked],
        )
