"""Fine-tuning a swapped model, through transformers' Trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME

from pe_swap.errors import CheckpointError, ConfigError
from pe_swap.patching.install import holders_of, positional_parameters
from pe_swap.registry import did_you_mean
from pe_swap.runs import data
from pe_swap.runs.config import PositionSampling, TrainSection, TransitionSection
from pe_swap.runs.models import is_causal, longest_input, require_vocabulary
from pe_swap.runs.output import OutputFolder, whole_folder
from pe_swap.runs.progress import on_terminal
from pe_swap.runs.records import is_main_process, uses_gpu
from pe_swap.saving.model_card import record_fine_tuning
from pe_swap.training.batches import collator
from pe_swap.training.callbacks import AfterCheckpoint, LogWhereMeansEnd, LossTotal, PerplexityAtSteps, ProgressLines
from pe_swap.training.chunked_loss import loss_in_chunks
from pe_swap.training.position_sampling import require_positions, with_sampled_positions
from pe_swap.training.resume import CHECKPOINTS, last_checkpoint
from pe_swap.training.transition import MEASURED_BLOCKS, Fading, Transition

ATTENTION_DROPOUTS = ("attn_pdrop", "attention_probs_dropout_prob", "attention_dropout")
"""Configuration fields of the share of attention weights that training drops, by family."""


class PositionalTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """A Trainer with a learning rate of its own for the parameters that a swap adds, a transition, and position ids drawn at random."""

    def __init__(
        self,
        *args: Any,
        positional_learning_rate: float | None = None,
        positions: PositionSampling | None = None,
        measured: PerplexityAtSteps | None = None,
        transition: Transition | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.transition = Transition(TransitionSection(), None, 1) if transition is None else transition
        self.measured = PerplexityAtSteps((), dict) if measured is None else measured
        self.add_callback(self.measured)
        self.positional_learning_rate = positional_learning_rate
        self.positions = positions
        self.losses = LossTotal()
        self.add_callback(self.losses)
        self.add_callback(LogWhereMeansEnd(self.transition.steps))
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            self.add_callback(ProgressLines)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Draw positions, take the Trainer's step, and add its loss, the mean over processes, to the total.

        The total is of the losses after matching, which alone are of one kind.
        """
        if self.positions is not None:
            inputs = with_sampled_positions(inputs, self.positions)
        self.transition.begin(self.state.global_step)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        for parameter in self.transition.untrained(self.accelerator.unwrap_model(model)):
            parameter.grad = None
        if self.transition.is_matching and self.transition.steps < self.args.max_steps:
            return loss
        several = self.accelerator.num_processes > 1
        self.losses.add(self.accelerator.gather(loss.detach().reshape(1)).mean() if several else loss.detach())
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Build the Trainer's optimizer, then split its groups."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.positional_learning_rate is not None or self.transition.section.match_learning_rate is not None:
            model = self.accelerator.unwrap_model(self.model)
            added = {id(parameter) for _, parameter in positional_parameters(model)} - kept_at_model_rate(model)
            groups = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            for group in groups:
                for is_added in (False, True):
                    members = [parameter for parameter in group["params"] if (id(parameter) in added) is is_added]
                    if members:
                        learning_rate = (is_added and self.positional_learning_rate) or group["lr"]
                        optimizer.add_param_group({**group, "params": members, "lr": learning_rate, "is_added": is_added})
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Build the Trainer's schedule; while the training matches, all but what the swap added has its own peak rate."""
        scheduler = super().create_scheduler(*args, **kwargs)
        rate, steps = self.transition.section.match_learning_rate, self.transition.steps
        if rate is not None:
            factor = rate / self.args.learning_rate
            scheduler.lr_lambdas = [
                shape if group.get("is_added") else in_first_steps(shape, factor, steps)
                for group, shape in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True)
            ]
            for group, shape in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * shape(scheduler.last_epoch)
        return scheduler

    def train_from(self, checkpoint: str | None) -> None:
        """Train to the last step, from the first one or from a checkpoint; of the last step's checkpoint nothing is trained.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        try:
            if checkpoint is not None:
                state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
                if state.global_step >= self.args.max_steps:  # the Trainer would take one step more
                    self._load_from_checkpoint(checkpoint)
                    self.state = state
                    self.losses.restore(state)
                    self.measured.restore(state)
                    return
            with self.learning():
                self.train(resume_from_checkpoint=checkpoint)
        except OSError:
            raise
        except Exception as error:
            if checkpoint is not None and self.state.global_step == 0:
                raise CheckpointError(
                    f"Cannot resume from '{checkpoint}': {error}. Delete that folder to resume from the one before, or start anew in "
                    "another --out."
                ) from error
            raise

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Let the model's training calls return what is learned, for as long as the context lasts: a loss on text, or the transition's."""
        first = self.data_collator([self.train_dataset[index] for index in range(min(MEASURED_BLOCKS, len(self.train_dataset)))])
        with self.transition.of(self.model, first), loss_in_chunks(self.model, self.transition.objective):
            yield


