"""`scripts/finetune.py`: swap a model, fine-tune it, save it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from pe_swap.commands.held_out import before_swap, by_step, held_out_evaluator, perplexities, require_measurable
from pe_swap.errors import ConfigError, DivergedError
from pe_swap.runs import data
from pe_swap.runs.config import FinetuneConfig, resolved
from pe_swap.runs.models import (
    apply_scheme,
    content_hashes,
    described,
    device_of_process,
    is_causal_configuration,
    is_configuration,
    is_headless,
    load_model,
    require_vocabulary,
    scheme_name,
    start_model,
)
from pe_swap.runs.output import OutputFolder, require_free, require_output_folder
from pe_swap.runs.recall import asked_places, words_tokenizer
from pe_swap.runs.records import RECORD, Stopwatch, environment, fingerprint, is_main_process, read_record, write_record
from pe_swap.training.callbacks import measured_rows
from pe_swap.training.resume import (
    complete_checkpoints,
    output_of_run,
    require_not_stopped,
    require_same_run,
    settings_that_matter,
)
from pe_swap.training.trainer import require_training_settings, train
from pe_swap.training.transition import needs_no_head, needs_teacher, require_fading, require_transition, teacher_of


def finetune(config: FinetuneConfig, text: data.Text | None = None) -> dict[str, Any]:
    """Swap, fine-tune and save; return the record, which is also written to the output folder.

    The output folder stays as it is until all input has been checked. A finished run that is resumed stays as it is.

    Args:
        config: model, scheme, text, and how to train.
        text: what `config.data` names, where it has been read already.

    Raises:
        DivergedError: the training ended with losses or weights that are not finite; the record says so too.
        PESwapError: the configuration, the text, the model, the scheme or the output folder cannot be used.
    """
    watch, out = Stopwatch(), Path(config.out)
    require_output_folder(out, (config.model, config.tokenizer))
    require_training_settings(config.train)
    require_measurable(config.train, config.data)
    text = data.load_text(config.data) if text is None else text
    key = run_fingerprint(config, text.key)
    output, finished = open_output(config, out, key, text.key)
    if finished is not None:
        print(f"'{out}' holds this run, finished: nothing is trained", file=sys.stderr, flush=True)
        return finished
    set_seed(config.seed)
    tokenizer = _tokenizer(config, text.train)
    train_documents, eval_documents = text.tokens(tokenizer)
    data.require_tokens(train_documents, "train")
    data.require_tokens(eval_documents, "eval")
    if is_configuration(config.model):
        model, with_head = start_model(config.model, tokenizer), True
    else:
        name = str(config.model)
        with_head = not (needs_no_head(config.train.transition, config.train.max_steps) and is_headless(name))
        model = load_model(name, with_head=with_head)
    clear_device_cache(garbage_collection=True)  # of the training before: a swapped model is a reference cycle
    model.to(device_of_process())  # the Trainer would, but only after perplexities have been measured
    require_vocabulary(model, tokenizer)
    if not with_head and config.train.eval_steps:
        raise ConfigError(f"train.eval_steps measures perplexity, and '{config.model}' has no head for words. Leave it out.")
    evaluator = None if config.data.recall or not with_head else held_out_evaluator(config, eval_documents, tokenizer)
    record: dict[str, Any] = {
        "kind": "finetune",
        "status": "running",
        "fingerprint": key,
        "config": resolved(config),
        **environment(),
        "processes": processes(),
        "seed": config.seed,
        "data": {
            "train": data.describe(train_documents),
            "eval": data.describe(eval_documents),
            "sha256": text.key,
            "repeated_documents": text.repeated,
        },
    }
    transition = config.train.transition
    require_transition(
        transition,
        model,
        str(config.model),
        is_control=config.scheme.is_control,
        is_trained=not is_configuration(config.model),
        positions=config.train.positions,
        block_size=config.data.block_size,
    )
    before = None if evaluator is None else before_swap(config, text, model, evaluator)
    teacher = teacher_of(model, transition) if needs_teacher(transition) else None
    apply_scheme(model, config.scheme)
    if transition.fade_steps:
        require_fading(model)
    record["scheme"] = scheme_name(model)
    measured: list[dict[str, Any]] = []
    if evaluator is not None:
        length = evaluator.measure.lengths[0]
        swapped = perplexities(model, evaluator, {length: before} if config.scheme.is_control else {})
        measured += measured_rows(0, swapped)
        record["perplexity"] = {"length": length, "before_swap": before, "after_swap": swapped[length]}
    write = record_writer(output, record)

    def start() -> None:
        """Delete what an earlier run wrote, whose checkpoints a later resume would take for this run's, and write the record."""
        if is_main_process() and not config.resume:
            output.delete()
        if text.repeated:
            print(f"{text.repeated:,} documents to measure on are also trained on: the text repeats them", file=sys.stderr)
        write()

    record["training"] = train(
        model,
        tokenizer,
        train_documents,
        config.train,
        block_size=config.data.block_size,
        seed=config.seed,
        output=output,
        asked=asked_places(config.data.recall, config.data.block_size) if config.data.recall else None,
        resume=config.resume,
        teacher=teacher,
        measure=None if evaluator is None else lambda: perplexities(model, evaluator),
        on_start=start,
        on_checkpoint=write,
    )
    measured += record["training"].pop("measured")
    if evaluator is not None:
        trained = config.train.max_steps > 0
        end = perplexities(model, evaluator) if trained else {}
        record["perplexity"]["after_training"] = end[record["perplexity"]["length"]] if trained else None
        if config.train.eval_steps:
            before_end = [row for row in measured if row["step"] < config.train.max_steps]
            rows = [*before_end, *measured_rows(config.train.max_steps, end)]
            record["perplexity"]["by_step"] = by_step(config, record["processes"], rows)
    close_record(record, model, config, watch, write)
    return record


