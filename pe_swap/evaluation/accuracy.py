"""Rows of accuracy by resolution: of one model, over seeds, and against a control on the same images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pe_swap.evaluation.bootstrap import mean_interval
from pe_swap.evaluation.rows import PROTOCOL_VERSION, AccuracyRow
from pe_swap.runs.config import ORIGINAL


def accuracy_row(measure: str, resolution: int, hits: Tensor) -> AccuracyRow:
    """Return the row of one model, without labels, interval and control.

    Args:
        measure: name of the measure.
        resolution: in pixels.
        hits: whether the model is right about each image, bool, `[images]`.
    """
    return {
        "model": "", "scheme": "", "seeds": [], "measure": measure, "protocol_version": PROTOCOL_VERSION, "resolution": resolution,
        "accuracy": float(hits.double().mean()), "ci_low": None, "ci_high": None, "images": len(hits),
        "hits": ["".join(map(str, hits.int().tolist()))],
        "control": None, "difference": None, "difference_low": None, "difference_high": None,
    }  # fmt: skip


def numbers(hits: Sequence[str]) -> NDArray[np.float64]:
    """Return hits as numbers, `[seeds, images]`."""
    return np.array([[float(hit) for hit in word] for word in hits])


def joined_accuracies(rows: Sequence[AccuracyRow], *, samples: int, seed: int) -> list[AccuracyRow]:
    """Return one row per model, measure and resolution: the mean over seeds, with its interval over images and seeds.

    Args:
        rows: one per seed.
        samples: resamplings behind an interval.
        seed: of the resamplings.
    """
    groups: dict[tuple[str, str, int], list[AccuracyRow]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["measure"], row["resolution"]), []).append(row)
    found: list[AccuracyRow] = []
    for group in groups.values():
        hits = [word for row in group for word in row["hits"]]
        accuracy, low, high = mean_interval(numbers(hits), np.ones(len(hits[0])), samples=samples, seed=seed)
        seeds = [number for row in group for number in row["seeds"]]
        found.append({**group[0], "seeds": seeds, "hits": hits, "accuracy": accuracy, "ci_low": low, "ci_high": high})
    return found


def with_differences(rows: Sequence[AccuracyRow], *, control: str | None, samples: int, seed: int) -> list[AccuracyRow]:
    """Return the rows with `control` and the difference to it filled in, at each resolution.

    A resampling draws the same images for both models and, of several seeds, the same pairs of runs.

    Args:
        rows: of all models; those of one resolution are on the same images.
        control: label of the control; None takes the first model whose scheme is `original`, if there is one.
        samples: resamplings behind an interval.
        seed: of the resamplings.
    """
    found: list[AccuracyRow] = []
    for row in rows:
        beside = [other for other in rows if (other["measure"], other["resolution"]) == (row["measure"], row["resolution"])]
        named = [other for other in beside if (other["scheme"] == ORIGINAL if control is None else other["model"] == control)]
        if not named or len(named[0]["hits"]) != len(row["hits"]):
            found.append(row)
        elif named[0]["model"] == row["model"]:
            found.append({**row, "control": row["model"], "difference": 0.0})
        else:
            by_image = numbers(row["hits"]) - numbers(named[0]["hits"])
            difference, low, high = mean_interval(by_image, np.ones(row["images"]), samples=samples, seed=seed)
            bounds: AccuracyRow = {**row, "control": named[0]["model"], "difference": difference}
            found.append({**bounds, "difference_low": low, "difference_high": high})
    return found


def differs_from_control(row: AccuracyRow) -> bool:
    """Tell whether the interval of a row's difference excludes 0."""
    low, high = row["difference_low"], row["difference_high"]
    return low is not None and high is not None and (low > 0 or high < 0)
