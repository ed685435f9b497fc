"""Intervals over documents.

Documents and not tokens are drawn, as losses within a document go together (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapter 13).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def mean_interval(values: Floats, weights: Floats, *, samples: int, seed: int) -> tuple[float, float | None, float | None]:
    """Return `sum of values / sum of weights` and its 95% percentile bootstrap interval over what the values are of.

    Args:
        values: one for each document or image, `[documents]`, or a row per seed of a model's training, `[seeds, documents]`.
        weights: what the mean is per, `[documents]`: scored tokens of a document, 1 for an image.
        samples: resamplings.
        seed: of the resamplings.

    Returns:
        The mean, over seeds too, and the 2.5th and 97.5th percentile of the same over resampled documents, and seeds where there are
        several. No interval (None, None) of a single document: nothing can be drawn again from it.
    """
    values = np.atleast_2d(values)
    point = float(values.mean(axis=0).sum() / weights.sum())
    if values.shape[1] < 2:
        return point, None, None
    generator, seeds = np.random.default_rng(seed), len(values)
    drawn = generator.integers(0, values.shape[1], size=(samples, values.shape[1]))
    if seeds == 1:
        sums = values[0][drawn].sum(axis=1)
    else:
        models = generator.integers(0, seeds, size=(samples, seeds))
        sums = np.take_along_axis(values[models].mean(axis=1), drawn, axis=1).sum(axis=1)
    low, high = np.quantile(sums / np.maximum(weights[drawn].sum(axis=1), 1), [0.025, 0.975])
    return point, float(low), float(high)


def perplexity_interval(losses: Floats, weights: Floats, *, samples: int, seed: int) -> tuple[float, float | None, float | None]:
    """Return the token-weighted perplexity and its 95% percentile bootstrap interval over documents.

    Args:
        losses: summed loss of each document, nats, `[documents]`, or a model per seed of its training, `[seeds, documents]`.
        weights: scored tokens of each document, `[documents]`.
        samples: resamplings.
        seed: of the resamplings.

    Returns:
        `exp(sum of losses / sum of tokens)`, and the exponentials of the bounds of `mean_interval`.
    """
    point, low, high = mean_interval(losses, weights, samples=samples, seed=seed)
    with np.errstate(over="ignore"):  # infinite where a mean loss is beyond what a float can be the exponential of
        return float(np.exp(point)), None if low is None else float(np.exp(low)), None if high is None else float(np.exp(high))


def paired_ratio(
    losses: Floats, control_losses: Floats, weights: Floats, *, samples: int, seed: int
) -> tuple[float, float | None, float | None]:
    """Return a perplexity over a control's on the same documents, and the ratio's own 95% interval.

    `exp((sum of losses - sum of the control's losses) / sum of weights)`. A resampling draws the same documents for both models (and,
    of several seeds, the same pairs of runs), so what makes a document hard for both cancels.

    Args:
        losses: summed loss of each document, nats, `[documents]` or `[seeds, documents]`.
        control_losses: the control's, of the same shape.
        weights: what the perplexity is per: scored tokens (or bytes) of each document, `[documents]`.
        samples: resamplings.
        seed: of the resamplings.
    """
    return perplexity_interval(losses - control_losses, weights, samples=samples, seed=seed)
