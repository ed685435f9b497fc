"""Progress: bars on a terminal, and one line per minute in a log."""

from __future__ import annotations

import sys
import time

import datasets
from transformers.utils import logging

SECONDS_BETWEEN_LINES = 60.0


def on_terminal() -> bool:
    """Tell whether standard error is a terminal, where a progress bar can be redrawn."""
    return sys.stderr.isatty()


def show_bars_on_terminals_only() -> None:
    """Turn off the progress bars of transformers and datasets where they would fill a log."""
    if not on_terminal():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()


class EveryMinute:
    """Tells when a line of progress is due: at most once per minute."""

    def __init__(self, seconds: float = SECONDS_BETWEEN_LINES) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Tell whether a line is due, and start the next minute if it is."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True
