"""A run is a record: what ran, on what, with which numbers."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RECORD = "record.json"

PACKAGES = ("pe-swap", "transformers", "torch", "accelerate", "datasets", "tokenizers")


def environment() -> dict[str, Any]:
    """Return versions, commit and device."""
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
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " cpu",
        "threads": torch.get_num_threads(),
    }


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
    """Write `record.json`; a reader sees the old file or the whole new one."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RECORD}.{os.getpid()}"
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(folder / RECORD)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a folder's record, or None where there is none that can be read."""
    try:
        content: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return content


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
