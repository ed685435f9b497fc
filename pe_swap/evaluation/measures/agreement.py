"""How near the embeddings of a swapped encoder are to those of the encoder it was made from.

`cosine(mean states of the model, mean states of the reference)` of the same tokens. It says what a swap changed, and what training
brought back; where the reference itself ends, there is nothing to agree with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field
from transformers import PreTrainedModel

from pe_swap.errors import ConfigError, PositionRangeError
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
    }

    def __init__(self, options: MeasureOptions) -> None:
        super().__init__(options)
        if self.options.reference is None:
            raise ConfigError("it needs the encoder to agree with. Name it with --options.agreement.reference.")
        self._reference: PreTrainedModel | None = None

    def readings(self, model: PreTrainedModel, text: Text, length: int) -> Iterator[Reading]:
        """Yield the mean and the lowest cosine over documents."""
        reference = self.reference()
        limit = longest_input(reference)
        if limit is not None and length > limit:
            raise PositionRangeError(f"{length:,} tokens are more than the {limit:,} positions of the reference")
        rows = first_windows(text, length)[: self.options.documents]
        ours, theirs = (embeddings(one, rows, text.settings) for one in (model, reference.to(model.device)))
        cosines = (ours * theirs).sum(-1)
        yield Reading("cosine", float(cosines.mean()), len(cosines))
        yield Reading("lowest_cosine", float(cosines.min()), len(cosines))

    def reference(self) -> PreTrainedModel:
        """Return the unswapped encoder, loaded once.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        if self._reference is None:
            self._reference = load_model(self.options.reference, with_head=False).eval()
        return self._reference
