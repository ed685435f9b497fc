"""When a model is back at the control's perplexity."""

from __future__ import annotations

from typing import Any

from pe_swap.evaluation.plots import recovery_plot
from pe_swap.evaluation.recovery import recovery, recovery_table


def points(length: int, *perplexities: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "tokens": 640 * i, "length": length, "perplexity": p} for i, p in enumerate(perplexities)]


def part(*perplexities: float | None) -> dict[str, Any]:
    return {"perplexity": {"by_step": points(64, *perplexities)}}


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


def test_no_point_counts_while_the_old_positions_act() -> None:
    fading = points(64, 40.0, 20.0, 20.0)
    fading[1]["faded"], fading[2]["faded"] = 0.5, 0.0
    rows = recovery({0: {"control": part(30.0, 25.0, 20.0), "fading": {"perplexity": {"by_step": fading}}}}, "control")
    assert [row["step"] for row in rows] == [20, 20]


def test_each_length_has_its_own_recovery_and_beyond_its_table_the_control_counts_at_its_last_length() -> None:
    def both(at_64: list[float], at_128: list[float | None], at_256: list[float | None]) -> dict[str, Any]:
        return {"perplexity": {"by_step": points(64, *at_64) + points(128, *at_128) + points(256, *at_256)}}

    parts = {"control": both([30.0, 20.0], [29.0, 19.0], [None, None]), "swapped": both([21.0, 20.0], [40.0, 19.9], [21.0, 19.1])}
    rows = recovery({0: parts}, "control")
    assert [(row["length"], row["bound"], row["control_length"], row["control_perplexity"], row["step"]) for row in rows] == [
        (64, 1.05, 64, 20.0, 0),
        (64, 1.01, 64, 20.0, 10),
        (128, 1.05, 128, 19.0, 10),
        (128, 1.01, 128, 19.0, None),
        (256, 1.05, 128, 19.0, 10),  # 21.0 would be within 5% of the 20.0 at 64
        (256, 1.01, 128, 19.0, 10),
    ]
    text = "\n".join(recovery_table(rows))
    assert text.count("| swapped |") == 3
    assert "At 128 tokens of context" in text
    assert "(perplexity 19.00, at 128 tokens, as it takes no 256)" in text


def test_a_picture_has_a_panel_per_length_and_no_line_where_a_model_takes_none() -> None:
    one = recovery_plot({64: {"control": points(64, 30.0, 20.0), "lost": points(64, 40.0, None)}})
    two = recovery_plot({64: {"control": points(64, 30.0, 20.0)}, 128: {"control": points(128, None, None)}})
    assert [[len(line.get_xdata()) for line in axes.lines] for axes in one.axes] == [[2, 1]]
    assert [[len(line.get_xdata()) for line in axes.lines] for axes in two.axes] == [[2], [0]]
