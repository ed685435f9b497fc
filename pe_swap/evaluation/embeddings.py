"""Embeddings of texts: the mean of an encoder's last hidden states, as sentence encoders are used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pe_swap.evaluation.batches import in_batches, on_device
from pe_swap.evaluation.losses import hidden_states
from pe_swap.runs.config import MeasureSection


@torch.no_grad()
def pooled(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return `mean(states) / |mean(states)|`, `[batch, hidden_size]`, float32, of `ids`, `[batch, length]`."""
    return F.normalize(hidden_states(model, ids).float().mean(dim=1), dim=-1)


def embeddings(model: PreTrainedModel, rows: Sequence[Sequence[int]], settings: MeasureSection) -> Tensor:
    """Return `mean(states) / |mean(states)|` of each row of tokens, `[rows, hidden_size]`, float32, on the CPU.

    The mean is over all tokens of a row, those around the text too. Rows of one length go through the model together, unpadded.

    Args:
        model: a model in evaluation mode.
        rows: token ids.
        settings: how many tokens go through the model at once.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_length[len(row)].append(index)
    found: dict[int, Tensor] = {}
    for length, members in by_length.items():
        ids = torch.tensor([list(rows[index]) for index in members])
        means = in_batches(len(members), settings.batch_tokens // length, on_device(model, pooled, ids))
        found.update(zip(members, torch.cat(means), strict=True))
    return torch.stack([found[index] for index in range(len(rows))])