def kept_at_model_rate(model: PreTrainedModel) -> set[int]:
    """Return the identities of parameters that a swap brought and that have the rate of the rest; see `Scheme.at_model_rate`."""
    return {
        id(parameter)
        for holder in holders_of(model)
        for scheme in holder
        for name, parameter in scheme.named_parameters()
        if name in scheme.at_model_rate
    }


def in_first_steps(shape: Callable[[int], float], factor: float, steps: int) -> Callable[[int], float]:
    """Return a schedule's shape times a factor in its first steps."""
    return lambda step: shape(step) * (factor if step < steps else 1.0)


def _nothing() -> None:
    """Do nothing."""


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Sequence[int]],
    section: TrainSection,
    *,
    block_size: int,
    seed: int,
    output: OutputFolder,
    asked: Sequence[int] | None = None,
    resume: bool = False,
    teacher: PreTrainedModel | None = None,
    measure: Callable[[], Mapping[int, float | None]] | None = None,
    on_start: Callable[[], None] = _nothing,
    on_checkpoint: Callable[[], None] = _nothing,
) -> dict[str, Any]:
    """Train a model in place and save it, with its tokenizer, in an output folder.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        documents: token ids of each document.
        section: how to train.
        block_size: tokens in a block.
        seed: of data order, masks and dropout.
        output: output folder; checkpoints go below it.
        asked: index in each document of the tokens that are learned; a document is then one block. Every token of blocks packed from
            all documents by default.
        resume: continue from the last checkpoint there. On the same machine the numbers are those of a run never interrupted.
        teacher: the unswapped model, where `section.transition` needs it; see `teacher_of`.
        measure: returns the perplexity of the model as it is now by length, for the steps `section.eval_steps`.
        on_start: called after all checks of the input, before the first step and before anything is written.
        on_checkpoint: called after each checkpoint is written.

    Returns:
        Steps, mean training loss of all steps (where some match, of the others), the loss log with what each step learned, and what
        `measure` returned after which steps. With no steps to train the model is saved as it is.

    Raises:
        CheckpointError: nothing to resume from, or a damaged checkpoint.
        ConfigError: blocks longer than the model's positions, or a value that transformers refuses.
        DataError: not enough text for one block, or a tokenizer that does not fit.
    """
    require_vocabulary(model, tokenizer)
    if section.max_steps == 0:
        on_start()
        if is_main_process():
            with whole_folder(output) as folder:
                model.save_pretrained(folder)
                _save_tokenizer(tokenizer, model, folder)
        return {"steps": 0, "train_loss": None, "blocks": 0, "dropped_tokens": 0, "matched_steps": 0, "log": [], "measured": []}
    _require_positions_for(model, section, block_size)
    if asked is None:
        predicts_next = is_causal(model) and model.base_model is not model
        packed, dropped = data.blocks(documents, tokenizer, block_size, causal=predicts_next)
    else:
        _require_causal(model)
        packed, dropped = data.question_blocks(documents, tokenizer, asked)
    transition = Transition(section.transition, teacher, section.max_steps)
    fade = section.transition.fade_steps
    callbacks: list[TrainerCallback] = [Fading(holders_of(model), fade)] if fade else []
    trainer = PositionalTrainer(
        model=model,
        args=training_arguments(section, seed, output.path),
        train_dataset=packed,
        data_collator=collator(model, tokenizer, section, seed),
        positional_learning_rate=section.positional_learning_rate,
        positions=section.positions,
        measured=None if measure is None else PerplexityAtSteps(section.eval_steps, measure),
        transition=transition,
        callbacks=[*callbacks, AfterCheckpoint(output, on_checkpoint)],
    )
    checkpoint = last_checkpoint(output.path) if resume else None
    if section.gradient_checkpointing:  # on the model, as the Trainer's argument changes its name within v5
        checkpoint_activations(model)
    warn_of_slow_training(model, trainer.args, drops=section.dropout)
    on_start()
    with nullcontext() if section.dropout else without_dropout(model):
        trainer.train_from(checkpoint)
    _save(trainer, tokenizer, output, block_size)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "train_loss": float(trainer.losses.total) / (trainer.state.global_step - transition.steps or trainer.state.global_step),
        "matched_steps": transition.steps,
        "bf16": bool(trainer.args.bf16),
        "blocks": len(packed),
        "dropped_tokens": dropped,
        "log": [
            {"step": entry["step"], "loss": entry["loss"], "objective": transition.objective_at(entry["step"] - 1)}
            for entry in log
        ],
        "measured": trainer.measured.rows,
    }


