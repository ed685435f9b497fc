"""Fine-tuning a classifier of images, through the same trainer as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, default_data_collator

from pe_swap.errors import ConfigError
from pe_swap.families.native.grid import two_sides
from pe_swap.runs.config import TrainSection
from pe_swap.runs.images import LabelledImages
from pe_swap.runs.output import OutputFolder, whole_folder
from pe_swap.runs.records import is_main_process
from pe_swap.training.callbacks import AfterCheckpoint
from pe_swap.training.resume import last_checkpoint
from pe_swap.training.trainer import PositionalTrainer, checkpoint_activations, training_arguments, without_dropout


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Labelled images as the Trainer reads them."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one image and its class, by the names of the model's arguments."""
        return {"pixel_values": self.images.pixels[index], "labels": self.images.labels[index]}


class ImageTrainer(PositionalTrainer):
    """The trainer of text, with the loss that the model itself computes from images and classes."""

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Change nothing: the model's own loss is learned."""
        yield


def require_image_training(section: TrainSection) -> None:
    """Refuse settings of a training on text.

    Raises:
        ConfigError: one is given.
    """
    of_text = ("positions", "eval_steps", "eval_lengths", "eval_max_documents", "eval_max_document_tokens", "transition")
    defaults = TrainSection()
    given = [name for name in of_text if getattr(section, name) != getattr(defaults, name)]
    if given:
        raise ConfigError(f"train.{given[0]} is for text, and data.images has none. Leave it out.")


def train_on_images(
    model: PreTrainedModel,
    images: LabelledImages,
    section: TrainSection,
    *,
    seed: int,
    output: OutputFolder,
    resume: bool,
    on_start: Callable[[], None],
    on_checkpoint: Callable[[], None],
) -> dict[str, Any]:
    """Train a classifier in place, on images at its own `image_size`, and save it in an output folder.

    Args:
        model: a classifier of images, swapped or not.
        images: to train on.
        section: how to train.
        seed: of data order and dropout.
        output: output folder; checkpoints go below it.
        resume: continue from the last checkpoint there.
        on_start: called after all checks of the input, before the first step and before anything is written.
        on_checkpoint: called after each checkpoint is written.

    Returns:
        Steps, mean training loss of all steps, and the loss log. With no steps to train the model is saved as it is.

    Raises:
        CheckpointError: nothing to resume from, or a damaged checkpoint.
        ConfigError: a value that transformers refuses.
    """
    require_image_training(section)
    trainer = None
    log: list[dict[str, Any]] = []
    if section.max_steps:
        trainer = ImageTrainer(
            model=model,
            args=training_arguments(section, seed, output.path),
            train_dataset=ImageDataset(images.at(*two_sides(model.config.image_size))),
            data_collator=default_data_collator,
            positional_learning_rate=section.positional_learning_rate,
            callbacks=[AfterCheckpoint(output, on_checkpoint)],
        )
        checkpoint = last_checkpoint(output.path) if resume else None
        if section.gradient_checkpointing:
            checkpoint_activations(model)
        on_start()
        with nullcontext() if section.dropout else without_dropout(model):
            trainer.train_from(checkpoint)
        vars(model).pop("forward", None)  # what accelerate has put around it: mixed precision, in which nothing is measured
        log = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    else:
        on_start()
    if is_main_process():
        with whole_folder(output) as folder:
            model.save_pretrained(folder)
    steps = trainer.state.global_step if trainer is not None else 0
    return {"steps": steps, "train_loss": float(trainer.losses.total) / steps if trainer is not None else None, "log": log}
