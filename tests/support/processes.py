"""Other Python processes: what holds in this one may hold because of what this one has imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a child process: offline, one thread, this checkout's packages."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **settings, **variables}


def python(script: str, *arguments: object, timeout: float = 120, **variables: str) -> str:
    """Run a script in a new process and return what it printed.

    Raises:
        AssertionError: it failed; the text is what it wrote to its error stream.
    """
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, env=environment(**variables), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
