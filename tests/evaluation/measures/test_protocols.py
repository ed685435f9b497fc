"""Which targets are scored and what they see, counted by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pe_swap.errors import DataError
from pe_swap.evaluation.measures.protocols import Window, windows


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
    stride=st.integers(1, 30),
    protocol=st.sampled_from(["nonoverlapping", "sliding"]),
)
def test_every_target_is_scored_once_and_no_window_is_too_long(sizes: list[int], length: int, stride: int, protocol: str) -> None:
    sizes = [*sizes, length + 1]
    found = windows(protocol, sizes, length, stride=stride, targets=1, longest=length)
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
    with pytest.raises(DataError, match=r"No document has 8 tokens \(the longest has 7\).*Use shorter lengths"):
        windows(protocol, [8, 3], 8, stride=4, targets=1, longest=8)


def test_same_targets_needs_a_document_of_the_longest_length() -> None:
    with pytest.raises(DataError, match="No document has the 16 tokens that same_targets needs"):
        windows("same_targets", [9], 4, stride=1, targets=1, longest=16)
