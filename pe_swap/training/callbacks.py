"""What is done between the steps of a training: losses summed, perplexity measured, lines printed, old checkpoints deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from pe_swap.runs.output import OutputFolder
from pe_swap.runs.progress import EveryMinute
from pe_swap.training.resume import CHECKPOINTS, delete_old_checkpoints

TRACKED = "runs"
"""Folder that tensorboard writes to, below the checkpoints."""


class LossTotal(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is untyped here
    """Sum of the losses of steps, in the checkpoints too: the Trainer's own mean counts the steps since the last start only."""

    def __init__(self, total: float = 0.0) -> None:
        self.total = torch.tensor(total, dtype=torch.float64)

    def add(self, loss: Tensor) -> None:
        """Add a batch's share of its step's loss."""
        self.total = self.total.to(loss.device) + loss.double()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {"total": float(self.total)}, "attributes": {}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the sum of the checkpoint that the training continues from."""
        self.restore(state)

    def restore(self, state: TrainerState) -> None:
        """Take the sum that a state holds."""
        self.total = torch.tensor(state.stateful_callbacks[type(self).__name__]["args"]["total"], dtype=torch.float64)


def measured_rows(step: int, found: Mapping[int, float | None]) -> list[dict[str, Any]]:
    """Return the rows of what was measured by length after a step."""
    return [{"step": step, "length": length, "perplexity": perplexity} for length, perplexity in found.items()]


class PerplexityAtSteps(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is untyped here
    """What was measured after given steps; in the checkpoints too, so that a run which is continued has every row once.

    Attributes:
        rows: step, length and perplexity, None where it is not finite or the model does not take the length.
    """

    def __init__(self, steps: Sequence[int], measure: Callable[[], Mapping[int, float | None]]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._steps = frozenset(steps)
        self._measure = measure

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {"rows": list(self.rows)}, "attributes": {}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the rows of the checkpoint that the training continues from."""
        self.restore(state)

    def restore(self, state: TrainerState) -> None:
        """Take the rows that a state holds."""
        self.rows = list(state.stateful_callbacks[type(self).__name__]["args"]["rows"])

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measure if this is one of the steps; the Trainer saves its checkpoint after this."""
        if state.global_step in self._steps:
            self.rows += measured_rows(state.global_step, self._measure())


class ProgressLines(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """One line per minute, in place of a progress bar or of transformers' line for every logged step."""

    def __init__(self) -> None:
        self._minutes = EveryMinute()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print a line if one is due."""
        if state.is_world_process_zero and "loss" in (logs or {}) and self._minutes.is_due():
            print(f"step {state.global_step:,} of {state.max_steps:,}: loss {float((logs or {})['loss']):.4f}", flush=True)


class LogWhereMeansEnd(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Has a step logged where the Trainer's mean of losses must end: a logged loss is the mean since the one before.

    The last matching step, as no mean is over two objectives; and every step with a checkpoint, as a run that continues from it has
    the steps from there on.
    """

    def __init__(self, matching_steps: int) -> None:
        self._matching_steps = matching_steps

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Ask for a log line if this is such a step; the Trainer writes it before it saves."""
        if state.global_step == self._matching_steps or control.should_save:
            control.should_log = True


class AfterCheckpoint(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Notes a checkpoint's files as the run's own, and deletes the run's checkpoints before the last two."""

    def __init__(self, output: OutputFolder, on_checkpoint: Callable[[], None]) -> None:
        self._output = output
        self._on_checkpoint = on_checkpoint

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note, delete, and tell the caller."""
        if state.is_world_process_zero:
            checkpoints = self._output.path / CHECKPOINTS
            self._output.add(checkpoints / f"checkpoint-{state.global_step}", checkpoints / TRACKED)
            delete_old_checkpoints(self._output)
            self._on_checkpoint()
