"""Rows and a comparison's record, written by hand."""

from __future__ import annotations

import math
from typing import Any

from pe_swap.evaluation.evaluator import unmeasured_row


def row(model: str, length: int, perplexity: float | None, error: str | None = None) -> dict[str, Any]:
    """Return a row of perplexity with an interval of 1 to each side."""
    low, high = (None, None) if perplexity is None else (perplexity - 1, perplexity + 1)
    found = unmeasured_row(model, "original" if model == "control" else "rope", "sliding", length, "")
    positions = [] if perplexity is None else [{"first": 1, "last": 1, "tokens": 3, "loss": 4.5}]
    found |= {"perplexity": perplexity, "ci_low": low, "ci_high": high, "tokens": 9, "error": error}
    return {**found, "loss_by_position": positions}


ROWS = [row("a", 64, 20.123), row("a", 128, 1234.5), row("control", 64, 21.0), row("control", 128, None, "ends at 64")]


def part(after_swap: float | None, after_training: float | None) -> dict[str, Any]:
    """Return what a comparison keeps of one training."""
    measured = {"length": 1024, "before_swap": 22.672, "after_swap": after_swap, "after_training": after_training}
    return {"perplexity": measured, "seconds": 1.0, "training": {}}


COMPARISON = {
    "parts": {
        "control": part(22.672, 22.181),
        "far": part(1044.6, 23.456),
        "short": part(None, 29.94),
        "lost": {"perplexity": None},
    },
    "config": {
        "schemes": {
            "control": {"name": "original", "layers": None, "keep_mean": None},
            "far": {"name": "fox", "layers": [0, 2], "keep_mean": True, "initial_reach": 10000},
            "short": {"name": "learned", "layers": None, "max_length": 8},
        }
    },
}


def compared() -> list[dict[str, Any]]:
    """Three documents; b is 0.1 nats per token better than the control, which ends at 64; c is level with it on average."""
    rows = []
    for model, length, gains in (
        ("control", 64, (0.0, 0.0, 0.0)),
        ("b", 64, (0.1, 0.1, 0.1)),
        ("c", 64, (0.2, -0.2, 0.0)),
        ("b", 128, (0.2, 0.2, 0.2)),
        ("c", 128, (0.0, 0.0, 0.0)),
    ):
        losses = [10 * (level - gain) for level, gain in zip((3.0, 4.0, 5.0), gains, strict=True)]
        found = row(model, length, math.exp(sum(losses) / 30))
        rows.append({**found, "document_losses": [losses], "document_tokens": [10, 10, 10], "bits_per_byte": 1.5})
    return [*rows[:1], row("control", 128, None, "ends at 64"), *rows[1:]]


def probe(measure: str, model: str, length: int, value: float | None, **at: float) -> dict[str, Any]:
    """Return a row of a measure, refused where it has no value."""
    return {
        "model": model, "scheme": "rope", "measure": measure, "protocol_version": "v9", "length": length, "quantity": "accuracy",
        "at": at, "value": value, "count": 4, "error": None if value is not None else "too short a vocabulary",
    }  # fmt: skip
