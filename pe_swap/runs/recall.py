"""Pairs of random words, asked for again: sequences to train on and to measure on.

* `pairs` (multi-query associative recall, Arora et al., "Zoology", arXiv:2312.04927, section 3): pairs of a key and a value, then
  filler, then each key again in another order, and its value is to follow;
* `noisy` (Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", arXiv:2403.17844, section 3): the pairs stand
  anywhere in the filler;
* `selective_copy` (Gu and Dao, "Mamba", arXiv:2312.00752, section 3.1): single tokens stand anywhere among one repeated filler
  token; at the end they are to follow in order.

The number of pairs does not grow with the length, so that length alone makes it harder: filler stands between pair and question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pe_swap.errors import DataError
from pe_swap.runs.config import RecallSection, RecallTask

START = "<s>"

HELD_OUT_SEQUENCES = 16


def draw(choices: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """Return `count` different entries of `choices`, in random order.

    Raises:
        DataError: there are not as many.
    """
    if len(choices) < count:
        raise DataError(
            f"{count:,} different tokens are needed, and the vocabulary has {len(choices):,} besides special ones. Use fewer pairs."
        )
    return [choices[index] for index in torch.randperm(len(choices), generator=generator)[:count].tolist()]


def draw_again(choices: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """Return `count` entries of `choices`, each drawn from all of them."""
    return [choices[index] for index in torch.randint(len(choices), (count,), generator=generator).tolist()]


def recall_body(
    task: RecallTask, choices: Sequence[int], pairs: int, size: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Return `size` tokens, and the index of each that is to be predicted: the same ones of all bodies of a size.

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


def recall_texts(section: RecallSection, size: int, *, held_out: bool) -> list[str]:
    """Return sequences of `size` words, one text each; those to train on and those held out are drawn apart."""
    generator = torch.Generator().manual_seed(1 if held_out else 0)
    count = HELD_OUT_SEQUENCES if held_out else section.sequences
    bodies = (recall_body(section.task, range(section.words), section.pairs, size, generator)[0] for _ in range(count))
    return [" ".join(map(str, body)) for body in bodies]


def asked_places(section: RecallSection, size: int) -> list[int]:
    """Return the index in a sequence of each word that is to be predicted."""
    return recall_body(section.task, range(section.words), section.pairs, size, torch.Generator())[1]


def words_tokenizer(words: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are the words `0`, `1`, ..., and a start token."""
    names = [START, *map(str, range(words))]
    inner = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token=START))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=START, eos_token=START, unk_token=START)
