"""Masked language models at several lengths: the same tokens masked at each.

Perplexity is not defined for them; what is reported is the exponential of the mean loss on masked tokens. Every masked token is
replaced by the mask token (no random or kept ones, as in training), so that a number means one thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


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
) -> Iterator[tuple[list[int], list[int], list[bool]]]:
    """Yield inputs, targets and which targets are scored, over a document side by side; the last window may be shorter.

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
        )
