"""Tables and a plot from records alone."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from pe_swap.errors import ConfigError
from pe_swap.evaluation.comparison import differs, require_control, with_ratios
from pe_swap.evaluation.effective_length import effective_lengths
from pe_swap.evaluation.plots import panel_plot, plot, probe_plot
from pe_swap.evaluation.report import (
    COLUMNS,
    markdown_table,
    position_table,
    probe_section,
    ratio_table,
    refusals,
    scheme_text,
    start_table,
    write_report,
)
from tests.evaluation.records import COMPARISON, ROWS, compared, probe, row


def test_table() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| model | scheme | 64 | 128 |",
        "|---|---|---:|---:|",
        "| a | rope | 20.12 [19.12, 21.12] | 1,234 [1,234, 1,236] |",
        "| control | original | 21.00 [20.00, 22.00] | - |",
    ]


def test_a_length_that_could_not_be_taken_says_why() -> None:
    assert refusals(ROWS) == ["* control at 128: ends at 64", ""]
    assert refusals(ROWS[:3]) == []


def test_loss_by_position_at_the_longest_length_taken() -> None:
    assert position_table(ROWS)[2:] == [
        "| model | length | 1 |",
        "|---|---:|---:|",
        "| a | 128 | 4.500 |",
        "| control | 64 | 4.500 |",
        "",
    ]


def test_a_comparison_says_what_the_swap_did_before_training() -> None:
    assert start_table(COMPARISON) == [
        "## Right after the swap, and after training",
        "",
        "Perplexity at 1,024 tokens, on a sample of the documents above; the base has 22.67.",
        "",
        "| model | scheme | right after the swap | after training |",
        "|---|---|---:|---:|",
        "| control | original | 22.67 | 22.18 |",
        "| far | fox, layers=[0, 2], keep_mean=True, initial_reach=10000 | 1,045 | 23.46 |",
        "| short | learned, max_length=8 | - | 29.94 |",
        "",
    ]


def test_a_plan_is_named_and_not_taken_for_the_control() -> None:
    assert scheme_text({"name": "original", "plan": "nope_every_4", "keep_mean": None}) == "plan nope_every_4"
    assert scheme_text({"name": "rope", "plan": None, "base": 500.0}) == "rope, base=500.0"


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
    assert list(axes.texts) == []
    assert [text.get_text().replace("\n", " ") for text in axes.figure.legends[0].get_texts()] == [
        "a", "control (to 64)", "trained length", "band: 95% interval over documents",
    ]  # fmt: skip
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_a_narrow_range_still_has_numbers_on_its_axis() -> None:
    figure = plot([row("a", 64, 41.2), row("a", 128, 44.0)], {})
    figure.canvas.draw()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 2


@pytest.mark.parametrize("kind", ["perplexity", "ratio"])
def test_a_legend_is_within_its_figure(kind: str) -> None:
    """Beside words that are wider than its column; what sticks out is cut off in the file."""
    rows = with_ratios(compared(), control=None, unit="perplexity", samples=50, seed=0)
    for one in rows:
        one["model"] = one["model"] if one["model"] == "control" else f"a model with a label of length, {one['model']}"
    models = list(dict.fromkeys(one["model"] for one in rows))
    for figure in (panel_plot(rows, models, {}, kind), plot(rows, {})):
        figure.canvas.draw()
        legend, whole = figure.legends[0].get_window_extent(), figure.bbox
        assert whole.x0 <= legend.x0 < legend.x1 <= whole.x1
        assert whole.y0 <= legend.y0 < figure.axes[-1].get_window_extent().y0


def test_files(tmp_path: Path) -> None:
    write_report(tmp_path, {"results": ROWS, "trained_length": {"a": 64, "control": 64}, "data": {"documents": 2, "tokens": 9}})
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html", "results.csv", "perplexity.png"}
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert rows[3]["error"] == "ends at 64"
    assert "control at 128: ends at 64" in (tmp_path / "report.md").read_text()


def test_ratios_to_the_control_on_the_same_documents() -> None:
    found = with_ratios(compared(), control=None, unit="perplexity", samples=200, seed=0)
    by_name = {(one["model"], one["length"]): one for one in found}
    b = by_name["b", 64]
    assert b["control"] == "control"
    assert (b["ratio"], b["ratio_low"], b["ratio_high"]) == pytest.approx((math.exp(-0.1),) * 3)
    assert by_name["control", 64]["ratio"] == 1.0
    assert by_name["control", 128]["ratio"] is None
    # The control ends at 64: the first model that goes on takes its place.
    assert (by_name["b", 128]["control"], by_name["b", 128]["ratio"]) == ("b", 1.0)
    assert by_name["c", 128]["ratio"] == pytest.approx(math.exp(0.2))
    assert [differs(by_name[key]) for key in (("b", 64), ("c", 64), ("c", 128), ("b", 128))] == [True, False, True, False]
    lines = ratio_table(found)
    assert "The control is **control** at 64; **b** at 128." in lines[0]
    assert lines[4:6] == ["| control | original | 1 | - |", "| b | rope | 0.905 [0.905, 0.905]\\* | 1 |"]
    assert with_ratios(compared(), control="c", unit="perplexity", samples=9, seed=0)[2]["ratio"] == pytest.approx(math.exp(-0.1))


def test_models_that_were_scored_on_other_tokens_have_no_ratio_but_per_byte() -> None:
    control, _, b, *_ = compared()
    b = {**b, "document_tokens": [5, 5, 5], "document_bytes": [40, 40, 40]}
    rows = [{**control, "document_bytes": [40, 40, 40]}, b]
    assert with_ratios(rows, control=None, unit="perplexity", samples=9, seed=0)[1]["ratio"] is None
    # Summed losses of 120 and 117 nats over 120 bytes.
    assert with_ratios(rows, control=None, unit="bits_per_byte", samples=9, seed=0)[1]["ratio"] == pytest.approx(
        math.exp(-3 / 120)
    )


def test_a_control_that_is_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"control is 'contrl', which is none of the models\. Did you mean 'control'"):
        require_control("contrl", ["control", "b"])


def test_ratios_stand_in_report_csv_and_plot(tmp_path: Path) -> None:
    rows = with_ratios(compared(), control=None, unit="perplexity", samples=50, seed=0)
    write_report(tmp_path, {"results": rows, "trained_length": {}, "protocol_version": "v9"})
    text = (tmp_path / "report.md").read_text()
    assert "a star marks an interval without 1" in text
    assert "Protocol v9," in text
    with (tmp_path / "results.csv").open() as file:
        found = next(line for line in csv.DictReader(file) if (line["model"], line["length"]) == ("b", "64"))
    assert found["control"] == "control"
    assert float(found["ratio_low"]) == pytest.approx(math.exp(-0.1))
    figure = plot(rows, {})
    assert [axes.get_ylabel() for axes in figure.axes] == ["perplexity", "perplexity / control's"]
    assert "band: 95% interval over documents (of the ratio: paired)" in [
        text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()
    ]


def test_a_report_is_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.csv").write_text("as it was")

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_report(tmp_path, {"results": ROWS})
    assert caught.value.filename == str(tmp_path / "results.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    assert (tmp_path / "results.csv").read_text() == "as it was"


def test_effective_lengths_by_hand() -> None:
    rows = [row("a", 32, 20.0), row("a", 64, 20.0), row("a", 128, 20.9), row("a", 256, 22.0), row("a", 512, 20.0)]
    probes = [probe("passkey", "a", length, value) for length, value in ((64, 0.9), (128, 0.3), (256, 0.1))]
    found = effective_lengths(rows, probes, {"a": 64}, 1.05)
    assert [(one["definition"], one["length"], one["longest_measured"]) for one in found] == [
        ("sliding perplexity at most 1.05 times that at 64 tokens", 128, 512),
        ("passkey accuracy at least 20.0% (Chen et al.)", 128, 256),
        ("passkey accuracy at least 85.6% (RULER's bound)", 64, 256),
    ]
    assert effective_lengths(rows, [], {"a": None}, 1.05) == []


def test_probes_are_tables_by_their_own_coordinates(tmp_path: Path) -> None:
    grid = [
        probe("passkey", model, length, (0.5 if length == 64 else 0.25) * depth, depth=depth)
        for model in ("a", "b")
        for length in (64, 128)
        for depth in (0.0, 1.0)
    ]
    note = {
        "title": "Find it.",
        "quantities": {"accuracy": "Share"},
        "columns": "length",
        "averaged": [],
        "options": {"trials": 4},
    }
    lines = probe_section("passkey", note, [*grid, probe("passkey", "c", 64, None)])
    assert lines[:3] == ["## passkey", "", "Find it. Options: trials 4."]
    assert "| model | scheme | depth | 64 | 128 |" in lines
    assert "| a | rope | 1 | 0.500 | 0.250 |" in lines
    assert "* c at 64: too short a vocabulary" in lines
    averaged = probe_section("passkey", {**note, "averaged": ["depth"]}, grid)
    assert "| a | rope | 0.250 | 0.125 |" in averaged
    write_report(tmp_path, {"results": ROWS, "probes": grid, "measures": {"passkey": note}})
    assert (tmp_path / "passkey.png").stat().st_size > 1000
    with (tmp_path / "probes.csv").open() as file:
        assert next(csv.DictReader(file))["at"] == "depth=0"
    figure = probe_plot(grid, note)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a: accuracy", "b: accuracy"]
    assert figure.axes[0].images[0].get_array().tolist() == [[0.0, 0.0], [0.5, 0.25]]
