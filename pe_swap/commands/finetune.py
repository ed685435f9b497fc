"""`scripts/finetune.py`: swap a model, fine-tune it, save it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from pe_swap.errors import ConfigError, DivergedError
from pe_swap.evaluation.evaluator import Evaluator
from pe_swap.runs import data
from pe_swap.runs.config import DataSection, FinetuneConfig, MeasureSection, resolved
from pe_swap.runs.models import apply_scheme, content_hashes, is_causal, is_configuration, load_model, scheme_name, start_model
from pe_swap.runs.records import Stopwatch, environment, fingerprint, is_main_process, read_record, write_record
from pe_swap.training.resume import CHECKPOINTS, require_not_stopped, require_same_run, settings_that_matter
from pe_swap.training.trainer import train


def perplexity(model: PreTrainedModel, evaluator: Evaluator) -> float | None:
    """Return the perplexity at the evaluator's first length, or None where the model cannot take it."""
    was_training = model.training
    model.eval()
    protocol = "nonoverlapping" if is_causal(model) else "masked"
    measured = evaluator.measured(model, protocol, evaluator.measure.lengths[0])
    model.train(was_training)
    found: float | None = measured["perplexity"]
    return found


def text_digest(section: DataSection) -> str:
    """Return a hash of the text that a section names, of both parts: the text itself, wherever it lies."""
    return _joint_digest(data.load_documents(section, "train"), data.load_documents(section, "eval"))


def _joint_digest(train_texts: Sequence[str], eval_texts: Sequence[str]) -> str:
    """Return one hash of a text's two parts."""
    return fingerprint([data.digest(train_texts), data.digest(eval_texts)])


def run_fingerprint(config: FinetuneConfig, text_key: str) -> str:
    """Return a short hash of all that decides a run's numbers.

    Args:
        config: the run's.
        text_key: `text_digest` of its data. Of local models, tokenizers and configurations the content counts too.
    """
    return fingerprint(
        [settings_that_matter(resolved(config)), text_key, content_hashes(config.model), content_hashes(config.tokenizer)]
    )


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Swap, fine-tune and save; return the record, which is also written to the output folder.

    Whatever the output folder holds of a run before stays as it is until all input has been checked.

    Raises:
        DivergedError: the training ended with losses or weights that are not finite; the record says so too.
        PESwapError: the configuration, the text, the model or the scheme cannot be used.
    """
    watch, out = Stopwatch(), Path(config.out)
    settings = resolved(config)
    train_texts, eval_texts = data.load_documents(config.data, "train"), data.load_documents(config.data, "eval")
    text_key = _joint_digest(train_texts, eval_texts)
    key = run_fingerprint(config, text_key)
    previous = read_record(out)
    if not config.resume:
        require_not_stopped(out, previous)
    elif previous is not None:
        require_same_run(out, previous, key, settings, text_key)
    set_seed(config.seed)
    tokenizer = _tokenizer(config, train_texts)
    train_documents, eval_documents = (data.tokenized(part, tokenizer) for part in (train_texts, eval_texts))
    length = min(config.data.block_size, max(len(document) for document in eval_documents))
    measure = MeasureSection(lengths=[length], max_document_tokens=16 * length, max_documents=20)
    evaluator = Evaluator(eval_documents, tokenizer, measure, config.seed)
    scratch = is_configuration(config.model)
    model = start_model(config.model, tokenizer) if scratch else load_model(str(config.model))
    record: dict[str, Any] = {
        "kind": "finetune",
        "status": "running",
        "fingerprint": key,
        "config": settings,
        **environment(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "seed": config.seed,
        "data": {"train": data.describe(train_documents), "eval": data.describe(eval_documents), "sha256": text_key},
        "perplexity": {"length": length, "before_swap": perplexity(model, evaluator)},
    }
    apply_scheme(model, config.scheme)
    record["scheme"] = scheme_name(model)
    record["perplexity"]["after_swap"] = perplexity(model, evaluator)
    is_main = is_main_process()

    def discard_previous_run() -> None:
        """Let go of the run before: of its checkpoints, which a later resume would take for this run's own, and its record."""
        if is_main:
            if not config.resume and (out / CHECKPOINTS).exists():
                shutil.rmtree(out / CHECKPOINTS)
            write_record(out, record)

    record["training"] = train(
        model,
        tokenizer,
        train_documents,
        config.train,
        block_size=config.data.block_size,
        seed=config.seed,
        out=out,
        resume=config.resume,
        on_start=discard_previous_run,
    )
    trained = config.train.max_steps > 0
    record["perplexity"]["after_training"] = perplexity(model, evaluator) if trained else None
    diverged = trained and has_diverged(model, record)
    record |= {"status": "diverged" if diverged else "done", "seconds": watch.seconds}
    if is_main:
        write_record(out, record)
    if diverged:
        raise DivergedError(
            f"The training in '{out}' diverged: its losses or weights are not finite, and the model saved there is of no use "
            f"(train.learning_rate {config.train.learning_rate:g}). Train again with a lower --train.learning_rate, or more "
            "--train.warmup_steps."
        )
    return record


def has_diverged(model: PreTrainedModel, record: dict[str, Any]) -> bool:
    """Tell whether training left a loss, a weight or a perplexity that is not finite."""
    lost = record["perplexity"]["after_training"] is None and record["perplexity"]["after_swap"] is not None
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    return lost or not finite or not math.isfinite(record["training"]["train_loss"])


def _tokenizer(config: FinetuneConfig, documents: Sequence[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer a configuration asks for."""
    if config.vocab_size is not None:
        return data.train_tokenizer(documents, config.vocab_size)
    if config.tokenizer is not None:
        return data.load_tokenizer(config.tokenizer)
    if is_configuration(config.model):
        raise ConfigError(
            "A model started from a configuration needs a tokenizer. Name one (--tokenizer), or train one (--vocab_size 1024)."
        )
    return data.load_tokenizer(str(config.model))