def close_record(
    record: dict[str, Any], model: PreTrainedModel, config: FinetuneConfig, watch: Stopwatch, write: Callable[[], None]
) -> None:
    """Write into the record of a run whether its training came to something, and how long all took.

    Raises:
        DivergedError: it did not.
    """
    diverged = config.train.max_steps > 0 and has_diverged(model, record)
    record |= {"status": "diverged" if diverged else "done", "seconds": watch.seconds}
    write()
    if diverged:
        raise DivergedError(
            f"The training in '{config.out}' diverged: its losses or weights are not finite, and the model saved there is of no use "
            f"(train.learning_rate {config.train.learning_rate:g}). Train again with a lower --train.learning_rate, or more "
            "--train.warmup_steps."
        )


def open_output(config: FinetuneConfig, out: Path, key: str, text_key: str) -> tuple[OutputFolder, dict[str, Any] | None]:
    """Return the output folder, with the files in it that are a run's, and the record of the run if it is finished.

    Raises:
        PESwapError: the folder holds what this run would mix with, or delete.
    """
    previous = read_record(out)
    output = output_of_run(out, previous)
    if config.resume:
        if config.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other. Drop one of them.")
        require_same_run(out, previous, key, resolved(config), text_key, processes())
        if previous is not None and previous["status"] == "diverged":
            raise DivergedError(
                f"The training in '{out}' diverged before, and nothing it depends on has changed. Train with a lower learning_rate, or "
                "more warmup_steps."
            )
        return output, previous if previous is not None and previous["status"] == "done" else None
    if is_main_process():  # the others may come here when the first one has begun to write
        nothing_to_lose = previous is not None and previous.get("status") == "running" and not complete_checkpoints(out)
        if not config.overwrite:
            require_not_stopped(out, previous)
        require_free(output, overwrite=config.overwrite or nothing_to_lose)
    return output, None


def record_writer(output: OutputFolder, record: dict[str, Any]) -> Callable[[], None]:
    """Return a function that writes the record, with the run's files, if this process writes."""

    def write() -> None:
        if is_main_process():
            output.files.add(RECORD)
            record["files"] = sorted(output.files)
            write_record(output.path, record)

    return write


def has_diverged(model: PreTrainedModel, record: dict[str, Any]) -> bool:
    """Tell whether training left a loss, a weight or a perplexity that is not finite."""
    measured = record.get("perplexity")
    lost = measured is not None and measured["after_training"] is None and measured["after_swap"] is not None
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    return lost or not finite or not math.isfinite(record["training"]["train_loss"])


def run_fingerprint(config: FinetuneConfig, text_key: str) -> str:
    """Return a short hash of all that decides a run's numbers.

    Args:
        config: the run's.
        text_key: `Text.key` of its text. Of local models, tokenizers and configurations the content counts too.
    """
    return fingerprint(
        [settings_that_matter(resolved(config)), text_key, content_hashes(config.model), content_hashes(config.tokenizer)]
    )


def processes() -> int:
    """Return how many processes train together, from the launcher's variable."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _tokenizer(config: FinetuneConfig, documents: Sequence[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer a configuration asks for."""
    if config.data.recall:
        if config.vocab_size is not None or config.tokenizer is not None:
            raise ConfigError("data.recall has a token per word, so it takes no tokenizer and no vocab_size. Drop them.")
        return words_tokenizer(config.data.recall.words)
    if config.vocab_size is not None:
        masked = is_configuration(config.model) and not is_causal_configuration(described(config.model))
        return data.train_tokenizer(documents, config.vocab_size, masked=masked)
    if config.tokenizer is not None:
        return data.load_tokenizer(config.tokenizer)
    if is_configuration(config.model):
        raise ConfigError(
            "A model started from a configuration needs a tokenizer. Name one (--tokenizer), or train one (--vocab_size 1024)."
        )
    return data.load_tokenizer(str(config.model))
