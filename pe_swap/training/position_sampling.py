"""Position ids drawn at random in training, so that a model meets positions beyond its blocks' length.

Around any scheme that reads position ids. Evaluation is as ever: 0, 1, 2, ... Ids are drawn in the training step, like dropout, and
not in a collator: batches are fetched ahead of the step, so that a checkpoint's generator state would have passed the draws of a
batch that a resumed run has yet to fetch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pe_swap.errors import ConfigError
from pe_swap.patching.install import holder_of
from pe_swap.runs.config import PositionSampling


def randomized(length: int, max_length: int) -> Tensor:
    """Return a sorted random subset of `[0, max_length)`, `[length]`, int64, from torch's own generator.

    Ruoss et al., "Randomized Positional Encodings Boost Length Generalization of Transformers" (ACL 2023, arXiv:2305.16843), section 3.
    Differs from the paper: none in training; it samples in evaluation too.
    """
    return torch.randperm(max_length)[:length].sort().values


def pose(length: int, max_length: int) -> Tensor:
    """Return ids that count by one but for one skip, `[length]`, int64, from torch's own generator.

    The skip comes after a first part of 1 to `(length + 1) // 2` tokens, and is 0 to `max_length - length` positions long.

    Zhu et al., "PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise Training" (ICLR 2024, arXiv:2309.10400),
    with two chunks, and the draws of the authors' code. Differs from the paper: the text goes on where the first part ends, where
    theirs takes the second from further down the document.
    """
    first_part = int(torch.randint(1, (length + 1) // 2 + 1, ()))
    skip = int(torch.randint(0, max_length - length + 1, ()))
    ids = torch.arange(length)
    ids[first_part:] += skip
    return ids


SAMPLERS: dict[str, Callable[[int, int], Tensor]] = {"randomized": randomized, "pose": pose}
"""The names of `train.positions.name`."""


def with_sampled_positions(batch: Mapping[str, Any], sampling: PositionSampling) -> dict[str, Any]:
    """Return a batch of full blocks with `position_ids` of each row's own, and `attention_mask`, both `[batch, length]`.

    The mask is explicit as transformers, given position ids alone, takes every skip for the start of another sequence packed
    into the row, and lets nothing look across it.
    """
    tokens: Tensor = batch["input_ids"]
    draw = SAMPLERS[sampling.name]
    position_ids = torch.stack([draw(tokens.shape[1], sampling.max_length) for _ in range(tokens.shape[0])])
    return {**batch, "position_ids": position_ids.to(tokens.device), "attention_mask": torch.ones_like(tokens)}


def require_positions(model: PreTrainedModel, sampling: PositionSampling, block_size: int, limit: int | None) -> None:
    """Refuse positions that the model has none of, too few of, never reads, or reads in part.

    Raises:
        ConfigError: they start below a block's length, end beyond the model's, no scheme reads position ids, or one measures distances
            in slots beside them.
    """
    if sampling.max_length < block_size:
        raise ConfigError(
            f"train.positions.max_length is {sampling.max_length:,}, below data.block_size {block_size:,}: there must be a position for "
            "every token of a block. Raise it to the length you want to extend to."
        )
    if limit is not None and sampling.max_length > limit:
        raise ConfigError(
            f"train.positions.max_length is {sampling.max_length:,}, but the model's positions end at {limit:,}. Use at most {limit:,}, "
            "or swap to a scheme that goes on."
        )
    holder = holder_of(model)
    if holder is None:
        return  # the model's own table reads them
    schemes = [holder.scheme_at(index) for index in range(len(holder.schemes))]
    if not any(scheme.reads_position_ids for scheme in schemes):
        names = ", ".join(f"'{scheme.name}'" for scheme in schemes) or "no scheme"
        raise ConfigError(
            f"train.positions is '{sampling.name}', but the model has {names}, which counts keys and reads no position ids: nothing "
            "would change. Drop train.positions, or swap to a scheme that reads them, such as rope or sinusoidal."
        )
    for scheme in schemes:
        if scheme.reads_position_ids and scheme.counts_slots:
            raise ConfigError(
                f"train.positions is '{sampling.name}', but the scheme '{scheme.name}' reads position ids and measures distances in slots: "
                "sampled ids would move the one and not the other. Drop train.positions, or swap to a scheme that reads ids alone, such "
                "as rope or sinusoidal."
            )
