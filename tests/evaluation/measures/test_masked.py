"""Masked language models: the same tokens masked at each length."""

from __future__ import annotations

import torch

from pe_swap.evaluation.measures.masked import masked_windows, masks


def test_masks_depend_on_the_seed_only_and_leave_no_document_out() -> None:
    first, again, other = masks([40, 1, 9], 0.15, 3), masks([40, 1, 9], 0.15, 3), masks([40, 1, 9], 0.15, 4)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert [mask.shape[0] for mask in first] == [40, 1, 9]
    assert all(mask.any() for mask in first)


def test_windows_by_hand() -> None:
    # Between [CLS]=1 and [SEP]=2 a length of 5 leaves three tokens; 0 is the mask token.
    mask = torch.tensor([False, True, False, False, True])
    found = list(masked_windows([10, 11, 12, 13, 14], mask, 5, before=[1], after=[2], mask_token=0))
    assert found == [
        ([1, 10, 0, 12, 2], [1, 10, 11, 12, 2], [False, False, True, False, False], [1]),
        ([1, 13, 0, 2], [1, 13, 14, 2], [False, False, True, False], [4]),
    ]


def test_every_length_scores_the_same_tokens() -> None:
    tokens, mask = list(range(100, 137)), masks([37], 0.3, 0)[0]

    def scored(length: int) -> list[int]:
        found = masked_windows(tokens, mask, length, before=[1], after=[2], mask_token=0)
        return [target for _, targets, chosen, _ in found for target, is_scored in zip(targets, chosen, strict=True) if is_scored]

    expected = [token for token, masked in zip(tokens, mask.tolist(), strict=True) if masked]
    assert scored(4) == scored(10) == scored(64) == expected
