"""Evaluate a model with every measure at every length, on tokens that are the same for every model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pe_swap.errors import DataError, PositionRangeError
from pe_swap.evaluation.bootstrap import perplexity_interval
from pe_swap.evaluation.losses import check_head
from pe_swap.evaluation.measures import MEASURES, Measure, Perplexity, Probe, chosen, measure
from pe_swap.evaluation.measures.base import example_losses
from pe_swap.evaluation.rows import PROTOCOL_VERSION, PerplexityRow, PositionLoss, ProbeRow
from pe_swap.evaluation.text import Text, where_first_token_stands
from pe_swap.runs.config import MeasureSection
from pe_swap.runs.models import is_causal, longest_input

DIVERGED = (
    "the model's losses are not finite, or too large for a perplexity: it diverged. Train it again at a lower learning rate"
)


def unmeasured_row(model: str, scheme: str, protocol: str, length: int, error: str, first_token: str = "") -> PerplexityRow:
    """Return the row of a length at which nothing was measured."""
    return {
        "model": model, "scheme": scheme, "seeds": [], "protocol": protocol, "protocol_version": PROTOCOL_VERSION,
        "first_token": first_token,
        "length": length, "perplexity": None, "ci_low": None, "ci_high": None, "bits_per_byte": None, "tokens": 0, "documents": 0,
        "loss_by_position": [], "document_losses": [], "document_tokens": [], "document_bytes": None,
        "control": None, "ratio": None, "ratio_low": None, "ratio_high": None, "error": error,
    }  # fmt: skip


@dataclass(frozen=True)
class Evaluator:
    """Documents and the way to measure on them.

    Attributes:
        documents: token ids of each document, without special tokens, before `measure` cuts them.
        tokenizer: whose tokens they are.
        measure: lengths, measures and their settings.
        seed: of masks, intervals and probes.
        byte_ends: `Text.byte_ends` of the documents; None where not known, and then there are no bits per byte.
    """

    documents: Sequence[Sequence[int]]
    tokenizer: PreTrainedTokenizerBase
    measure: MeasureSection
    seed: int = 0
    byte_ends: Sequence[Sequence[int]] | None = None

    def text(self, *, causal: bool = True) -> Text:
        """Return what is measured on: at most `max_documents` documents, of each at most `max_document_tokens` tokens."""
        documents, tokens = slice(self.measure.max_documents), slice(self.measure.max_document_tokens)
        ends = self.byte_ends
        return Text(
            documents=[document[tokens] for document in self.documents[documents]],
            byte_ends=None if ends is None else [document[tokens] for document in ends[documents]],
            tokenizer=self.tokenizer,
            settings=self.measure,
            seed=self.seed,
            first_token=where_first_token_stands(self.tokenizer, self.measure),
            is_causal=causal,
        )

    def measures(self, *, causal: bool) -> list[Measure]:
        """Return the measures that a model takes: of an encoder, `masked` in place of the protocols, where any is asked for.

        Raises:
            UnknownNameError: the settings name a measure that is not there.
            ConfigError: an option of a measure is wrong.
        """
        asked = chosen(self.measure)
        found = [one for one in asked if (one.for_decoders if causal else one.for_encoders)]
        if not causal and self.measure.protocols and not any(isinstance(one, Perplexity) for one in found):
            names = [name for name in MEASURES.names() if issubclass(MEASURES[name], Perplexity) and MEASURES[name].for_encoders]
            found = [*(measure(name, self.measure.options.get(name)) for name in names), *found]
        return found

    def needs_vocabulary(self, *, causal: bool) -> bool:
        """Tell whether any measure of a model needs what leads from its hidden states to words."""
        return any(one.needs_vocabulary for one in self.measures(causal=causal))

    def rows(
        self, model: PreTrainedModel, label: str, scheme: str, *, progress: Callable[[str], None] = lambda text: None
    ) -> list[PerplexityRow]:
        """Return one row per perplexity and length; a length the model cannot take, or a loss that is not finite, is a row with `error`.

        Raises:
            DataError: no document is long enough for any of the lengths.
            UnsupportedModelError: a model whose head is not what its logits come from.
        """
        text = self.text(causal=is_causal(model))
        measures = [one for one in self.measures(causal=text.is_causal) if isinstance(one, Perplexity)]
        if self.needs_vocabulary(causal=text.is_causal):
            check_head(model)
        rows = []
        for one in measures:
            for length in self.measure.lengths:
                progress(f"{label}: {one.name} at {length:,}")
                row = self.measured(model, one.name, length)
                row["model"], row["scheme"] = label, scheme
                rows.append(row)
        if (
            rows
            and all(row["error"] for row in rows)
            and not any(self._has_examples(one, length) for one in measures for length in self.measure.lengths)
        ):
            raise DataError(f"Nothing can be measured on this text: {rows[0]['error']}")
        return rows

    def _has_examples(self, one: Perplexity, length: int) -> bool:
        """Tell whether the documents are long enough for a length."""
        try:
            one.examples(self.text(causal=one.for_decoders), length)
        except DataError:
            return False
        return True

    def measured(self, model: PreTrainedModel, protocol: str, length: int) -> PerplexityRow:
        """Return the row of one perplexity at one length, without labels."""
        text = self.text(causal=is_causal(model))

        def unmeasured(error: str) -> PerplexityRow:
            return unmeasured_row("", "", protocol, length, error, text.first_token)

        if too_long := self._too_long(model, length):
            return unmeasured(too_long)
        one = measure(protocol, self.measure.options.get(protocol))
        assert isinstance(one, Perplexity), f"{protocol} is no perplexity"
        try:
            examples = one.examples(text, length)
            losses, positions = example_losses(model, examples, self.measure)
        except (PositionRangeError, DataError) as error:
            return unmeasured(str(error))
        size = len(text.documents)
        sums, counts, sizes = np.zeros(size), np.zeros(size, dtype=int), np.zeros(size, dtype=int)
        for example, loss in zip(examples, losses, strict=True):
            sums[example.document] += float(loss.sum())
            counts[example.document] += len(loss)
            sizes[example.document] += text.bytes_of(example.document, example.tokens) or 0
        if not np.isfinite(sums).all():
            return unmeasured(DIVERGED)
        used = counts > 0
        perplexity, low, high = perplexity_interval(
            sums[used], counts[used].astype(float), samples=self.measure.bootstrap_samples, seed=self.seed
        )
        if not np.isfinite([value for value in (perplexity, low, high) if value is not None]).all():
            return unmeasured(DIVERGED)
        has_bytes = text.byte_ends is not None and bool(sizes.sum())
        return {
            **unmeasured(""),
            "perplexity": perplexity,
            "ci_low": low,
            "ci_high": high,
            "bits_per_byte": float(sums.sum() / np.log(2) / sizes.sum()) if has_bytes else None,
            "tokens": int(counts.sum()),
            "documents": int(used.sum()),
            "loss_by_position": by_position(losses, positions, length),
            "document_losses": [sums[used].tolist()],
            "document_tokens": counts[used].tolist(),
            "document_bytes": sizes[used].tolist() if has_bytes else None,
            "error": None,
        }

    def probe_rows(
        self, model: PreTrainedModel, label: str, scheme: str, *, progress: Callable[[str], None] = lambda text: None
    ) -> list[ProbeRow]:
        """Return the readings of every probe at every length; what cannot be measured is a row with `error`."""
        text = self.text(causal=is_causal(model))
        rows: list[ProbeRow] = []
        for one in self.measures(causal=text.is_causal):
            if not isinstance(one, Probe):
                continue
            for length in one.lengths(self.measure):
                progress(f"{label}: {one.name} at {length:,}")
                row: ProbeRow = {
                    "model": label, "scheme": scheme, "seeds": [], "measure": one.name, "protocol_version": PROTOCOL_VERSION,
                    "length": length, "quantity": "", "at": {}, "value": None, "count": 0, "error": self._too_long(model, length),
                }  # fmt: skip
                if row["error"] is not None:
                    rows.append(row)
                    continue
                try:
                    for found in one.readings(model, text, length):
                        finite = bool(np.isfinite(found.value))
                        rows.append(
                            {
                                **row,
                                "quantity": found.quantity,
                                "at": dict(found.at),
                                "value": found.value if finite else None,
                                "count": found.count,
                                "error": None if finite else DIVERGED,
                            }
                        )
                except (PositionRangeError, DataError) as error:
                    rows.append({**row, "error": str(error)})
        return rows

    def _too_long(self, model: PreTrainedModel, length: int) -> str | None:
        """Return why a model cannot take a length, or None."""
        limit = longest_input(model)
        if limit is None or length <= limit:
            return None
        return f"{length:,} tokens are more than the {limit:,} positions this model has; swap it to go on"


def by_position(losses: Iterable[Tensor], positions: Iterable[Tensor], length: int) -> list[PositionLoss]:
    """Return the mean loss of targets by how many tokens they are predicted from.

    The ranges are 1, 2, 3 to 4, 5 to 8, and so on up to powers of two, the last one up to the length, so that a length that is a
    power of two ends with a whole range.
    """
    loss = torch.cat([torch.as_tensor(part, dtype=torch.float64) for part in losses])
    context = torch.cat([torch.as_tensor(part, dtype=torch.int64) for part in positions]) + 1
    rows: list[PositionLoss] = []
    first, last = 1, 1
    while first <= length:
        inside = (context >= first) & (context <= last)
        if inside.any():
            mean = float(loss[inside].mean())
            rows.append({"first": first, "last": min(last, length), "tokens": int(inside.sum()), "loss": mean})
        first, last = last + 1, 2 * last
    return rows
