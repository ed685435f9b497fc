"""The output folder of a run. Nobody's file is deleted or replaced: a run knows from its record which files are its own."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pe_swap.errors import ConfigError
from pe_swap.runs.models import CONTENT
from pe_swap.runs.records import RECORD, read_record

REPORTS = ("report.md", "report.html", "results.csv", "probes.csv", "perplexity.png", "accuracy.png")
"""What an evaluation or a comparison writes beside its record."""

WRITTEN = (*CONTENT, RECORD, "README.md", "generation_config.json", "training_args.bin", "chat_template*", "*.py")
"""Names that a training run may write into its output folder; its checkpoints come in folders of their own."""


class OutputFolder:
    """A run's output folder, and which files in it the run wrote.

    Attributes:
        path: the folder.
        files: paths relative to it, of the files that the run wrote.
    """

    def __init__(self, path: Path, files: Iterable[str] = ()) -> None:
        self.path = path
        self.files = set(files)

    def add(self, *paths: Path) -> None:
        """Note files, or all files in folders, as written by the run."""
        for path in paths:
            found = path.rglob("*") if path.is_dir() else [path]
            self.files |= {file.relative_to(self.path).as_posix() for file in found if file.is_file()}

    def delete(self, within: str = "") -> None:
        """Delete the run's own files, in a folder below or everywhere, and folders that this leaves empty."""
        chosen = sorted(file for file in self.files if file.startswith(f"{within}/" if within else ""))
        for file in chosen:
            (self.path / file).unlink(missing_ok=True)
        folders = {parent for file in chosen for parent in (self.path / file).parents if self.path in parent.parents}
        for folder in sorted(folders, reverse=True):  # the deepest first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self.files -= set(chosen)

    def others(self) -> list[str]:
        """Return the files in the folder that the run did not write, relative to it."""
        found = {file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()}
        return sorted(found - self.files)


@contextmanager
def whole_folder(output: OutputFolder, *, is_writer: bool = True) -> Iterator[Path]:
    """Give a folder to write into, whose files move to the output folder once all of them are written.

    Args:
        output: where the files go; they are noted as the run's.
        is_writer: whether this process moves them; in a distributed run one does.
    """
    temporary = output.path / ".writing"
    if is_writer:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        yield temporary
        if is_writer:
            for file in sorted(temporary.iterdir()):
                output.add(file.replace(output.path / file.name))
    finally:
        if is_writer:
            shutil.rmtree(temporary, ignore_errors=True)


def require_output_folder(out: Path, inputs: Iterable[Any] = ()) -> None:
    """Refuse an output folder that cannot be written, or that holds what the run reads.

    Args:
        out: the folder.
        inputs: models and tokenizers by name or path; what is no local path is passed over.

    Raises:
        ConfigError: it is a file or lies in one, is not open to writing, or one of the inputs is it or lies in it.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"--out is '{out}', but '{existing}' is a file. Name a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out is '{out}', but '{existing}' cannot be written to. Correct its permissions, or name another --out."
        )
    for name in inputs:
        path = Path(name).resolve() if isinstance(name, str) and name else None
        if path is not None and path.exists() and (path == out.resolve() or out.resolve() in path.parents):
            raise ConfigError(
                f"--out is '{out}', and the run reads '{name}' there: it would overwrite its own source. Name another --out."
            )


def require_kind(out: Path, kind: str) -> None:
    """Refuse to write a report where another kind of run, or somebody's own report, is.

    Raises:
        ConfigError: it is there.
    """
    record = read_record(out)
    if record is not None and record.get("kind") != kind:
        raise ConfigError(f"'{out}' holds a run of another kind ({record.get('kind')}). Name another --out.")
    taken = [name for name in (RECORD, *REPORTS) if (out / name).exists()]
    if record is None and taken:
        raise ConfigError(f"'{out}' holds {', '.join(taken)} that no {kind} wrote. Move them away, or name another --out.")


def require_free(out: OutputFolder, *, overwrite: bool) -> None:
    """Refuse to start a training run where files are, other than, with `overwrite`, those that an earlier run wrote.

    Raises:
        ConfigError: there are some.
    """
    others = out.others()
    if not overwrite and (out.files or others):
        what = "an earlier run" if out.files else "files that are not of a run, such as " + repr(others[0])
        raise ConfigError(
            f"'{out.path}' holds {what}. Name another --out"
            + (", or start anew with --overwrite, which deletes what that run wrote." if out.files else ", or an empty folder.")
        )
    kept = [file for file in others if _may_be_written(file)]
    if kept:
        raise ConfigError(
            f"'{out.path}' holds {', '.join(map(repr, kept[:3]))}, which no run wrote by its record, and which a new run would replace. "
            "Move them away, or name another --out."
        )


def _may_be_written(file: str) -> bool:
    """Tell whether a training run may write a file of this name."""
    if "/" not in file:
        return any(fnmatch(file, pattern) for pattern in WRITTEN)
    return re.match(r"checkpoints/checkpoint-\d+/", file) is not None
