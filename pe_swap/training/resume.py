"""What `--resume` may continue from, and what it must not be mixed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from pe_swap.errors import CheckpointError, ConfigError, DataError

CHECKPOINTS = "checkpoints"
"""Folder of the Trainer's checkpoints in a run's output folder."""


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


def require_not_stopped(out: Path, previous: dict[str, Any] | None) -> None:
    """Refuse to start in the folder of a run that was stopped before its end: its checkpoints are all there is of it.

    Raises:
        CheckpointError: it is one.
    """
    if complete_checkpoints(out) and (previous is None or previous.get("status") == "running"):
        raise CheckpointError(
            f"'{out}' holds checkpoints of a run that was stopped. Continue it with --resume, or start anew in another --out."
        )


def require_same_run(out: Path, previous: dict[str, Any], key: str, settings: dict[str, Any], text_key: str) -> None:
    """Refuse to resume a run with anything that would change its numbers.

    Raises:
        ConfigError: the configuration, or a file of the model, is not what it was.
        DataError: the text is not what it was.
    """
    if previous.get("fingerprint") in (None, key):
        return
    changed = _changed_keys(settings_that_matter(previous.get("config") or {}), settings_that_matter(settings))
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


def settings_that_matter(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a run's numbers depend on."""
    return {name: value for name, value in settings.items() if name not in ("out", "resume")}
