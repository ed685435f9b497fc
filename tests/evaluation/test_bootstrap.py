"""Intervals over documents."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pe_swap.evaluation.bootstrap import perplexity_interval


def test_perplexity_is_weighted_by_tokens() -> None:
    # 1 token of loss 4 and 3 tokens of loss 0: mean 1, where the mean of the documents' means would be 2.
    perplexity, _, _ = perplexity_interval(np.array([4.0, 0.0]), np.array([1.0, 3.0]), samples=10, seed=0)
    assert perplexity == pytest.approx(math.e)


def test_equal_documents_have_no_width() -> None:
    assert perplexity_interval(np.full(5, 6.0), np.full(5, 3.0), samples=50, seed=0) == pytest.approx((math.exp(2),) * 3)


def test_the_interval_is_that_of_the_mean_over_documents() -> None:
    # 400 documents of one token, losses of standard deviation 1: the mean's standard error is 0.05, the interval +-1.96 of it.
    losses = np.random.default_rng(1).normal(3, 1, 400)
    perplexity, low, high = perplexity_interval(losses, np.ones(400), samples=4000, seed=0)
    width = 1.96 * losses.std() / 20
    assert math.log(low) == pytest.approx(math.log(perplexity) - width, abs=0.01)
    assert math.log(high) == pytest.approx(math.log(perplexity) + width, abs=0.01)


def test_the_seed_decides() -> None:
    losses, tokens = np.arange(9.0), np.full(9, 4.0)
    one, same, other = (perplexity_interval(losses, tokens, samples=30, seed=seed) for seed in (3, 3, 4))
    assert one == same
    assert one[1:] != other[1:]
