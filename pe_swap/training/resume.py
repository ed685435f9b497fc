"""Which checkpoint `--resume` continues from, and which runs must not be mixed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from pe_swap.errors import CheckpointError, ConfigError, DataError
from pe_swap.runs.output import OutputFolder

CHECKPOINTS = "checkpoints"
"""Folder of the Trainer's checkpoints in a run's output folder."""

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
"""The Trainer's name of a checkpoint; a folder such as checkpoint-20-best is somebody's own."""

KEPT_CHECKPOINTS = 2
"""How many of its newest checkpoints a run keeps."""


def checkpoint_folders(out: Path) -> list[Path]:
    """Return the folders with a checkpoint's name, by step."""
    named = [(CHECKPOINT.fullmatch(folder.name), folder) for folder in (out / CHECKPOINTS).glob("checkpoint-*")]
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in named if match and folder.is_dir())]


def complete_checkpoints(out: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first, without any that a kill left half written.

    The Trainer writes `trainer_state.json` last, so a folder in which it cannot be read is not whole.
    """
    found = []
    for folder in checkpoint_folders(out):
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


def delete_old_checkpoints(out: OutputFolder) -> None:
    """Delete all but the newest checkpoints, as far as the run wrote them."""
    own = [folder for folder in checkpoint_folders(out.path) if any(f"/{folder.name}/" in file for file in out.files)]
    for folder in own[:-KEPT_CHECKPOINTS]:
        out.delete(folder.relative_to(out.path).as_posix())


def output_of_run(out: Path, record: dict[str, Any] | None) -> OutputFolder:
    """Return a run's output folder with the files that its record lists.

    A run that was stopped may have begun a checkpoint which its record does not list yet: folders with a checkpoint's name are its own
    too.
    """
    found = OutputFolder(out)
    if record is not None and record.get("kind") == "finetune":
        listed = [
            out / file for file in record.get("files") or () if ".." not in Path(file).parts and not Path(file).is_absolute()
        ]
        found.add(*(file for file in listed if file.is_file()))
        if record.get("status") == "running":
            found.add(*checkpoint_folders(out))
    return found


def require_not_stopped(out: Path, record: dict[str, Any] | None) -> None:
    """Refuse to start in the folder of a run that was stopped before its end: its checkpoints are all there is of it.

    Raises:
        CheckpointError: it is one.
    """
    if complete_checkpoints(out) and (record is None or record.get("status") == "running"):
        raise CheckpointError(
            f"'{out}' holds checkpoints of a run that was stopped. Continue it with --resume, delete it with --overwrite, or start anew in "
            "another --out."
        )


def require_same_run(
    out: Path, record: dict[str, Any] | None, key: str, settings: dict[str, Any], text_key: str, processes: int
) -> None:
    """Refuse to resume a run with anything that would change its numbers.

    Raises:
        CheckpointError: there is no run to resume.
        ConfigError: the configuration, the number of processes, or a file of the model, is not what it was.
        DataError: the text is not what it was.
    """
    if record is None:
        last_checkpoint(out)
        raise CheckpointError(
            f"'{out}' has checkpoints and no record of their run, so nothing tells what they are. Run in another --out."
        )
    if record.get("fingerprint") == key:
        if record.get("status") == "running" and record.get("processes") != processes:
            raise ConfigError(
                f"'{out}' holds a run of {record.get('processes')} processes, and this is one of {processes}: its batches would be others. "
                f"Launch {record.get('processes')} processes, or start anew in another --out."
            )
        return
    changed = changed_keys(settings_that_matter(record.get("config") or {}), settings_that_matter(settings))
    if changed:
        raise ConfigError(
            f"'{out}' holds a run with another configuration (another {', '.join(changed)}); resuming would mix the two. Use the same "
            "options, or another --out."
        )
    if (record.get("data") or {}).get("sha256") != text_key:
        raise DataError(
            f"'{out}' holds a run on another text: what 'data' names has changed since; resuming would mix the two. Bring the text back, "
            "or start anew in another --out."
        )
    raise ConfigError(
        f"'{out}' holds a run from another model or tokenizer: their files have changed since; resuming would mix the two. Bring them "
        "back, or start anew in another --out."
    )


def changed_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    found = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changed_keys(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}")
    return found


def settings_that_matter(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a run's numbers depend on."""
    return {name: value for name, value in settings.items() if name not in ("out", "resume", "overwrite")}
