"""Models against a control, on the same documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pe_swap.errors import ConfigError
from pe_swap.evaluation.bootstrap import paired_ratio
from pe_swap.evaluation.rows import PerplexityRow
from pe_swap.registry import did_you_mean
from pe_swap.runs.config import ORIGINAL

Unit = Literal["perplexity", "bits_per_byte"]


def with_ratios(
    rows: Sequence[PerplexityRow], *, control: str | None, unit: Unit, samples: int, seed: int
) -> list[PerplexityRow]:
    """Return the rows with `control`, `ratio`, `ratio_low` and `ratio_high` filled in, in each protocol at each length.

    The ratio is of perplexities per token, or per byte where `unit` is `bits_per_byte`.

    Args:
        rows: of all models.
        control: label of the model to divide by. None takes the first whose scheme is `original`, at the lengths it was measured at,
            and beyond them the first model that was.
        unit: what perplexities are per.
        samples: resamplings behind an interval.
        seed: of the resamplings.
    """
    return [_with_ratio(row, control_of(row, rows, control), unit, samples, seed) for row in rows]


def require_control(control: str | None, models: Sequence[str]) -> None:
    """Refuse a control that is not among the models.

    Raises:
        ConfigError: it is not.
    """
    if control is not None and control not in models:
        raise ConfigError(
            f"control is '{control}', which is none of the models.{did_you_mean(control, models)} Name one of {', '.join(models)}."
        )


def control_of(row: PerplexityRow, rows: Sequence[PerplexityRow], control: str | None) -> PerplexityRow | None:
    """Return the row that a row is divided by, or None where there is none."""
    beside = [
        other
        for other in rows
        if (other["protocol"], other["length"]) == (row["protocol"], row["length"]) and other["perplexity"] is not None
    ]
    if control is not None:
        beside = [other for other in beside if other["model"] == control]
    return next((other for other in beside if other["scheme"] == ORIGINAL), beside[0] if beside else None)


def _with_ratio(row: PerplexityRow, control: PerplexityRow | None, unit: Unit, samples: int, seed: int) -> PerplexityRow:
    """Return a row with its ratio to a control."""
    if control is None or row["perplexity"] is None:
        return row
    if control["model"] == row["model"]:
        return {**row, "control": control["model"], "ratio": 1.0}
    weights, same = row["document_bytes"], control["document_bytes"]
    if unit == "perplexity":
        weights, same = row["document_tokens"], control["document_tokens"]
    if weights is None or weights != same:
        return row
    losses, control_losses = np.array(row["document_losses"]), np.array(control["document_losses"])
    ratio, low, high = paired_ratio(losses, control_losses, np.array(weights, dtype=float), samples=samples, seed=seed)
    return {**row, "control": control["model"], "ratio": ratio, "ratio_low": low, "ratio_high": high}


def differs(row: PerplexityRow) -> bool:
    """Tell whether the interval of a row's ratio excludes 1."""
    low, high = row["ratio_low"], row["ratio_high"]
    return low is not None and high is not None and (low > 1 or high < 1)


def drawn_over(rows: Sequence[PerplexityRow]) -> str:
    """Return what intervals are over."""
    return "documents and seeds" if any(len(row["document_losses"]) > 1 for row in rows) else "documents"
