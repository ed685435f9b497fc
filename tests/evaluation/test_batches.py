"""A batch that does not fit is halved."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from pe_swap.evaluation.batches import in_batches

ROWS = list(range(10))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_is_halved_and_no_row_is_lost(error: RuntimeError, capsys: pytest.CaptureFixture[str]) -> None:
    tried = []

    def compute(rows: slice) -> list[int]:
        tried.append(len(ROWS[rows]))
        if tried[-1] > 3:
            raise error
        return ROWS[rows]

    assert list(chain(*in_batches(10, 8, compute))) == ROWS
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert capsys.readouterr().err.count("Out of memory: ") == 2


def test_a_single_row_that_does_not_fit_and_any_other_error_are_raised() -> None:
    for size, error in ((1, torch.OutOfMemoryError("full")), (4, RuntimeError("another"))):

        def compute(rows: slice, error: RuntimeError = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error)):
            in_batches(4, size, compute)
