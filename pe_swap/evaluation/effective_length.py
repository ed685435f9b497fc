"""The longest context that a model makes use of, under the definitions that papers use, each by its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np

from pe_swap.evaluation.rows import PerplexityRow, ProbeRow

CHEN_ACCURACY = 0.2
"""Least passkey accuracy of Chen et al. (arXiv:2306.15595, section 3.3): the largest length with at least 20%."""

RULER_ACCURACY = 0.856
"""Least accuracy of RULER (Hsieh et al., arXiv:2404.06654, section 4): what Llama-2-7B has at 4,096 tokens."""

ACCURACY_MEASURES = ("passkey", "recall")


class EffectiveLength(TypedDict):
    """One model's longest length under one definition."""

    model: str
    definition: str
    """What the length is the longest of, with its bound."""
    length: int | None
    """The longest measured length up to which every measured length fulfils the definition; None where the first does not."""
    longest_measured: int
    """The longest measured length: the true value may be greater where both are equal."""


def effective_lengths(
    rows: Sequence[PerplexityRow], probes: Sequence[ProbeRow], trained_length: dict[str, int | None], bound: float
) -> list[EffectiveLength]:
    """Return every model's effective lengths.

    * perplexity: at most `bound` times that at the trained length (at the longest measured length up to it), for each protocol;
    * passkey accuracy at least 20%, mean over depths (Chen et al.);
    * passkey or recall accuracy at least 85.6% (RULER's bound; RULER applies it to its own tasks).

    Args:
        rows: perplexities.
        probes: readings of other measures.
        trained_length: of each model, tokens.
        bound: the greatest ratio of perplexities, for instance 1.05.
    """
    found: list[EffectiveLength] = []
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = {row["length"]: row["perplexity"] for row in rows if (row["model"], row["protocol"]) == (model, protocol)}
            trained = trained_length.get(model)
            reference = max((length for length in mine if trained is not None and length <= trained), default=None)
            base = None if reference is None else mine[reference]
            if reference is None or base is None:
                continue
            passed = {
                length: value is not None and value <= bound * base for length, value in mine.items() if length >= reference
            }
            definition = f"{protocol} perplexity at most {bound:g} times that at {reference:,} tokens"
            found.append(_longest(model, definition, passed))
    for measure in ACCURACY_MEASURES:
        bounds = ((CHEN_ACCURACY, "Chen et al."), (RULER_ACCURACY, "RULER's bound"))
        for least, source in bounds if measure == "passkey" else bounds[1:]:
            for model in dict.fromkeys(row["model"] for row in probes if row["measure"] == measure):
                accuracies = _accuracies(row for row in probes if (row["model"], row["measure"]) == (model, measure))
                passed = {length: value >= least for length, value in accuracies.items()}
                found.append(_longest(model, f"{measure} accuracy at least {least:.1%} ({source})", passed))
    return found


def _accuracies(rows: Iterable[ProbeRow]) -> dict[int, float]:
    """Return the mean accuracy at each length; 0 where a length could not be taken."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["quantity"] in ("accuracy", ""):
            values.setdefault(row["length"], []).append(row["value"] or 0.0)
    return {length: float(np.mean(found)) for length, found in values.items()}


def _longest(model: str, definition: str, passed: dict[int, bool]) -> EffectiveLength:
    """Return the longest length up to which all lengths pass."""
    length = None
    for candidate in sorted(passed):
        if not passed[candidate]:
            break
        length = candidate
    return {"model": model, "definition": definition, "length": length, "longest_measured": max(passed)}
