"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})
"""Errors of a disk that is full, read-only, closed to this user, or broken."""


def disk_error(error: OSError) -> str:
    """Return what a disk's error means, and what to do."""
    where = f"'{error.filename}'" if error.filename else "a file"
    return (
        f"Cannot write {where}: {error.strerror}. Free the disk or correct its permissions, then run the same command again "
        "(finetune.py with --resume), or name another --out."
    )


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file: a reader finds the old one or the whole new one, also after a full disk.

    Raises:
        OSError: the disk; nothing is left of what was begun.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # the file that was asked for, in the message
        temporary.unlink(missing_ok=True)
        raise
