"""A run is a record: what ran, on what, with which numbers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from pe_swap.runs.files import write_whole

RECORD = "record.json"

PACKAGES = ("pe-swap", "transformers", "torch", "accelerate", "datasets", "tokenizers")


def environment() -> dict[str, Any]:
    """Return versions, commit, device, and how it computes."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "device": torch.cuda.get_device_name() if uses_gpu() else platform.machine() + " cpu",
        "threads": torch.get_num_threads(),
        "flushes_denormals": flushes_denormals(),
    }


def uses_gpu() -> bool:
    """Tell whether this process trains and measures on a GPU: there is one, and no launcher says `ACCELERATE_USE_CPU`."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def flush_denormals() -> None:
    """Let this process round denormal numbers to zero; for scripts, which own theirs, before any worker thread exists.

    Under alibi the probabilities of far keys are such numbers, on each of which some processors spend a hundred cycles.
    """
    torch.set_flush_denormal(True)


def flushes_denormals() -> bool:
    """Tell whether this thread rounds denormal numbers to zero (`torch.set_flush_denormal`)."""
    return bool(torch.full((1,), 1e-38).mul(0.01) == 0)


def is_main_process() -> bool:
    """Tell whether this process writes files: the first of a distributed run, or the only one.

    From the launcher's variable, as the process group exists only once the Trainer does.
    """
    return int(os.environ.get("RANK", "0")) == 0


def _git(*arguments: str) -> str | None:
    """Return what git says of the folder this package lies in, or None where it is no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_record(folder: Path, content: dict[str, Any]) -> None:
    """Write `record.json`; a reader finds the old file or the whole new one.

    NaN and infinities are not JSON: they are written as null.
    """
    write_whole(folder / RECORD, json.dumps(_plain(content), indent=2, default=str, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Return plain values with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a folder's record, or None where there is none that can be read."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def fingerprint(content: Any) -> str:
    """Return a short hash of plain values: the same for the same configuration."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds, to a tenth."""
        return round(time.perf_counter() - self._start, 1)
