"""Files are written whole or not at all; bars stay off logs."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pe_swap.runs.files import write_whole
from pe_swap.runs.output import OutputFolder, whole_folder
from pe_swap.runs.progress import EveryMinute


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a.csv", "old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.csv", "new content")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.csv", "old")]


def test_a_folder_is_written_whole(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), whole_folder(output) as folder:
        (folder / "a").write_text("half") and (tmp_path / "nowhere" / "b").write_text("fails")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
    with whole_folder(output) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == [("a", "new"), ("b", "new")]
    assert output.files == {"a", "b"}


def test_lines_come_at_most_once_in_the_time_between_them() -> None:
    assert not EveryMinute(3600).is_due()
    now = EveryMinute(0)
    assert now.is_due()
    assert now.is_due()
