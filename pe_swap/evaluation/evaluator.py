"""Evaluate a model at every length under every protocol, on tokens that are the same for every model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pe_swap.errors import DataError, PositionRangeError
from pe_swap.evaluation.bootstrap import perplexity_interval
from pe_swap.evaluation.losses import check_head, target_losses
from pe_swap.evaluation.measures.masked import masked_windows, masks
from pe_swap.evaluation.measures.protocols import windows
from pe_swap.runs.config import MeasureSection
from pe_swap.runs.data import document_start
from pe_swap.runs.models import is_causal, longest_input

Example = tuple[list[int], list[int], list[bool]]
"""Inputs, targets, and which targets are scored; of one length."""


NOTHING: dict[str, Any] = {"perplexity": None, "ci_low": None, "ci_high": None, "tokens": 0, "loss_by_position": []}
"""What a row says where nothing was measured, beside its `error`."""

DIVERGED = (
    "the model's losses are not finite, or too large for a perplexity: it diverged. Train it again at a lower learning rate"
)


@dataclass(frozen=True)
class Evaluator:
    """Documents and the way to measure on them.

    Attributes:
        documents: token ids of each document, without special tokens.
        tokenizer: whose tokens they are.
        measure: lengths and protocols.
        seed: of masks and intervals.
    """

    documents: Sequence[Sequence[int]]
    tokenizer: PreTrainedTokenizerBase
    measure: MeasureSection
    seed: int = 0

    def rows(
        self, model: PreTrainedModel, label: str, scheme: str, *, progress: Callable[[str], None] = lambda text: None
    ) -> list[dict[str, Any]]:
        """Return one row a protocol and length; a length the model cannot take, or a loss that is not finite, is a row with `error`.

        Raises:
            DataError: no document is long enough for any of the lengths.
            UnsupportedModelError: a model whose head is not what its logits come from.
        """
        check_head(model)
        protocols = list(self.measure.protocols) if is_causal(model) else ["masked"]
        rows = []
        for protocol in protocols:
            for length in self.measure.lengths:
                progress(f"{label}: {protocol} at {length:,}")
                row = {"model": label, "scheme": scheme, "protocol": protocol, "length": length}
                rows.append({**row, **self.measured(model, protocol, length)})
        if all(row["error"] for row in rows) and not any(
            self._has_examples(protocol, length) for protocol in protocols for length in self.measure.lengths
        ):
            raise DataError(f"Nothing can be measured on this text: {rows[0]['error']}")
        return rows

    def _has_examples(self, protocol: str, length: int) -> bool:
        """Tell whether the documents are long enough for a length."""
        try:
            self.examples(protocol, length)
        except DataError:
            return False
        return True

    def measured(self, model: PreTrainedModel, protocol: str, length: int) -> dict[str, Any]:
        """Return perplexity, interval, tokens and loss by position at one length, or why there are none."""
        limit = longest_input(model)
        if limit is not None and length > limit:
            return {
                **NOTHING,
                "error": f"{length:,} tokens are more than the {limit:,} positions this model has; swap it to go on",
            }
        try:
            examples, owners = self.examples(protocol, length)
            losses, positions = self.losses(model, examples)
        except (PositionRangeError, DataError) as error:
            return {**NOTHING, "error": str(error)}
        sums, counts = np.zeros(len(self.documents)), np.zeros(len(self.documents))
        for owner, loss in zip(owners, losses, strict=True):
            sums[owner] += float(loss.sum())
            counts[owner] += len(loss)
        if not np.isfinite(sums).all():
            return {**NOTHING, "error": DIVERGED}
        used = counts > 0
        perplexity, low, high = perplexity_interval(
            sums[used], counts[used], samples=self.measure.bootstrap_samples, seed=self.seed
        )
        if not np.isfinite([perplexity, low, high]).all():
            return {**NOTHING, "error": DIVERGED}
        return {
            "perplexity": perplexity,
            "ci_low": low,
            "ci_high": high,
            "tokens": int(counts.sum()),
            "error": None,
            "loss_by_position": by_position(losses, positions),
        }

    def examples(self, protocol: str, length: int) -> tuple[list[Example], list[int]]:
        """Return every forward pass's inputs and targets, and the document each belongs to."""
        documents = [list(document[: self.measure.max_document_tokens]) for document in self.documents]
        documents = documents[: self.measure.max_documents]
        if protocol == "masked":
            return self._masked(documents, length)
        start = document_start(self.tokenizer)
        tokens = [[*start, *document] for document in documents]
        shortest, longest = min(self.measure.lengths), max(self.measure.lengths)
        found = windows(
            protocol,
            [len(document) for document in tokens],
            length,
            stride=self.measure.stride or max(1, length // 2),
            targets=min(self.measure.targets or max(1, shortest // 2), shortest),
            longest=longest,
        )
        examples = []
        for window in found:
            document = tokens[window.document]
            scored = [index >= window.first_target for index in range(window.start + 1, window.stop + 1)]
            examples.append((document[window.start : window.stop], document[window.start + 1 : window.stop + 1], scored))
        return examples, [window.document for window in found]

    def _masked(self, documents: list[list[int]], length: int) -> tuple[list[Example], list[int]]:
        """Return the windows of a masked language model."""
        tokenizer = self.tokenizer
        if tokenizer.mask_token_id is None:
            raise DataError(
                "The tokenizer has no mask token, so a masked language model cannot be evaluated. Name its own tokenizer."
            )
        before = [] if tokenizer.cls_token_id is None else [int(tokenizer.cls_token_id)]
        after = [] if tokenizer.sep_token_id is None else [int(tokenizer.sep_token_id)]
        if length <= len(before) + len(after):
            raise DataError(f"A length of {length} leaves no room between [CLS] and [SEP]; it must be at least 3.")
        longest = max(len(document) for document in documents) + len(before) + len(after)
        if longest < length:
            raise DataError(
                f"No document has {length:,} tokens (the longest has {longest:,}); a length needs one that fills it. Use shorter lengths, "
                "or longer documents."
            )
        chosen = masks([len(document) for document in documents], self.measure.mask_probability, self.seed)
        examples, owners = [], []
        for owner, (document, mask) in enumerate(zip(documents, chosen, strict=True)):
            for example in masked_windows(
                document, mask, length, before=before, after=after, mask_token=int(tokenizer.mask_token_id)
            ):
                examples.append(example)
                owners.append(owner)
        return examples, owners

    def losses(self, model: PreTrainedModel, examples: Sequence[Example]) -> tuple[list[Tensor], list[Tensor]]:
        """Return each example's losses, nats, and the index in the window of the last token each target sees.

        Examples of one length go through the model together; no padding is involved.
        """
        device = model.device
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, (inputs, _, _) in enumerate(examples):
            by_length[len(inputs)].append(index)
        losses: list[Tensor] = [torch.zeros(0)] * len(examples)
        positions: list[Tensor] = [torch.zeros(0)] * len(examples)
        for length, members in by_length.items():
            size = max(1, self.measure.batch_tokens // length)
            for batch in (members[start : start + size] for start in range(0, len(members), size)):
                input_ids, targets, scored = (
                    torch.tensor([examples[index][part] for index in batch], device=device) for part in range(3)
                )
                found = target_losses(model, input_ids, targets, scored).cpu()
                counts = scored.sum(1).tolist()
                for index, loss, row in zip(batch, torch.split(found, counts), scored.cpu(), strict=True):
                    losses[index], positions[index] = loss, row.nonzero()[:, 0]
        return losses, positions


def by_position(losses: Iterable[Tensor], positions: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Return the mean loss of targets by how many tokens they see: 1, 2 to 3, 4 to 7, and so on in powers of two."""
    loss = torch.cat([torch.as_tensor(part, dtype=torch.float64) for part in losses])
    seen = torch.cat([torch.as_tensor(part, dtype=torch.int64) for part in positions]) + 1
    rows = []
    for exponent in range(int(seen.max()).bit_length() if len(seen) else 0):
        low, high = 2**exponent, 2 ** (exponent + 1) - 1
        chosen = (seen >= low) & (seen <= high)
        if chosen.any():
            rows.append({"from": low, "to": high, "tokens": int(chosen.sum()), "loss": float(loss[chosen].mean())})
    return rows
