"""Trainings with several seeds as one row."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pe_swap.evaluation.comparison import with_ratios
from pe_swap.evaluation.evaluator import unmeasured_row
from pe_swap.evaluation.seeds import joined, joined_probes


def run(model: str, seed: int, losses: list[float] | None) -> dict[str, Any]:
    found: dict[str, Any] = {**unmeasured_row(model, "rope", "sliding", 64, "diverged"), "seeds": [seed]}
    if losses is None:
        return found
    positions = [{"first": 1, "last": 1, "tokens": 2, "loss": sum(losses)}]
    measured = {"perplexity": math.exp(sum(losses) / 20), "bits_per_byte": sum(losses), "document_losses": [losses]}
    return {**found, **measured, "document_tokens": [10, 10], "loss_by_position": positions, "error": None}


def test_seeds_are_averaged_and_runs_are_paired() -> None:
    rows = [run("a", 0, [20.0, 30.0]), run("b", 0, [21.0, 31.0]), run("a", 1, [30.0, 40.0]), run("b", 1, [31.0, 41.0])]
    a, b = with_ratios(joined(rows, samples=200, seed=0), control="a", unit="perplexity", samples=200, seed=0)
    assert a["seeds"] == b["seeds"] == [0, 1]
    assert a["perplexity"] == pytest.approx(math.exp((50 + 70) / 2 / 20))
    assert a["document_losses"] == [[20.0, 30.0], [30.0, 40.0]]
    assert a["loss_by_position"] == [{"first": 1, "last": 1, "tokens": 2, "loss": 60.0}]
    assert a["bits_per_byte"] == 60.0
    # b is 0.1 nats per token worse on each document with each seed, though seeds differ by 1 nat per token.
    assert (b["ratio"], b["ratio_low"], b["ratio_high"]) == pytest.approx((math.exp(0.1),) * 3)
    assert a["ci_high"] / a["ci_low"] > 1.5


def test_a_seed_without_a_number_is_not_averaged_away() -> None:
    (row,) = joined([run("a", 0, [20.0, 30.0]), run("a", 1, None)], samples=10, seed=0)
    assert (row["perplexity"], row["error"]) == (None, "seed 1: diverged")
    (row,) = joined([run("a", 0, None), run("a", 1, None)], samples=10, seed=0)
    assert row["error"] == "diverged"


def test_a_single_run_is_as_it_was() -> None:
    rows = [run("a", 0, [20.0, 30.0]), run("b", 0, None)]
    assert joined(rows, samples=10, seed=0) == rows


def test_readings_are_averaged_by_place() -> None:
    def reading(seed: int, depth: float, value: float | None) -> dict[str, Any]:
        row = {"model": "a", "measure": "passkey", "length": 64, "quantity": "accuracy", "at": {"depth": depth}}
        return {**row, "seeds": [seed], "value": value, "count": 4, "error": None if value is not None else "diverged"}

    found = joined_probes([reading(0, 0.0, 0.5), reading(0, 1.0, 1.0), reading(1, 0.0, 0.25), reading(1, 1.0, None)])
    assert [(row["value"], row["count"], row["seeds"], row["error"]) for row in found] == [
        (0.375, 8, [0, 1], None),
        (None, 8, [0, 1], "seed 1: diverged"),
    ]
