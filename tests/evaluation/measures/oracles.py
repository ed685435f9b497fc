"""Stand-ins for a model whose answers are known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Punctuation, Sequence, Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pe_swap.evaluation.measures.passkey import AFTER_KEY, FILLER, KEY, NAMES

VOCABULARY = 89


def finds_what_followed(monkeypatch: pytest.MonkeyPatch, *, context: int = 1, reach: int = 10**6) -> None:
    """Let every model predict what followed the last earlier occurrence of its last `context` tokens, at most `reach` tokens back.

    Where there is none it predicts token 1, the start token, which no probe asks for. The probability of the prediction is e^20 times
    that of any other token.
    """

    def scored_logits(
        model: object, input_ids: Tensor, targets: Tensor, scored: Tensor, position_ids: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        predicted = []
        for row, is_scored in zip(input_ids.tolist(), scored.tolist(), strict=True):
            for index in [index for index, one in enumerate(is_scored) if one]:
                wanted = row[index - context + 1 : index + 1]
                starts = range(index - context, max(-1, index - context - reach), -1)
                found = next((start for start in starts if row[start : start + context] == wanted), None)
                predicted.append(1 if found is None else row[found + context])
        logits = torch.nn.functional.one_hot(torch.tensor(predicted), VOCABULARY) * 20.0
        yield logits, targets[scored]

    monkeypatch.setattr("pe_swap.evaluation.losses.scored_logits", scored_logits)


def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words and digits of a passkey prompt."""
    splits = Sequence([Whitespace(), Punctuation()])
    texts = [FILLER, KEY, AFTER_KEY, " The number of the", *NAMES]
    found = {word: None for text in texts for word, _ in splits.pre_tokenize_str(text)}
    names = ["[UNK]", "<s>", "[CLS]", "[SEP]", "[MASK]", *map(str, range(10)), *found]
    assert len(names) <= VOCABULARY
    inner = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = splits
    special = {"unk_token": "[UNK]", "bos_token": "<s>", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)