def _require_causal(model: PreTrainedModel) -> None:
    """Refuse an encoder, which has no next token to be asked for.

    Raises:
        ConfigError: it is one.
    """
    if not is_causal(model):
        raise ConfigError(
            f"data.recall trains models that look back only, and {type(model).__name__} looks both ways. Name a decoder."
        )


def _require_positions_for(model: PreTrainedModel, section: TrainSection, block_size: int) -> None:
    """Refuse blocks, or sampled positions, that the model has no positions for.

    Raises:
        ConfigError: it has none.
    """
    limit = longest_input(model)
    if limit is not None and block_size > limit:
        raise ConfigError(
            f"data.block_size is {block_size:,}, but the model's positions end at {limit:,}. Use blocks of at most {limit:,}, or swap "
            "to a scheme that has no such end."
        )
    if section.positions is not None:
        require_positions(model, section.positions, block_size, limit)


def _save(trainer: PositionalTrainer, tokenizer: PreTrainedTokenizerBase, output: OutputFolder, block_size: int) -> None:
    """Save the trained model, its tokenizer and its card: all of it, or, if the disk fails, nothing."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_writer = trainer.is_world_process_zero()
    with whole_folder(output, is_writer=is_writer) as folder:
        trainer.save_model(str(folder))
        if is_writer:
            _save_tokenizer(tokenizer, model, folder)
            if getattr(model.config, "pe_swap", None):
                said = None if model.config.plain() is None else model.config.said_in_card()
                record_fine_tuning(folder, block_size, said)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path) -> None:
    """Save a tokenizer that says how far the model goes: tools truncate by it."""
    swapped = getattr(model.config, "pe_swap", None) is not None
    plain = model.config.plain() if swapped else None  # what is saved, where the family's own class says it
    limit = longest_input(model) if plain is None else plain.max_position_embeddings
    tokenizer.model_max_length = limit or tokenizer.model_max_length
    tokenizer.save_pretrained(folder)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on, by the name this transformers version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Drop nothing for as long as the context lasts: modules of dropout, and the shares that attention modules keep as numbers."""
    kept: list[tuple[Any, str, float]] = []
    for holder in (*model.modules(), model.config):  # Falcon's layers read the configuration at every call
        names = ["p"] if isinstance(holder, nn.Dropout) else [name for name in vars(holder) if "dropout" in name]
        kept += [(holder, name, value) for name in names if isinstance(value := getattr(holder, name), float)]
    try:
        for holder, name, _ in kept:
            setattr(holder, name, 0.0)
        yield
    finally:
        for holder, name, value in kept:
            setattr(holder, name, value)


def warn_of_slow_training(model: PreTrainedModel, arguments: TrainingArguments, *, drops: bool) -> None:
    """Print one line for each setting that makes a training on a CPU several times slower."""
    if uses_gpu() or not is_main_process():
        return
    instructions: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if arguments.bf16 and not (instructions.get("avx512_bf16") or instructions.get("amx_bf16")):
        print(
            "warning: train.bf16 is true, and this CPU has no bfloat16 instructions: about five times slower than false",
            file=sys.stderr,
        )
    dropouts = [name for name in ATTENTION_DROPOUTS if getattr(model.config, name, 0.0)] if drops else []
    if dropouts:
        print(
            f"warning: {dropouts[0]} is {getattr(model.config, dropouts[0])}, and attention with dropout has no fused kernel on a CPU: up "
            "to five times slower than with train.dropout false",
            file=sys.stderr,
        )


