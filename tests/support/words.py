"""Small tokenizers, built here: one word a token."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support.families import VOCABULARY, is_causal

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
WORDS = [f"w{index}" for index in range(len(SPECIAL), VOCABULARY)]

DOCUMENTS = [[5 + (index * index + 7 * document) % 80 for index in range(size)] for document, size in enumerate((150, 70, 33))]
"""Documents of ids of a small model's vocabulary: 150, 70 and 33 tokens."""


def word_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are those of the small models; an encoder's adds [CLS] and [SEP]."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if not is_causal(family):
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def numbered_tokenizer(*, masked: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose word `w7` has the id 7; it adds no special token."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    masks = {"cls_token": "w1", "sep_token": "w2", "mask_token": "w3", "pad_token": "w4"}
    special = masks if masked else {"bos_token": "w1", "eos_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)
