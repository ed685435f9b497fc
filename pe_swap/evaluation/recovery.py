"""How much training a swap costs: steps and tokens until a model is as good as the unswapped one after the same training.

Held against the equally trained control at its end, and not against the base: on new text the control gets better too. Recovered is
the first *measured* point at which `perplexity <= bound * perplexity of the control`; nothing is interpolated between points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BOUNDS = (1.05, 1.01)
"""Perplexity over the control's that counts as recovered."""

Curve = Sequence[Mapping[str, Any]]
"""Points of a training by step, each with `step`, `tokens` and `perplexity`, which is None where it is not finite."""


def first_within(curve: Curve, limit: float) -> Mapping[str, Any] | None:
    """Return the first point whose perplexity is at most `limit`, or None."""
    return next((point for point in curve if point["perplexity"] is not None and point["perplexity"] <= limit), None)


def curves(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Curve]:
    """Return the curve of each part of a comparison that was measured while it trained, by label."""
    found = {label: (part.get("perplexity") or {}).get("by_step") for label, part in parts.items()}
    return {label: curve for label, curve in found.items() if curve}


def recovery(parts_by_seed: Mapping[int, Mapping[str, Mapping[str, Any]]], control: str | None) -> list[dict[str, Any]]:
    """Return when each model of a comparison was back, a row per bound, label and seed; none without a control or curves.

    Args:
        parts_by_seed: by seed and label, what a comparison's record holds under `parts`.
        control: label of the model that is not swapped, trained equally.
    """
    rows = []
    for seed, parts in parts_by_seed.items():
        found = curves(parts)
        final = found[control][-1]["perplexity"] if control in found else None
        for label, curve in found.items():
            if final is None or label == control:
                continue
            for bound in BOUNDS:
                point = first_within(curve, bound * final)
                rows.append(
                    {
                        "model": label,
                        "seed": seed,
                        "bound": bound,
                        "control": control,
                        "control_perplexity": final,
                        "step": None if point is None else point["step"],
                        "tokens": None if point is None else point["tokens"],
                        "last_step": curve[-1]["step"],
                    }
                )
    return rows


def recovery_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of `recovery`, a row per model and a column per bound; several seeds stand in one cell, in order."""
    if not rows:
        return []
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    finals = list(dict.fromkeys((row["seed"], row["control_perplexity"]) for row in rows))
    bounds = list(dict.fromkeys(row["bound"] for row in rows))
    several = f" A cell has one entry per seed, in the order {', '.join(map(str, seeds))}." if len(seeds) > 1 else ""
    lines = [
        f"Training until a model is as good as **{rows[0]['control']}** at its end, after the same training (perplexity "
        f"{', '.join(f'{final:.2f}' for _, final in finals)}): the first measured point within so much of it, in steps, with tokens in "
        f"brackets. A dash was not within it by the end, step {rows[0]['last_step']:,}.{several}",
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
