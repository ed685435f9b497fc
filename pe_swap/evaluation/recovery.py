"""How much training a swap costs: steps and tokens until a model is as good as the unswapped one after the same training.

Held against the equally trained control at its end, and not against the base: on new text the control gets better too. Recovered is
the first *measured* point at which `perplexity <= bound * perplexity of the control`; nothing is interpolated between points. At each
length it is the control's perplexity there; where the control has none, as beyond its table, that at the longest length it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BOUNDS = (1.05, 1.01)
"""Perplexity over the control's that counts as recovered."""

Curve = Sequence[Mapping[str, Any]]
"""Points of a training by step, each with `step`, `tokens`, `length` and `perplexity`, which is None where there is none."""


def first_within(curve: Curve, limit: float) -> Mapping[str, Any] | None:
    """Return the first point whose perplexity is at most `limit`, or None; none counts while the old positions still act beside the new."""
    measured = (point for point in curve if point["perplexity"] is not None and not point.get("faded"))
    return next((point for point in measured if point["perplexity"] <= limit), None)


def curves(parts: Mapping[str, Mapping[str, Any]]) -> dict[int, dict[str, Curve]]:
    """Return the curve of each part of a comparison that was measured while it trained, by length and label; the trained length first."""
    found: dict[int, dict[str, list[Mapping[str, Any]]]] = {}
    for label, part in parts.items():
        for point in (part.get("perplexity") or {}).get("by_step") or []:
            found.setdefault(point["length"], {}).setdefault(label, []).append(point)
    return {length: dict(by_label) for length, by_label in found.items()}


def recovery(parts_by_seed: Mapping[int, Mapping[str, Mapping[str, Any]]], control: str | None) -> list[dict[str, Any]]:
    """Return when each model of a comparison was back, a row per length, bound, label and seed; none without a control or curves.

    Args:
        parts_by_seed: by seed and label, what a comparison's record holds under `parts`.
        control: label of the model that is not swapped, trained equally.
    """
    rows = []
    for seed, parts in parts_by_seed.items():
        found = curves(parts)
        finals = {length: found[length][control][-1]["perplexity"] for length in found if control in found[length]}
        taken = [length for length, final in finals.items() if final is not None]
        for length, by_label in found.items() if taken else ():
            control_length = length if length in taken else max(taken)
            for label, curve in by_label.items():
                if label == control:
                    continue
                for bound in BOUNDS:
                    point = first_within(curve, bound * finals[control_length])
                    rows.append(
                        {
                            "model": label,
                            "seed": seed,
                            "length": length,
                            "bound": bound,
                            "control": control,
                            "control_length": control_length,
                            "control_perplexity": finals[control_length],
                            "step": None if point is None else point["step"],
                            "tokens": None if point is None else point["tokens"],
                            "last_step": curve[-1]["step"],
                        }
                    )
    return rows


def recovery_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of `recovery` per length: a row per model, a column per bound; a cell has all seeds, in order."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    return [line for length in lengths for line in _length_table([row for row in rows if row["length"] == length], len(lengths))]


def _length_table(rows: Sequence[Mapping[str, Any]], lengths: int) -> list[str]:
    """Return the lines of the table of one length, of so many that were measured."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    finals = list(dict.fromkeys((row["seed"], row["control_perplexity"]) for row in rows))
    bounds = list(dict.fromkeys(row["bound"] for row in rows))
    several = f" A cell has one entry per seed, in the order {', '.join(map(str, seeds))}." if len(seeds) > 1 else ""
    length, control_length = rows[0]["length"], rows[0]["control_length"]
    at = f"At {length:,} tokens of context: training" if lengths > 1 else "Training"
    other = "" if length == control_length else f", at {control_length:,} tokens, as it takes no {length:,}"
    lines = [
        f"{at} until a model is as good as **{rows[0]['control']}** at its end, after the same training (perplexity "
        f"{', '.join(f'{final:.2f}' for _, final in finals)}{other}): the first measured point within so much of it, in steps, with tokens "
        f"in brackets. A dash was not within it by the end, step {rows[0]['last_step']:,}.{several}",
        "",
    ]
    lines += [
        "| model | " + " | ".join(f"within {100 * (bound - 1):.0f}%" for bound in bounds) + " |",
        "|---|" + "---:|" * len(bounds),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for bound in bounds:
            mine = [row for row in rows if (row["model"], row["bound"]) == (model, bound)]
            cells.append("; ".join("-" if row["step"] is None else f"{row['step']:,} ({row['tokens']:,})" for row in mine))
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return [*lines, ""]
