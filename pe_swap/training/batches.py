"""Blocks of tokens as batches: for a decoder, for an encoder with masks, for a model without a head for words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

from pe_swap.errors import DataError
from pe_swap.runs.config import TrainSection
from pe_swap.runs.models import is_causal
from pe_swap.runs.records import fingerprint


def collator(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: TrainSection, seed: int
) -> Callable[[Sequence[dict[str, list[int]]]], dict[str, Tensor]]:
    """Return what makes a batch of blocks.

    Raises:
        DataError: an encoder's tokenizer lacks a token that training needs.
    """
    if model.base_model is model:
        return whole_batch
    if is_causal(model):
        return causal_batch
    for name in ("mask", "pad"):
        if getattr(tokenizer, f"{name}_token") is None:
            raise DataError(
                f"The tokenizer has no {name} token, which an encoder's training needs. Name the model's own tokenizer with --tokenizer."
            )
    return MaskedBatch(tokenizer, section.mlm_probability, seed)


def causal_batch(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return blocks of one token more than their inputs as a batch in which every input has a target.

    Blocks of questions have labels of their own, for the answers alone. Left to shift labels itself, the model would leave the last
    input without one, and the last row of a learned table untrained.
    """
    tokens = torch.tensor([row["input_ids"] for row in rows])
    targets = torch.tensor([row.get("labels", row["input_ids"]) for row in rows])[:, 1:].contiguous()
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": targets, "shift_labels": targets}


def whole_batch(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return blocks as a batch for a model without a head for words: no masks, and labels that say no more than which tokens count."""
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


class MaskedBatch:
    """transformers' random masking, drawn from the batch itself.

    Batches are fetched ahead of the step that trains on them, so a checkpoint's random state is further than its step. Masks that
    follow from the run's seed and the batch's own tokens need no state: a resumed run gets the same ones. Blocks come in other
    batches every epoch, and get other masks.

    Attributes:
        collator: transformers' collator.
        seed: the run's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float, seed: int) -> None:
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)
        self.seed = seed

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Return `input_ids` with masks, `attention_mask`, and `labels` that are -100 where nothing is asked."""
        tokens = fingerprint([self.seed, [row["input_ids"] for row in rows]])
        self.collator.generator = torch.Generator().manual_seed(int(tokens, 16) % 2**63)
        batch: dict[str, Tensor] = self.collator(list(rows))
        return batch
