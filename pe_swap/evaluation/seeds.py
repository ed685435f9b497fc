"""Several trainings of one model that differ in their seed, as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pe_swap.evaluation.bootstrap import perplexity_interval
from pe_swap.evaluation.rows import PerplexityRow, PositionLoss, ProbeRow


def joined(rows: Sequence[PerplexityRow], *, samples: int, seed: int) -> list[PerplexityRow]:
    """Return one row per model, protocol and length: losses are means over seeds, intervals are over documents and seeds.

    A length at which one seed has no number has none for all: the mean of the others would hide that seed.

    Args:
        rows: one per seed.
        samples: resamplings behind an interval.
        seed: of the resamplings.
    """
    groups: dict[tuple[str, str, int], list[PerplexityRow]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["protocol"], row["length"]), []).append(row)
    return [group[0] if len(group) == 1 else _joined(group, samples, seed) for group in groups.values()]


def _joined(rows: Sequence[PerplexityRow], samples: int, seed: int) -> PerplexityRow:
    """Return the rows of several seeds as one."""
    seeds = [number for row in rows for number in row["seeds"]]
    failed = next((row for row in rows if row["error"] is not None), None)
    if failed is not None:
        return {**failed, "error": _error_of_seeds([(row["seeds"], row["error"]) for row in rows]), "seeds": seeds}
    losses = np.array([run for row in rows for run in row["document_losses"]])
    tokens = np.array(rows[0]["document_tokens"], dtype=float)
    perplexity, low, high = perplexity_interval(losses, tokens, samples=samples, seed=seed)
    bits = [row["bits_per_byte"] for row in rows if row["bits_per_byte"] is not None]
    return {
        **rows[0],
        "seeds": seeds,
        "perplexity": perplexity,
        "ci_low": low,
        "ci_high": high,
        "bits_per_byte": float(np.mean(bits)) if len(bits) == len(rows) else None,
        "loss_by_position": _mean_by_position([row["loss_by_position"] for row in rows]),
        "document_losses": losses.tolist(),
    }


def _error_of_seeds(errors: Sequence[tuple[list[int], str | None]]) -> str:
    """Return why seeds have no number: the error where it is that of all, else which seeds have it."""
    said = [error for _, error in errors]
    if len(set(said)) == 1:
        return str(said[0])
    return "; ".join(f"seed {', '.join(map(str, seeds))}: {error}" for seeds, error in errors if error is not None)


def _mean_by_position(runs: Sequence[Sequence[PositionLoss]]) -> list[PositionLoss]:
    """Return the mean over runs of the loss in each range; all runs have the same ranges, with the same targets."""
    found: list[PositionLoss] = []
    for parts in zip(*runs, strict=True):
        mean = parts[0].copy()
        mean["loss"] = float(np.mean([part["loss"] for part in parts]))
        found.append(mean)
    return found


def joined_probes(rows: Sequence[ProbeRow]) -> list[ProbeRow]:
    """Return one row per model, measure, length, quantity and place: the mean over seeds; none where a seed has none."""
    groups: dict[tuple[object, ...], list[ProbeRow]] = {}
    for row in rows:
        key = (row["model"], row["measure"], row["length"], row["quantity"], *row["at"].items())
        groups.setdefault(key, []).append(row)
    found: list[ProbeRow] = []
    for group in groups.values():
        errors = [(row["seeds"], row["error"]) for row in group]
        values = [row["value"] for row in group if row["value"] is not None]
        whole = len(values) == len(group)
        found.append(
            {
                **group[0],
                "seeds": [seed for row in group for seed in row["seeds"]],
                "value": float(np.mean(values)) if whole else None,
                "count": sum(row["count"] for row in group),
                "error": None if whole else _error_of_seeds(errors),
            }
        )
    return found
