"""Perplexity of one passage at growing absolute positions.

The same tokens are read with the position ids `offset, offset + 1, ...`. No long text is needed, and no context changes: what moves is
the model's positions alone. So a rise means that positions far out are broken (never trained, or computed in too few bits), where a
rise of perplexity at long contexts may also mean that the context confuses the model. Of a shift-invariant scheme the line is flat to
rounding; schemes that count keys and not position ids are flat by construction.

Source: the measurement in a pull request to unsloth (#7028, 2026), one passage of 2,048 tokens at offsets up to 130,000.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from pe_swap.errors import DataError, PositionRangeError
from pe_swap.evaluation.batches import in_batches, on_device
from pe_swap.evaluation.losses import target_losses
from pe_swap.evaluation.measures.base import MEASURES, MeasureOptions, Probe, Reading
from pe_swap.evaluation.text import Text
from pe_swap.families import FAMILIES, family_name
from pe_swap.runs.config import Integer, MeasureSection, PositiveInt
from pe_swap.runs.models import longest_input


class OffsetOptions(MeasureOptions):
    """Options of `offset`."""

    offsets: list[Integer] = Field(default=[0, 1024, 4096, 16384, 65536, 131072], min_length=1, description="first position ids")
    passage: PositiveInt = Field(default=64, description="tokens of the passage: the first ones of each document")
    documents: PositiveInt = Field(default=16, description="at most so many passages")


@MEASURES.register("offset")
class Offset(Probe):
    """Perplexity of the same passages at growing absolute positions, by `position_ids`."""

    name = "offset"
    Options = OffsetOptions
    columns = "offset"
    quantities: ClassVar[dict[str, str]] = {
        "perplexity": "Perplexity of the passages",
        "largest_change": "Largest change of any target's loss against the first offset, nats",
    }

    def lengths(self, settings: MeasureSection) -> list[int]:
        """Return the length of the passage."""
        return [self.options.passage]

    def readings(self, model: PreTrainedModel, text: Text, length: int) -> Iterator[Reading]:
        """Yield the perplexity and the largest change at every offset."""
        if "position_ids" not in inspect.signature(type(model.base_model).forward).parameters:
            raise DataError(
                f"{type(model).__name__} takes no position ids, so a passage cannot stand elsewhere. Leave offset out."
            )
        passages = [[*text.start, *document][: length + 1] for document in text.documents if len(document) >= length]
        if not passages:
            raise DataError(f"No document has the {length:,} tokens of a passage. Set --options.offset.passage lower.")
        ids = torch.tensor(passages[: self.options.documents], device=model.device)
        first = first_position(model)
        limit, start = longest_input(model), None
        for offset in self.options.offsets:
            if limit is not None and offset + length > limit:
                raise PositionRangeError(
                    f"positions up to {offset + length:,} are more than the {limit:,} this model has; swap it to go on"
                )
            losses = passage_losses(model, ids, first + offset, text)
            start = losses if start is None else start
            at = {"offset": float(offset)}
            yield Reading("perplexity", float(losses.mean().exp()), losses.numel(), at)
            yield Reading("largest_change", float((losses - start).abs().max()), losses.numel(), at)


def first_position(model: PreTrainedModel) -> int:
    """Return the position id that the model itself gives a row's first token: 0, but for families that count from the padding."""
    name = family_name(model.config.model_type)
    return FAMILIES[name].stacks_of(model.config)[-1].first_id(model.config) if name in FAMILIES else 0


def passage_losses(model: PreTrainedModel, ids: Tensor, first: int, text: Text) -> Tensor:
    """Return the loss of every target of the passages, nats, read from position `first` on.

    Args:
        model: a causal language model in evaluation mode.
        ids: `[passages, length + 1]`.
        first: the first token's position id.
        text: how many tokens go through the model at once.
    """
    inputs, targets = ids[:, :-1], ids[:, 1:]
    position_ids = torch.arange(first, first + inputs.shape[1], device=ids.device).expand_as(inputs)
    parts = (inputs, targets, torch.ones_like(inputs, dtype=torch.bool), position_ids)
    return torch.cat(in_batches(len(ids), text.settings.batch_tokens // inputs.shape[1], on_device(model, target_losses, *parts)))
