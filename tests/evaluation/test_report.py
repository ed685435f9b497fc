"""Tables and a plot from records alone."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pe_swap.evaluation.report import COLUMNS, markdown_table, plot, position_table, refusals, start_table, write_report


def row(model: str, length: int, perplexity: float | None, error: str | None = None) -> dict[str, Any]:
    low, high = (None, None) if perplexity is None else (perplexity - 1, perplexity + 1)
    seen = [] if perplexity is None else [{"from": 1, "to": 1, "tokens": 3, "loss": 4.5}]
    return {
        "model": model, "scheme": "rope", "protocol": "sliding", "length": length, "perplexity": perplexity,
        "ci_low": low, "ci_high": high, "tokens": 9, "error": error, "loss_by_position": seen,
    }  # fmt: skip


ROWS = [row("a", 64, 20.123), row("a", 128, 1234.5), row("control", 64, 21.0), row("control", 128, None, "ends at 64")]


def test_table() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| model | scheme | 64 | 128 |",
        "|---|---|---:|---:|",
        "| a | rope | 20.12 [19.12, 21.12] | 1,234 [1,234, 1,236] |",
        "| control | rope | 21.00 [20.00, 22.00] | - |",
    ]


def test_a_length_that_could_not_be_taken_says_why() -> None:
    assert refusals(ROWS) == ["* control at 128: ends at 64", ""]
    assert refusals(ROWS[:3]) == []


def test_loss_by_position_at_the_longest_length_taken() -> None:
    assert position_table(ROWS)[2:] == [
        "| model | length | 1-1 |",
        "|---|---:|---:|",
        "| a | 128 | 4.500 |",
        "| control | 64 | 4.500 |",
        "",
    ]


def part(after_swap: float | None, after_training: float | None) -> dict[str, Any]:
    measured = {"length": 1024, "before_swap": 22.672, "after_swap": after_swap, "after_training": after_training}
    return {"perplexity": measured, "seconds": 1.0, "training": {}}


COMPARISON = {
    "parts": {
        "control": part(22.672, 22.181),
        "far": part(1044.6, 23.456),
        "short": part(None, 29.94),
        "lost": {"perplexity": None},
    },
    "config": {
        "schemes": {
            "control": {"name": "original", "layers": None},
            "far": {"name": "fox", "layers": [0, 2], "initial_reach": 10000},
            "short": {"name": "learned", "layers": None, "max_length": 8},
        }
    },
}


def test_a_comparison_says_what_the_swap_did_before_training() -> None:
    assert start_table(COMPARISON) == [
        "## Right after the swap, and after training",
        "",
        "Perplexity at 1,024 tokens, on a sample of the documents above; the base has 22.67.",
        "",
        "| model | scheme | right after the swap | after training |",
        "|---|---|---:|---:|",
        "| control | original | 22.67 | 22.18 |",
        "| far | fox, layers=[0, 2], initial_reach=10000 | 1,045 | 23.46 |",
        "| short | learned, max_length=8 | - | 29.94 |",
        "",
    ]


def test_a_record_without_parts_has_no_such_table(tmp_path: Path) -> None:
    assert start_table({"parts": {}}) == start_table({"parts": {"lost": {"perplexity": None}}}) == []
    for record, times in (({}, 0), (COMPARISON, 1)):
        write_report(tmp_path, {"results": ROWS, **record})
        assert (tmp_path / "report.md").read_text().count("## Right after the swap") == times


def test_the_plot_leaves_a_gap_and_marks_the_trained_length() -> None:
    axes = plot(ROWS, {"a": 64, "control": 64}).axes[0]
    lines = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in lines] == [[64, 128], [64]]
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"] == [[64, 64]]
    assert {"a", "control (ends here)", "trained length"} <= {text.get_text() for text in axes.texts}
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_a_narrow_range_still_has_numbers_on_its_axis() -> None:
    figure = plot([row("a", 64, 41.2), row("a", 128, 44.0)], {})
    figure.canvas.draw()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 2


def test_files(tmp_path: Path) -> None:
    write_report(tmp_path, {"results": ROWS, "trained_length": {"a": 64, "control": 64}, "data": {"documents": 2, "tokens": 9}})
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "results.csv", "perplexity.png"}
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert rows[3]["error"] == "ends at 64"
    assert "control at 128: ends at 64" in (tmp_path / "report.md").read_text()
