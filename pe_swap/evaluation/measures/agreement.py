"""How near the embeddings of a swapped encoder are to those of the encoder it was made from.

`cosine(mean states of the model, mean states of the reference)` of the same tokens. It says what a swap changed, and what training
brought back. Beside it the share of texts whose nearest other text is the same for both: what a search notices. Where the reference
itself ends, there is no cosine; its neighbours are then those of the first tokens that it takes, as such encoders are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from pe_swap.errors import ConfigError
from pe_swap.evaluation.embeddings import embeddings
from pe_swap.evaluation.measures.base import MEASURES, MeasureOptions, Probe, Reading, first_windows
from pe_swap.evaluation.text import Text
from pe_swap.runs.config import PositiveInt
from pe_swap.runs.models import load_model, longest_input


class AgreementOptions(MeasureOptions):
    """Options of `agreement`."""

    reference: str | None = Field(default=None, description="the unswapped encoder: hub name or folder")
    documents: PositiveInt = Field(default=16, description="at most so many documents, the start of each")


@MEASURES.register("agreement")
class Agreement(Probe):
    """Cosine of an encoder's mean-pooled embeddings to those of an unswapped reference, by length."""

    name = "agreement"
    for_decoders = False
    for_encoders = True
    needs_vocabulary = False
    Options = AgreementOptions
    quantities: ClassVar[dict[str, str]] = {
        "cosine": "Mean cosine to the reference's embedding",
        "lowest_cosine": "Lowest cosine of a document",
        "same_neighbour": "Share of texts whose nearest other text is the reference's",
    }

    def __init__(self, options: MeasureOptions) -> None:
        super().__init__(options)
        if self.options.reference is None:
            raise ConfigError("it needs the encoder to agree with. Name it with --options.agreement.reference.")
        self._reference: PreTrainedModel | None = None

    def readings(self, model: PreTrainedModel, text: Text, length: int) -> Iterator[Reading]:
        """Yield the mean and the lowest cosine over documents, and the share of same neighbours."""
        reference = self.reference()
        limit = longest_input(reference) or length
        rows = first_windows(text, length)[: self.options.documents]
        ours = embeddings(model, rows, text.settings)
        theirs = embeddings(reference.to(model.device), [row[:limit] for row in rows], text.settings)
        if length <= limit:
            cosines = (ours * theirs).sum(-1)
            yield Reading("cosine", float(cosines.mean()), len(cosines))
            yield Reading("lowest_cosine", float(cosines.min()), len(cosines))
        if len(rows) > 2:  # with two texts, the other one is the nearest
            yield Reading("same_neighbour", float((neighbours(ours) == neighbours(theirs)).float().mean()), len(rows))

    def reference(self) -> PreTrainedModel:
        """Return the unswapped encoder, loaded once.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        if self._reference is None:
            self._reference = load_model(self.options.reference, with_head=False).eval()
        return self._reference


def neighbours(vectors: Tensor) -> Tensor:
    """Return the index of the nearest other vector of each, `[texts]`, by the cosine of `[texts, hidden_size]` of length 1."""
    cosines = vectors @ vectors.T
    return cosines.fill_diagonal_(-torch.inf).argmax(-1)
