"""What a training is measured by: perplexity on held-out text before the swap, after it, while it trains and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pe_swap.errors import ConfigError, DataError
from pe_swap.evaluation.evaluator import Evaluator
from pe_swap.runs import data
from pe_swap.runs.config import DataSection, FinetuneConfig, MeasureSection, TrainSection, resolved
from pe_swap.runs.models import content_hashes, is_causal, is_configuration
from pe_swap.runs.records import fingerprint
from pe_swap.training.transition import faded


def require_measurable(section: TrainSection, source: DataSection) -> None:
    """Refuse to measure perplexity in the course of a training that has no text to measure it on.

    Raises:
        ConfigError: it is asked for.
    """
    if section.eval_steps and source.recall is not None:
        raise ConfigError(
            "train.eval_steps measures perplexity on held-out text, and data.recall has random words in place of it. Leave eval_steps out."
        )


def held_out_evaluator(
    config: FinetuneConfig, documents: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> Evaluator:
    """Return the short evaluation that every record holds: at the trained length, then at `train.eval_lengths`.

    Raises:
        DataError: no document is long enough for one of them.
    """
    section = config.train
    documents = documents[: section.eval_max_documents]
    longest = max(len(document) for document in documents)
    length = min(config.data.block_size, longest)
    tokens = section.eval_max_document_tokens or 16 * length
    lengths = list(dict.fromkeys([length, *section.eval_lengths]))
    if too_long := [length for length in lengths if length > min(tokens, longest)]:
        raise DataError(
            f"A context of {too_long[0]:,} tokens cannot be measured while training: of a held-out document at most {tokens:,} tokens are "
            f"taken (train.eval_max_document_tokens), and the longest has {longest:,}. Name shorter train.eval_lengths, or take more "
            "tokens."
        )
    measure = MeasureSection(lengths=lengths, max_document_tokens=tokens, max_documents=section.eval_max_documents)
    return Evaluator(documents, tokenizer, measure, config.seed)


def before_swap(config: FinetuneConfig, text: data.Text, model: PreTrainedModel, evaluator: Evaluator) -> float | None:
    """Return the perplexity before the swap; of the same files on the same text it is measured once."""
    length = evaluator.measure.lengths[0]
    files = content_hashes(config.model)
    if not files or is_configuration(config.model):
        return perplexity(model, evaluator, length)
    key = fingerprint([files, content_hashes(config.tokenizer), config.vocab_size, resolved(evaluator.measure), config.seed])
    if key not in text.perplexities:
        text.perplexities[key] = perplexity(model, evaluator, length)
    return text.perplexities[key]


def perplexity(model: PreTrainedModel, evaluator: Evaluator, length: int) -> float | None:
    """Return the perplexity at one of the evaluator's lengths, or None where the model cannot take it; an encoder's is that of `masked`."""
    was_training = model.training
    model.eval()
    protocol = "nonoverlapping" if is_causal(model) else "masked"
    found: float | None = evaluator.measured(model, protocol, length)["perplexity"]
    model.train(was_training)
    return found


def perplexities(model: PreTrainedModel, evaluator: Evaluator, known: Mapping[int, float | None] = {}) -> dict[int, float | None]:
    """Return the `perplexity` by length at all of the evaluator's, but for those that are known."""
    lengths = evaluator.measure.lengths
    return {length: known[length] if length in known else perplexity(model, evaluator, length) for length in lengths}


def by_step(config: FinetuneConfig, processes: int, measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was measured by step, with the tokens trained on until then.

    `faded` is the factor that the old positions still had in a measurement.
    """
    section = config.train
    tokens = section.batch_size * section.gradient_accumulation_steps * processes * config.data.block_size
    fade = section.transition.fade_steps
    return [
        {**row, "tokens": row["step"] * tokens, "faded": faded(row["step"], fade) if row["step"] else 0.0} for row in measured
    ]
