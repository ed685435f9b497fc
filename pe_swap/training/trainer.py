"""Fine-tuning a swapped model, through transformers' Trainer."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from pe_swap.errors import CheckpointError, ConfigError, DataError, DivergedError
from pe_swap.evaluation.evaluator import Evaluator, is_causal, longest_input
from pe_swap.patching.install import positional_parameters
from pe_swap.runs import data as text
from pe_swap.runs.config import DataSection, FinetuneConfig, MeasureSection, PositionSampling, TrainSection, resolved
from pe_swap.runs.models import apply_scheme, content_hashes, is_configuration, load_model, scheme_name, start_model
from pe_swap.runs.records import Stopwatch, environment, fingerprint, read_record, write_record
from pe_swap.saving.model_card import record_fine_tuning
from pe_swap.training.chunked_loss import loss_in_chunks
from pe_swap.training.position_sampling import refuse_sampling, with_sampled_positions

CHECKPOINTS = "checkpoints"
"""Folder of the Trainer's checkpoints in a run's output folder."""


class PositionalTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """A Trainer with a learning rate of its own for the parameters that a swap brought, and position ids drawn where asked."""

    def __init__(
        self, *args: Any, positional_learning_rate: float | None = None, positions: PositionSampling | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.positional_learning_rate = positional_learning_rate
        self.positions = positions

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Draw positions, then take the Trainer's step."""
        if self.positions is not None:
            inputs = with_sampled_positions(inputs, self.positions)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Build the Trainer's optimizer, then split its groups."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.positional_learning_rate is not None:
            ours = {id(parameter) for _, parameter in positional_parameters(self.accelerator.unwrap_model(self.model))}
            groups = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            for group in groups:
                for is_ours in (False, True):
                    members = [parameter for parameter in group["params"] if (id(parameter) in ours) is is_ours]
                    if members:
                        learning_rate = self.positional_learning_rate if is_ours else group["lr"]
                        optimizer.add_param_group({**group, "params": members, "lr": learning_rate})
        return optimizer


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Sequence[int]],
    section: TrainSection,
    *,
    block_size: int,
    seed: int,
    out: Path,
    resume: bool = False,
    on_start: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train a model in place and save it, with its tokenizer, in `out`.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        documents: token ids of each document.
        section: how to train.
        block_size: tokens in a block.
        seed: of data order, masks and dropout.
        out: output folder; checkpoints go below it.
        resume: continue from the last checkpoint there. On the same machine the numbers are those of a run never interrupted.
        on_start: called once nothing of the input can be refused any more, before the first step and before anything is written.

    Returns:
        Steps, final training loss, and the loss log. With no steps to train the model is saved as it is.

    Raises:
        CheckpointError: nothing to resume from, or a damaged checkpoint.
        ConfigError: blocks longer than the model's positions, or a value that transformers refuses.
        DataError: not enough text for one block.
    """
    if section.max_steps == 0:
        on_start()
        if _is_main_process():
            model.save_pretrained(out)
            _save_tokenizer(tokenizer, model, out)
        return {"steps": 0, "train_loss": None, "blocks": 0, "dropped_tokens": 0, "log": []}
    limit = longest_input(model)
    if limit is not None and block_size > limit:
        raise ConfigError(
            f"data.block_size is {block_size:,}, but the model's positions end at {limit:,}. Use blocks of at most {limit:,}, or swap "
            "to a scheme that goes on."
        )
    packed, dropped = text.blocks(documents, tokenizer, block_size, causal=is_causal(model))
    arguments = _arguments(section, seed, out)
    if section.gradient_checkpointing:  # on the model, as the Trainer's argument changes its name within v5
        _checkpoint_activations(model)
    collator = causal_batch
    if not is_causal(model):
        if tokenizer.mask_token is None:
            raise DataError("The tokenizer has no mask token, which an encoder's training needs. Name the model's own tokenizer.")
        collator = MaskedBatch(tokenizer, section.mlm_probability, seed)
    if section.positions is not None:
        refuse_sampling(model, section.positions, block_size, limit)
    trainer = PositionalTrainer(
        model=model,
        args=arguments,
        train_dataset=packed,
        data_collator=collator,
        positional_learning_rate=section.positional_learning_rate,
        positions=section.positions,
    )
    checkpoint = last_checkpoint(out) if resume else None
    on_start()
    try:
        with loss_in_chunks(model):
            result = trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        if checkpoint is not None and trainer.state.global_step == 0:
            raise CheckpointError(
                f"Cannot resume from '{checkpoint}': {error}. Delete that folder to resume from the one before, or start anew in "
                "another --out."
            ) from error
        raise
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        _save_tokenizer(tokenizer, model, out)
        if getattr(model.config, "pe_swap", None):
            record_fine_tuning(out, block_size)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "blocks": len(packed),
        "dropped_tokens": dropped,
        "log": [{"step": entry["step"], "loss": entry["loss"]} for entry in log],
    }


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, out: Path) -> None:
    """Save a tokenizer that says how far the model goes: tools truncate by it."""
    tokenizer.model_max_length = longest_input(model) or tokenizer.model_max_length
    tokenizer.save_pretrained(out)


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on, by the name this transformers version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def causal_batch(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return blocks of one token more than their inputs as a batch in which every input has a target.

    Left to shift labels itself, the model would leave the last input without one, and the last row of a learned table untrained.
    """
    tokens = torch.tensor([row["input_ids"] for row in rows])
    targets = tokens[:, 1:].contiguous()
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": targets, "shift_labels": targets}


