"""A short fine-tuning run of our own, and its sudden end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from pe_swap.runs.config import FinetuneConfig

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}
WORDS = "we the people of the united states in order to form a more perfect union establish justice "


def config(tmp_path: Path, **changes: Any) -> FinetuneConfig:
    """Write two texts and return a short run on them, into `run`, with `changes`."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for index, path in enumerate(files):
        path.write_text(WORDS * 20 + str(index), encoding="utf-8")
    settings: dict[str, Any] = {
        "model": GPT2,
        "vocab_size": 300,
        "scheme": {"name": "t5", "num_buckets": 8},
        "data": {"text_files": [str(path) for path in files], "block_size": 16},
        "train": {"max_steps": 6, "batch_size": 2, "save_steps": 3, "logging_steps": 1, "warmup_steps": 1, "learning_rate": 1e-2},
        "out": str(tmp_path / "run"),
    }
    return FinetuneConfig(**{**settings, **changes})


class KilledError(BaseException):
    """Stands for a kill: nothing of the package catches it."""


def killed_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the Trainer stop dead in the step after `steps`, as a kill does."""
    original = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= steps:
            raise KilledError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights that a run left in its folder."""
    return load_file(folder / "model.safetensors")
