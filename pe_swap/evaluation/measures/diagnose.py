"""Where attention goes, per layer and head: why a flat perplexity may hide a dead long range.

For the probabilities `a[i, j]` of query i over its `n_i` keys (i + 1 of a decoder, all of an encoder), means over queries of

* first token mass, `a[i, 0]`: much of it means a sink (Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
  arXiv:2309.17453, section 3.1), queries with nothing to look for;
* mean distance, `sum_j a[i, j] |i - j|`, tokens: near 0 at long lengths means that far keys are never read;
* entropy, `-sum_j a[i, j] ln a[i, j] / ln n_i`: 1 is an even spread, which at long lengths is no choice at all.

The first query is left out: it has one key. Probabilities come from the eager implementation, a layer's at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from pe_swap.attention.names import library_name
from pe_swap.errors import DataError
from pe_swap.evaluation.losses import hidden_states
from pe_swap.evaluation.measures.base import MEASURES, MeasureOptions, Probe, Reading, first_windows
from pe_swap.evaluation.text import Text
from pe_swap.runs.config import MeasureSection, PositiveInt


class DiagnoseOptions(MeasureOptions):
    """Options of `diagnose`."""

    documents: PositiveInt = Field(default=4, description="at most so many documents, one window of each")
    max_length: PositiveInt = Field(default=2048, description="longer lengths are left out: memory grows with the square")


@MEASURES.register("diagnose")
class Diagnose(Probe):
    """Attention per layer and head: mass on the first token, mean distance, entropy over ln n (arXiv:2309.17453)."""

    name = "diagnose"
    for_encoders = True
    needs_vocabulary = False
    Options = DiagnoseOptions
    quantities: ClassVar[dict[str, str]] = {
        "first_token_mass": "Mass on the first token",
        "mean_distance": "Mean distance of what is read, tokens",
        "entropy": "Entropy over that of an even spread",
    }
    averaged = ("head",)

    def lengths(self, settings: MeasureSection) -> list[int]:
        """Return the lengths up to `max_length`; the shortest one at least."""
        return [length for length in settings.lengths if length <= self.options.max_length] or [min(settings.lengths)]

    def readings(self, model: PreTrainedModel, text: Text, length: int) -> Iterator[Reading]:
        """Yield the three numbers of every head of every layer."""
        rows = first_windows(text, length)[: self.options.documents]
        sums: list[Tensor] = []
        with every_layers_probabilities(model, length) as found:
            for row in rows:
                found.clear()
                with torch.no_grad():
                    hidden_states(model, torch.tensor([row], device=model.device))
                sums = found.copy() if not sums else [total + added for total, added in zip(sums, found, strict=True)]
        if not sums:
            raise DataError(f"The attention of {type(model).__name__} returns no probabilities. Leave diagnose out.")
        for layer, total in enumerate(sums):
            for head, numbers in enumerate((total / len(rows)).tolist()):
                at = {"layer": float(layer), "head": float(head)}
                for quantity, value in zip(self.quantities, numbers, strict=True):
                    yield Reading(quantity, value, len(rows), at)


@contextmanager
def every_layers_probabilities(model: PreTrainedModel, length: int) -> Iterator[list[Tensor]]:
    """Give a list that each attention layer adds its `head_statistics` to in a call, under the eager implementation.

    An attention layer is known by what it returns beside its output: `[1, heads, length, length]`. Modules around it that return the
    same tensor on count once.
    """
    found: list[Tensor] = []
    last: list[Any] = [None]

    def note(module: Any, inputs: Any, output: Any) -> None:
        probabilities = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(probabilities, Tensor) or probabilities.shape[2:] != (length, length):
            return
        if probabilities is not last[0]:
            last[0] = probabilities
            found.append(head_statistics(probabilities[0]))

    before = library_name(model.config._attn_implementation)
    handles = [module.register_forward_hook(note) for module in model.base_model.modules()]
    try:
        model.set_attn_implementation("eager")
        yield found
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)


def head_statistics(probabilities: Tensor) -> Tensor:
    """Return first token mass, mean distance and entropy over ln n of each head, `[heads, 3]`, float64 on the CPU.

    Args:
        probabilities: `[heads, length, length]`; a row is a decoder's if it is zero behind its own place in every head.
    """
    weights = probabilities.double()
    length = weights.shape[-1]
    index = torch.arange(length, device=weights.device)
    is_causal = not weights.triu(1).any()
    keys = (index + 1 if is_causal else torch.full_like(index, length)).double()
    distance = (index[:, None] - index[None, :]).abs().double()
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    numbers = [weights[:, 1:, 0], (weights * distance).sum(-1)[:, 1:], entropy[:, 1:] / keys[1:].log()]
    return torch.stack([number.mean(-1) for number in numbers], dim=-1).cpu()
