"""A short training run of a saved swapped model through transformers' Trainer, in this process or in one that is killed.

As a script: `python -m tests.support.training_run FOLDER OUT KILL_AT`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import pe_swap  # noqa: F401  # its Auto classes
from tests.support.models import token_ids

STEPS, SAVE_AT = 6, 3


class KillAt(TrainerCallback):
    """Kill this process, as the system would, at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class RecordingTrainer(Trainer):
    """A Trainer that keeps every loss as it was, and not rounded for the log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self.losses.append(float(loss.detach()))
        return result


def train(folder: Path, out: Path, *, kill_at: int = 0, resume: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """Train for a few steps with dropout; return the losses and the final weights."""
    torch.manual_seed(0)
    dropout = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **dropout)
    rows = token_ids(24, 48).tolist()
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        save_steps=SAVE_AT,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    callbacks = [KillAt(kill_at)] if kill_at else []
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = RecordingTrainer(model=model, args=arguments, train_dataset=dataset, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{SAVE_AT}") if resume else None)
    return trainer.losses, {name: value.clone() for name, value in model.state_dict().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), Path(sys.argv[2]), kill_at=int(sys.argv[3]))