class MaskedBatch:
    """transformers' random masking, drawn from the batch itself.

    Batches are fetched ahead of the step that trains on them, so a checkpoint's random state is further than its step. Masks that
    follow from the run's seed and the batch's own tokens need no state: a resumed run meets the same ones. Blocks come in other
    batches every epoch, and get other masks.

    Attributes:
        collator: transformers' collator.
        seed: the run's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float, seed: int) -> None:
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)
        self.seed = seed

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Return `input_ids` with masks, `attention_mask`, and `labels` that are -100 where nothing is asked."""
        tokens = fingerprint([self.seed, [row["input_ids"] for row in rows]])
        self.collator.generator = torch.Generator().manual_seed(int(tokens, 16) % 2**63)
        batch: dict[str, Tensor] = self.collator(list(rows))
        return batch


def _arguments(section: TrainSection, seed: int, out: Path) -> TrainingArguments:
    """Return a section as the Trainer's arguments.

    Raises:
        ConfigError: a value that transformers refuses, such as a schedule it does not know.
    """
    try:
        return TrainingArguments(
            output_dir=str(out / CHECKPOINTS),
            max_steps=section.max_steps,
            per_device_train_batch_size=section.batch_size,
            gradient_accumulation_steps=section.gradient_accumulation_steps,
            learning_rate=section.learning_rate,
            warmup_steps=section.warmup_steps,
            weight_decay=section.weight_decay,
            lr_scheduler_type=section.schedule,
            bf16=section.bf16,
            save_steps=section.save_steps,
            save_total_limit=2,
            logging_steps=section.logging_steps,
            logging_nan_inf_filter=False,  # it would log the loss before in place of one that is not finite
            report_to=section.report_to,
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )
    except ValueError as error:
        raise ConfigError(
            f"transformers refuses the section 'train': {error}. Correct it in the YAML file or as --train.*."
        ) from error


