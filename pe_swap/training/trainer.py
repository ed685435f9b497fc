"""Fine-tuning a swapped model, through transformers' Trainer."""

from __future__ import annotations

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
)

from pe_swap.errors import CheckpointError, ConfigError, DataError
from pe_swap.patching.install import positional_parameters
from pe_swap.runs import data
from pe_swap.runs.config import PositionSampling, TrainSection
from pe_swap.runs.models import is_causal, longest_input
from pe_swap.runs.records import fingerprint, is_main_process
from pe_swap.saving.model_card import record_fine_tuning
from pe_swap.training.chunked_loss import loss_in_chunks
from pe_swap.training.position_sampling import require_positions, with_sampled_positions
from pe_swap.training.resume import CHECKPOINTS, last_checkpoint


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
        if is_main_process():
            model.save_pretrained(out)
            _save_tokenizer(tokenizer, model, out)
        return {"steps": 0, "train_loss": None, "blocks": 0, "dropped_tokens": 0, "log": []}
    limit = longest_input(model)
    if limit is not None and block_size > limit:
        raise ConfigError(
            f"data.block_size is {block_size:,}, but the model's positions end at {limit:,}. Use blocks of at most {limit:,}, or swap "
            "to a scheme that goes on."
        )
    packed, dropped = data.blocks(documents, tokenizer, block_size, causal=is_causal(model))
    arguments = _arguments(section, seed, out)
    if section.gradient_checkpointing:  # on the model, as the Trainer's argument changes its name within v5
        _checkpoint_activations(model)
    collator = causal_batch
    if not is_causal(model):
        if tokenizer.mask_token is None:
            raise DataError("The tokenizer has no mask token, which an encoder's training needs. Name the model's own tokenizer.")
        collator = MaskedBatch(tokenizer, section.mlm_probability, seed)
    if section.positions is not None:
        require_positions(model, section.positions, block_size, limit)
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


def uses_bf16(section: TrainSection) -> bool:
    """Tell whether a training runs in mixed precision; 'auto' is where a GPU has bfloat16."""
    if section.bf16 == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return section.bf16


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
            bf16=uses_bf16(section),
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
