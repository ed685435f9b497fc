"""When a model is back at the control's perplexity."""

from __future__ import annotations

from typing import Any

from pe_swap.evaluation.recovery import recovery, recovery_table


def part(*perplexities: float | None) -> dict[str, Any]:
    return {"perplexity": {"by_step": [{"step": 10 * i, "tokens": 640 * i, "perplexity": p} for i, p in enumerate(perplexities)]}}


def test_recovered_is_the_first_measured_point_within_the_bound_of_the_control_s_end() -> None:
    parts = {
        "control": part(30.0, 25.0, 20.0),
        "back": part(40.0, 21.0, 20.3),
        "almost": part(None, 22.0, 20.2),
        "lost": {"perplexity": None},
    }
    rows = recovery({0: parts, 7: {"control": part(9.0, 10.0), "back": part(10.5, 10.1)}}, "control")
    assert [(row["model"], row["seed"], row["bound"], row["step"], row["tokens"]) for row in rows] == [
        ("back", 0, 1.05, 10, 640),  # 21.0 is exactly 1.05 of 20; between the points it was there before, which is not told
        ("back", 0, 1.01, None, None),
        ("almost", 0, 1.05, 20, 1280),
        ("almost", 0, 1.01, 20, 1280),
        ("back", 7, 1.05, 0, 0),
        ("back", 7, 1.01, 10, 640),
    ]
    lines = recovery_table(rows)
    assert "**control**" in lines[0]
    assert lines[2:5] == ["| model | within 5% | within 1% |", "|---|---:|---:|", "| back | 10 (640); 0 (0) | -; 10 (640) |"]
    assert recovery({0: parts}, None) == recovery({0: {"control": parts["lost"]}}, "control") == recovery_table([]) == []
