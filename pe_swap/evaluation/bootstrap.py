"""Intervals over documents."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def perplexity_interval(
    losses: NDArray[np.float64], tokens: NDArray[np.float64], *, samples: int, seed: int
) -> tuple[float, float, float]:
    """Return the token-weighted perplexity and its 95% percentile bootstrap interval over documents.

    Documents and not tokens are drawn, as losses within a document go together (Efron and Tibshirani, "An Introduction to the
    Bootstrap", 1993, chapter 13).

    Args:
        losses: summed loss of each document, nats.
        tokens: scored tokens of each document.
        samples: resamplings.
        seed: of the resamplings.

    Returns:
        `exp(sum of losses / sum of tokens)`, and the 2.5th and 97.5th percentile of the same over resampled documents.
    """
    drawn = np.random.default_rng(seed).integers(0, len(losses), size=(samples, len(losses)))
    means = losses[drawn].sum(axis=1) / np.maximum(tokens[drawn].sum(axis=1), 1)
    with np.errstate(over="ignore"):  # infinite where a mean loss is beyond what a float can be the exponential of
        low, high = np.exp(np.quantile(means, [0.025, 0.975]))
        return float(np.exp(losses.sum() / tokens.sum())), float(low), float(high)