def complete_checkpoints(out: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first, without any that a kill left half written.

    The Trainer writes `trainer_state.json` last, so a folder in which it cannot be read is not whole.
    """
    found = []
    for folder in (out / CHECKPOINTS).glob("checkpoint-*"):
        try:
            found.append((int(json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]), folder))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [folder for _, folder in sorted(found)]


def last_checkpoint(out: Path) -> str:
    """Return the newest whole checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    found = complete_checkpoints(out)
    if not found:
        raise CheckpointError(f"There is no checkpoint to resume from in '{out / CHECKPOINTS}'. Run without --resume to start.")
    return str(found[-1])


def _refuse_stopped(out: Path, previous: dict[str, Any] | None) -> None:
    """Refuse to start in the folder of a run that was stopped before its end: its checkpoints are all there is of it.

    Raises:
        CheckpointError: it is one.
    """
    if complete_checkpoints(out) and (previous is None or previous.get("status") == "running"):
        raise CheckpointError(
            f"'{out}' holds checkpoints of a run that was stopped. Continue it with --resume, or start anew in another --out."
        )


def _refuse_another(out: Path, previous: dict[str, Any], key: str, settings: dict[str, Any], text_key: str) -> None:
    """Refuse to resume a run with anything that would change its numbers.

    Raises:
        ConfigError: the configuration, or a file of the model, is not what it was.
        DataError: the text is not what it was.
    """
    if previous.get("fingerprint") in (None, key):
        return
    changed = _changed_keys(_settings_that_matter(previous.get("config") or {}), _settings_that_matter(settings))
    if changed:
        raise ConfigError(
            f"'{out}' holds a run with another configuration (another {', '.join(changed)}); resuming would mix the two. Use the same "
            "options, or another --out."
        )
    if (previous.get("data") or {}).get("sha256") != text_key:
        raise DataError(
            f"'{out}' holds a run on another text: what 'data' names has changed since; resuming would mix the two. Bring the text back, "
            "or start anew in another --out."
        )
    raise ConfigError(
        f"'{out}' holds a run from another model or tokenizer: their files have changed since; resuming would mix the two. Bring them "
        "back, or start anew in another --out."
    )


def _changed_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    found = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changed_keys(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}")
    return found


def perplexity(model: PreTrainedModel, evaluator: Evaluator) -> float | None:
    """Return the perplexity at the evaluator's first length, or None where the model cannot take it."""
    was_training = model.training
    model.eval()
    protocol = "nonoverlapping" if is_causal(model) else "masked"
    measured = evaluator.measured(model, protocol, evaluator.measure.lengths[0])
    model.train(was_training)
    found: float | None = measured["perplexity"]
    return found


def text_digest(data: DataSection) -> str:
    """Return a hash of the text that a section names, of both parts: the text itself, wherever it lies."""
    return _joint_digest(text.texts(data, "train"), text.texts(data, "eval"))


def _joint_digest(train_texts: Sequence[str], eval_texts: Sequence[str]) -> str:
    """Return one hash of a text's two parts."""
    return fingerprint([text.digest(train_texts), text.digest(eval_texts)])


def run_fingerprint(config: FinetuneConfig, text_key: str) -> str:
    """Return a short hash of all that decides a run's numbers.

    Args:
        config: the run's.
        text_key: `text_digest` of its text. Of local models, tokenizers and configurations the content counts too.
    """
    return fingerprint(
        [_settings_that_matter(resolved(config)), text_key, content_hashes(config.model), content_hashes(config.tokenizer)]
    )


def _settings_that_matter(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a run's numbers depend on."""
    return {name: value for name, value in settings.items() if name not in ("out", "resume")}


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Swap, fine-tune and save; return the record, which is also written to the output folder.

    Whatever the output folder holds of a run before stays as it is until all input has been checked.

    Raises:
        DivergedError: the training ended with losses or weights that are not finite; the record says so too.
        PESwapError: the configuration, the text, the model or the scheme cannot be used.
    """
    watch, out = Stopwatch(), Path(config.out)
    settings = resolved(config)
    train_texts, eval_texts = text.texts(config.data, "train"), text.texts(config.data, "eval")
    text_key = _joint_digest(train_texts, eval_texts)
    key = run_fingerprint(config, text_key)
    previous = read_record(out)
    if not config.resume:
        _refuse_stopped(out, previous)
    elif previous is not None:
        _refuse_another(out, previous, key, settings, text_key)
    set_seed(config.seed)
    tokenizer = _tokenizer(config, train_texts)
    train_documents, eval_documents = (text.tokenized(part, tokenizer) for part in (train_texts, eval_texts))
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
        "data": {"train": text.describe(train_documents), "eval": text.describe(eval_documents), "sha256": text_key},
        "perplexity": {"length": length, "before_swap": perplexity(model, evaluator)},
    }
    apply_scheme(model, config.scheme)
    record["scheme"] = scheme_name(model)
    record["perplexity"]["after_swap"] = perplexity(model, evaluator)
    is_main = _is_main_process()

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


def _is_main_process() -> bool:
    """Tell whether this process writes files: the first of a distributed run, or the only one.

    From the launcher's variable, as the process group exists only once the Trainer does.
    """
    return int(os.environ.get("RANK", "0")) == 0


def _tokenizer(config: FinetuneConfig, documents: Sequence[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer a configuration asks for."""
    if config.vocab_size is not None:
        return text.train_tokenizer(documents, config.vocab_size)
    if config.tokenizer is not None:
        return text.load_tokenizer(config.tokenizer)
    if is_configuration(config.model):
        raise ConfigError(
            "A model started from a configuration needs a tokenizer. Name one (--tokenizer), or train one (--vocab_size 1024)."
        )
    return text.load_tokenizer(str(config.model))