def require_training_settings(section: TrainSection) -> None:
    """Refuse, before anything is written, a schedule, tracker or step to measure after that cannot work, and a launcher's precision.

    Raises:
        ConfigError: there is one.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no" and not uses_bf16(section):
        raise ConfigError(
            f"The launcher's mixed precision is '{launched}' (ACCELERATE_MIXED_PRECISION), which would overrule train.bf16: "
            f"{section.bf16!r}. Set train.bf16 to true, or launch with --mixed_precision no."
        )
    late = max(section.eval_steps, default=0)
    if late > section.max_steps:
        raise ConfigError(
            f"train.eval_steps names step {late:,}, and training ends at step {section.max_steps:,} (train.max_steps). Name steps up to "
            "that."
        )
    if section.eval_lengths and not section.eval_steps:
        raise ConfigError(
            f"train.eval_lengths names {', '.join(map(str, section.eval_lengths))}, and train.eval_steps names no step to measure after. "
            "Name steps, or leave the lengths out."
        )
    if section.transition.fade_steps > section.max_steps:
        raise ConfigError(
            f"train.transition.fade_steps is {section.transition.fade_steps:,}, and training ends at step {section.max_steps:,} "
            "(train.max_steps), with old positions left. Let them go in fewer steps."
        )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.learning_rate)
    try:
        schedule = get_scheduler(
            section.schedule,
            optimizer,
            section.warmup_steps,
            max(1, section.max_steps),
            scheduler_specific_kwargs=dict(section.schedule_options),
        )
        optimizer.step()
        schedule.step()
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"train.schedule is '{section.schedule}' with schedule_options {section.schedule_options}, which transformers refuses: "
            f"{error}. Correct them; a schedule that follows a measured loss is not offered."
        ) from error
    if section.schedule.startswith("constant") and section.schedule_options:
        raise ConfigError(f"train.schedule is '{section.schedule}', which takes no schedule_options. Drop them.")
    trackers = [*get_available_reporting_integrations(), "none", "all"]
    for name in section.report_to:
        if name not in trackers:
            known = name in INTEGRATION_TO_CALLBACK
            raise ConfigError(
                f"train.report_to names '{name}', which "
                + (
                    "is not installed. Install it, or drop it."
                    if known
                    else f"is no tracker.{did_you_mean(name, INTEGRATION_TO_CALLBACK)}"
                )
                + f" Here are: {', '.join(trackers)}."
            )


def uses_bf16(section: TrainSection) -> bool:
    """Tell whether a training runs in mixed precision; 'auto' is where a GPU has instructions for bfloat16."""
    if section.bf16 == "auto":
        return uses_gpu() and torch.cuda.is_bf16_supported(including_emulation=False)
    return section.bf16


def training_arguments(section: TrainSection, seed: int, out: Path) -> TrainingArguments:
    """Return a section as the Trainer's arguments.

    Raises:
        ConfigError: a value that transformers refuses, such as a schedule it does not know.
    """
    require_training_settings(section)
    try:
        arguments = TrainingArguments(
            output_dir=str(out / CHECKPOINTS),
            max_steps=section.max_steps,
            per_device_train_batch_size=section.batch_size,
            gradient_accumulation_steps=section.gradient_accumulation_steps,
            learning_rate=section.learning_rate,
            warmup_steps=section.warmup_steps,
            weight_decay=section.weight_decay,
            lr_scheduler_type=section.schedule,
            lr_scheduler_kwargs=dict(section.schedule_options),
            bf16=uses_bf16(section),
            save_steps=section.save_steps,
            logging_steps=section.logging_steps,
            logging_nan_inf_filter=False,  # it would log the loss before in place of one that is not finite
            report_to=section.report_to,
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=False,
            disable_tqdm=not on_terminal(),
            use_cpu=not uses_gpu(),
            ddp_find_unused_parameters=True
            if section.transition.match != "none"
            else None,  # an error on attention reaches no head
        )
    except ValueError as error:
        raise ConfigError(
            f"transformers refuses the section 'train': {error}. Correct it in the YAML file or as --train.*."
        ) from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with more, the Trainer would copy the model, hooks and all, by DataParallel
    return arguments
