"""`scripts/eval_long_context.py`: several models, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own
from transformers import AutoConfig, PreTrainedTokenizerBase

from pe_swap import data as text
from pe_swap.config import EvalConfig, resolved
from pe_swap.errors import CheckpointError, DataError, PESwapError
from pe_swap.evaluation.runner import Evaluator
from pe_swap.models import load_model, scheme_name
from pe_swap.records import Stopwatch, environment, read_record, write_record
from pe_swap.report import write_report


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Evaluate every model and write record, tables and plot; return the record.

    Raises:
        PESwapError: a model or the text cannot be used, or two models have different tokens.
    """
    watch, out = Stopwatch(), Path(config.out)
    for name in config.models:
        require_model(name)
    tokenizer = text.load_tokenizer(config.tokenizer or config.models[0])
    if config.tokenizer is None:
        require_one_vocabulary(config.models, tokenizer)
    documents = text.tokenized(text.texts(_all_for_evaluation(config).data, "eval"), tokenizer)
    evaluator = Evaluator(documents, tokenizer, config, config.seed)
    rows: list[dict[str, Any]] = []
    trained: dict[str, int | None] = {}
    labels = short_labels(config.models)
    bar = tqdm(config.models, desc="models")
    for name in bar:
        model = load_model(name, getattr(torch, config.dtype)).eval()
        if len(tokenizer) > model.config.vocab_size:
            raise DataError(
                f"The tokenizer has {len(tokenizer):,} tokens, the model '{name}' knows {model.config.vocab_size:,}. Models compared "
                "on the same tokens need one vocabulary; name it with --tokenizer, or evaluate this model alone."
            )
        if torch.cuda.is_available():
            model = model.cuda()
        label = labels[name]
        trained[label] = trained_length(model, name)
        rows += evaluator.rows(model, label, scheme_name(model), progress=bar.set_postfix_str)
    record = {
        "kind": "evaluation",
        "status": "done",
        "config": resolved(config),
        **environment(),
        "seed": config.seed,
        "seconds": watch.seconds,
        "data": text.describe(documents),
        "trained_length": trained,
        "results": rows,
    }
    write_record(out, record)
    write_report(out, record)
    return record


def _all_for_evaluation(config: EvalConfig) -> EvalConfig:
    """Return the configuration with its text files all to be evaluated: nothing is held out of an evaluation."""
    if config.data.text_files and not config.data.eval_text_files:
        data = config.data.model_copy(update={"eval_text_files": config.data.text_files})
        return config.model_copy(update={"data": data})
    return config


def require_model(name: str) -> None:
    """Look for a model before any is measured, so that a wrong name costs no time.

    Raises:
        CheckpointError: there is none under that name.
    """
    try:
        AutoConfig.from_pretrained(name)
    except PESwapError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"Cannot load a model from '{name}': {error}. --models takes folders that hold a config.json and weights, or hub names."
        ) from error


def require_one_vocabulary(models: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse models whose own tokenizers differ: the tokens of one mean nothing to the other.

    Raises:
        DataError: a model has another vocabulary than the first.
    """
    for name in models[1:]:
        if text.load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
            raise DataError(
                f"The models '{models[0]}' and '{name}' have different vocabularies; models are compared on the same tokens. Evaluate "
                "them apart, or name the one vocabulary that holds for both with --tokenizer."
            )


def short_labels(models: Sequence[str]) -> dict[str, str]:
    """Return each model's label: the last part of its path, or all of it where two would have the same."""
    last = [Path(name).name or name for name in models]
    return {name: label if last.count(label) == 1 else name for name, label in zip(models, last, strict=True)}


def trained_length(model: Any, name: str) -> int | None:
    """Return the length a model was trained at, for the plot: of our own runs the block size, else that of its own positions."""
    record = read_record(Path(name)) or {}
    if record.get("kind") == "finetune":
        return int(record["config"]["data"]["block_size"])
    swapped = getattr(model.config, "pe_swap", None)
    length = swapped["trained_length"] if swapped else getattr(model.config, "max_position_embeddings", None)
    return None if length is None else int(length)
