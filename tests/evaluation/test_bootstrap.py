"""Intervals over documents."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pe_swap.evaluation.bootstrap import paired_ratio, perplexity_interval


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


def test_a_single_document_has_no_interval() -> None:
    assert perplexity_interval(np.array([4.0]), np.array([2.0]), samples=10, seed=0) == (pytest.approx(math.exp(2)), None, None)


def test_a_paired_ratio_is_narrow_where_single_intervals_are_wide() -> None:
    # Documents differ by far more than models: losses of 2 to 6 nats per token, the second model 0.1 better on each.
    losses, tokens = np.linspace(2, 6, 30) * 10, np.full(30, 10.0)
    _, low, high = perplexity_interval(losses, tokens, samples=500, seed=0)
    assert high / low > 1.5
    ratio, low, high = paired_ratio(losses - 1.0, losses, tokens, samples=500, seed=0)
    assert (ratio, low, high) == pytest.approx((math.exp(-0.1),) * 3)


def test_several_seeds_widen_the_interval_and_average_the_point() -> None:
    losses, tokens = np.random.default_rng(0).normal(3, 0.1, 40), np.ones(40)
    seeds = np.stack([losses - 0.5, losses, losses + 0.5])
    one, several = (perplexity_interval(values, tokens, samples=2000, seed=0) for values in (losses, seeds))
    assert several[0] == pytest.approx(one[0])
    # Three seeds drawn of three: the standard error of their mean is 0.5 * sqrt(2 / 3) / sqrt(3) = 0.236.
    assert math.log(several[2] / several[1]) > 3 * math.log(one[2] / one[1])
    assert paired_ratio(seeds, seeds - 0.2, tokens, samples=100, seed=0) == pytest.approx((math.exp(0.2),) * 3)
