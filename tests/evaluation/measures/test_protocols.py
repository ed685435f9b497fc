"""Which targets are scored and what they are predicted from, counted by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from pe_swap.errors import DataError
from pe_swap.evaluation.measures import measure
from pe_swap.evaluation.measures.protocols import Protocol, Window
from pe_swap.evaluation.text import Text, where_first_token_stands
from pe_swap.runs.config import MeasureSection
from tests.support.words import numbered_tokenizer


def windows(protocol: str, sizes: list[int], length: int, *, stride: int, targets: int, longest: int) -> list[Window]:
    found = measure(protocol)
    assert isinstance(found, Protocol)
    settings = MeasureSection.model_construct(lengths=[length, longest], stride=stride, targets=targets)
    return found.all_windows(sizes, length, settings)


def scored(found: list[Window]) -> Counter[tuple[int, int]]:
    return Counter((window.document, target) for window in found for target in range(window.first_target, window.stop + 1))


def test_nonoverlapping_by_hand() -> None:
    # 8 tokens, t0 the start token: targets 1 to 7. Inputs t0-t2, t3-t5, and the partial window t6.
    found = windows("nonoverlapping", [8], 3, stride=1, targets=1, longest=3)
    assert found == [Window(0, 0, 3, 1), Window(0, 3, 6, 4), Window(0, 6, 7, 7)]


def test_sliding_by_hand() -> None:
    # Windows of 4 inputs, 2 apart: targets 1-4, then 5-6, then the last one alone; all but the first see 3 or 4 tokens.
    found = windows("sliding", [8], 4, stride=2, targets=1, longest=4)
    assert found == [Window(0, 0, 4, 1), Window(0, 2, 6, 5), Window(0, 3, 7, 7)]


def test_same_targets_by_hand() -> None:
    # 10 tokens: the last three targets are 7, 8, 9 at either length; the document of 5 does not fill the longest length.
    short = windows("same_targets", [10, 5], 4, stride=1, targets=3, longest=8)
    long = windows("same_targets", [10, 5], 8, stride=1, targets=3, longest=8)
    assert short == [Window(0, 5, 9, 7)]
    assert long == [Window(0, 1, 9, 7)]


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    length=st.integers(1, 20),
    stride=st.integers(1, 20),
    protocol=st.sampled_from(["nonoverlapping", "sliding"]),
)
def test_every_target_is_scored_once_and_no_window_is_too_long(sizes: list[int], length: int, stride: int, protocol: str) -> None:
    sizes = [*sizes, length + 1]
    found = windows(protocol, sizes, length, stride=min(stride, length), targets=1, longest=length)
    assert scored(found) == Counter((document, target) for document, size in enumerate(sizes) for target in range(1, size))
    assert all(
        0 <= window.start < window.first_target <= window.stop and window.stop - window.start <= length for window in found
    )


@given(size=st.integers(21, 60), targets=st.integers(1, 5))
def test_same_targets_are_the_same_at_every_length(size: int, targets: int) -> None:
    found = {length: windows("same_targets", [size], length, stride=1, targets=targets, longest=20) for length in (5, 10, 20)}
    assert scored(found[5]) == scored(found[10]) == scored(found[20])
    assert sum(scored(found[5]).values()) == targets
    assert [found[length][0].stop - found[length][0].start for length in found] == [5, 10, 20]


@pytest.mark.parametrize("protocol", ["nonoverlapping", "sliding"])
def test_a_length_no_document_fills_is_refused(protocol: str) -> None:
    with pytest.raises(
        DataError, match=r"No document has 8 tokens \(the longest has 7\).* fills the length\. Use shorter lengths"
    ):
        windows(protocol, [8, 3], 8, stride=4, targets=1, longest=8)


def test_same_targets_needs_a_document_of_the_longest_length() -> None:
    with pytest.raises(
        DataError, match=r"No document has 16 tokens \(the longest has 8\); same_targets needs one that fills the long"
    ):
        windows("same_targets", [9], 4, stride=1, targets=1, longest=16)


def examples(protocol: str, first_token: str, length: int) -> list[tuple[list[int], list[int], list[int]]]:
    settings = MeasureSection(lengths=[length], targets=2, stride=2)
    text = Text([[10, 11, 12, 13, 14, 15, 16]], None, numbered_tokenizer(), settings, 0, first_token)
    found = measure(protocol).examples(text, length)
    return [
        (one.inputs, [token for token, chosen in zip(one.targets, one.scored, strict=True) if chosen], list(one.tokens))
        for one in found
    ]


def test_the_first_token_of_a_document_alone() -> None:
    # w1, the beginning of text, has id 1. Scored: the targets, and their index in the document.
    assert examples("nonoverlapping", "document", 4) == [
        ([1, 10, 11, 12], [10, 11, 12, 13], [0, 1, 2, 3]),
        ([13, 14, 15], [14, 15, 16], [4, 5, 6]),
    ]
    assert examples("same_targets", "document", 4) == [([12, 13, 14, 15], [15, 16], [5, 6])]


def test_the_first_token_of_every_window_takes_the_place_of_one_input() -> None:
    assert examples("nonoverlapping", "window", 4) == [
        ([1, 10, 11, 12], [10, 11, 12, 13], [0, 1, 2, 3]),
        ([1, 14, 15], [14, 15, 16], [4, 5, 6]),
    ]
    assert examples("same_targets", "window", 4) == [([1, 13, 14, 15], [15, 16], [5, 6])]
    assert [inputs for inputs, _, _ in examples("sliding", "window", 4)] == [[1, 10, 11, 12], [1, 12, 13, 14], [1, 13, 14, 15]]


def test_a_tokenizer_that_begins_every_text_with_a_token_begins_every_window_with_it() -> None:
    plain, begins = numbered_tokenizer(), numbered_tokenizer()
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    auto = MeasureSection()
    assert where_first_token_stands(plain, auto) == "document"
    assert where_first_token_stands(begins, auto) == "window"
    assert where_first_token_stands(begins, MeasureSection(first_token="document")) == "document"
