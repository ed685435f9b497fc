"""Pictures of an evaluation's rows."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pe_swap.evaluation.comparison import drawn_over
from pe_swap.evaluation.rows import AccuracyRow, PerplexityRow, ProbeNote, ProbeRow

COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f", "#bcbd22")
"""Okabe and Ito's colours, told apart by the colour-blind, and a few more; the control comes first, in black."""

STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}

LEGEND_COLUMN = 2.1
"""Inches of a legend's column."""

LEGEND_CHARACTERS = 21
"""Characters of a legend's line that fit into a column, beside the line that they explain, in the legend's size."""


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    return content.getvalue()


def svg(figure: Figure) -> bytes:
    """Return a figure as an SVG file."""
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    return content.getvalue()


def line_style(index: int) -> dict[str, Any]:
    """Return how a model's line is drawn: colours in turn, then the same ones dotted."""
    style = ("-", "-.", ":")[index // len(COLOURS) % 3]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": style, "marker": "o", "markersize": 3.5, "linewidth": 1.5}


def plot(rows: Sequence[PerplexityRow], trained_length: dict[str, int | None]) -> Figure:
    """Return perplexity against length, a column of panels per protocol; below it the ratio to the control, where there is one.

    Bands are 95% intervals over documents (and seeds): of the perplexity above, of the paired ratio below. The legend names them.
    """
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    has_ratios = any(row.get("ratio") is not None and row["control"] != row["model"] for row in rows)
    kinds = ["perplexity", "ratio"] if has_ratios else ["perplexity"]
    marked = {length for length in trained_length.values() if length is not None}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(protocols) + 1.6, 3.4 * len(kinds) + 0.6), layout="constrained")
        panels = figure.subplots(len(kinds), len(protocols), squeeze=False)
        for kind, line in zip(kinds, panels, strict=True):
            for axes, protocol in zip(line, protocols, strict=True):
                _panel(axes, [row for row in rows if row["protocol"] == protocol], models, kind, marked)
                axes.set_title(protocol if kind == "perplexity" else "", loc="right", color="#555555")
        words = f"band: 95% interval over {drawn_over(rows)}" + (" (of the ratio: paired)" if has_ratios else "")
        _legend(figure, words if any(row["ci_low"] is not None for row in rows) else "")
    return figure


def panel_plot(
    rows: Sequence[PerplexityRow], models: Sequence[str], trained_length: Mapping[str, int | None], kind: str
) -> Figure:
    """Return one panel of `plot`, small: perplexity or ratio of one protocol.

    Args:
        rows: of one protocol.
        models: all models of the report, in the order of their colours.
        trained_length: of each model.
        kind: `perplexity` or `ratio`.
    """
    marked = {length for length in trained_length.values() if length is not None}
    with mpl.rc_context(STYLE):
        figure = _small_figure(len(models) + 2)
        _panel(figure.subplots(), rows, models, kind, marked)
        words = f"band: {'paired ' if kind == 'ratio' else ''}95% interval over {drawn_over(rows)}"
        low_key = "ci_low" if kind == "perplexity" else "ratio_low"
        _legend(figure, words if any(row[low_key] is not None for row in rows) else "")  # type: ignore[literal-required]
    return figure


def position_plot(rows: Sequence[PerplexityRow], models: Sequence[str]) -> Figure:
    """Return the mean loss by position of each model, at the longest length it took, small; rows are of one protocol."""
    with mpl.rc_context(STYLE):
        figure = _small_figure(len(models))
        axes = figure.subplots()
        for index, model in enumerate(models):
            mine = [row for row in rows if row["model"] == model and row["loss_by_position"]]
            if mine:
                longest = max(mine, key=lambda row: row["length"])
                label = f"{model}, {longest['length']:,}"
                parts = longest["loss_by_position"]
                axes.plot([part["last"] for part in parts], [part["loss"] for part in parts], label=label, **line_style(index))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("place in the window" if rows[0]["protocol"] == "masked" else "tokens predicted from")
        axes.set_ylabel("mean loss, nats")
        axes.grid(axis="y", color="#eeeeee")
        _legend(figure, "")
    return figure


def training_plot(parts: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Return the training loss of each part of a comparison by step, small; None where no part was trained."""
    logs = {label: (part.get("training") or {}).get("log") or [] for label, part in parts.items()}
    if not any(logs.values()):
        return None
    with mpl.rc_context(STYLE):
        figure = _small_figure(len(logs))
        axes = figure.subplots()
        for index, (label, log) in enumerate(logs.items()):
            if log:
                axes.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], label=label, **line_style(index))
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats")
        axes.grid(axis="y", color="#eeeeee")
        _legend(figure, "")
    return figure


def recovery_plot(curves: Mapping[int, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """Return perplexity against tokens trained on, a panel per length and a line per model; a point without perplexity is left out."""
    with mpl.rc_context(STYLE):
        entries = max(map(len, curves.values()))
        figure = (
            Figure(figsize=(4.2 * len(curves), 3.4 + 0.19 * (entries // (2 * len(curves)))), layout="constrained")
            if len(curves) > 1
            else _small_figure(entries)
        )
        for axes, (length, by_label) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
            for index, (label, curve) in enumerate(by_label.items()):
                points = [(point["tokens"], point["perplexity"]) for point in curve if point["perplexity"] is not None]
                axes.plot([tokens for tokens, _ in points], [found for _, found in points], label=label, **line_style(index))
            _logarithmic(axes)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_title(f"{length:,} tokens of context" if len(curves) > 1 else "", loc="right", color="#555555")
            axes.set_xlabel("tokens trained on")
            axes.set_ylabel("perplexity")
            axes.grid(axis="y", color="#eeeeee")
        _legend(figure, "")
    return figure


def _small_figure(entries: int) -> Figure:
    """Return a figure whose text can be read at the width of a phone, with room for a legend of two columns."""
    return Figure(figsize=(4.2, 3.0 + 0.19 * ((entries + 1) // 2)), layout="constrained")


def _legend(figure: Figure, band: str) -> None:
    """Put one legend below all panels: the lines of the first, and what bands are.

    Long words are broken, as a legend that is wider than its figure is cut off, and the figure grows by the lines that this takes.
    """
    handles, labels = figure.axes[0].get_legend_handles_labels()
    found = [*zip(handles, labels, strict=True), *([(Patch(color="#999999", alpha=0.3), band)] if band else [])]
    shown, whole = zip(*found, strict=True) if found else ((), ())
    columns = max(2, int(figure.get_figwidth() / LEGEND_COLUMN))
    said = [textwrap.fill(label, LEGEND_CHARACTERS) for label in whole]
    figure.set_figheight(figure.get_figheight() + 0.14 * -(-sum(label.count("\n") for label in said) // columns))
    figure.legend(shown, said, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)


def _logarithmic(axes: Any) -> None:
    """Make the vertical axis logarithmic; a range of less than 3 to 1 has even steps, as it may hold no power of ten and its parts."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow, wide = MaxNLocator(5), LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
    axes.yaxis.set_major_locator(narrow if high < 3 * low else wide)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _panel(axes: Any, rows: Sequence[PerplexityRow], models: Sequence[str], kind: str, marked: set[int]) -> None:
    """Draw one protocol's lines: perplexities or ratios, and the trained length where all models have the same."""
    low_key, high_key = ("ci_low", "ci_high") if kind == "perplexity" else ("ratio_low", "ratio_high")
    for index, model in enumerate(models):
        colour = COLOURS[index % len(COLOURS)]
        mine = [row for row in rows if row["model"] == model]
        found: list[Any] = sorted((row for row in mine if row.get(kind) is not None), key=lambda row: row["length"])
        if not found:
            continue
        lengths = [row["length"] for row in found]
        ends = "" if lengths[-1] == max(row["length"] for row in mine) else f" (to {lengths[-1]:,})"
        axes.plot(lengths, [row[kind] for row in found], label=f"{model}{ends}", **line_style(index))
        banded = [row for row in found if row[low_key] is not None]
        lows, highs = [row[low_key] for row in banded], [row[high_key] for row in banded]
        axes.fill_between([row["length"] for row in banded], lows, highs, color=colour, alpha=0.12, linewidth=0)
    if len(marked) == 1:
        axes.axvline(next(iter(marked)), color="#999999", linestyle="--", linewidth=1, label="trained length")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["length"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    _logarithmic(axes)
    axes.set_xlabel("context length, tokens")
    name = "perplexity" if not rows or rows[0]["protocol"] != "masked" else "exp(loss on masked tokens)"
    axes.set_ylabel(name if kind == "perplexity" else f"{name} / control's")
    axes.grid(axis="y", color="#eeeeee")


def probe_plot(rows: Sequence[ProbeRow], note: ProbeNote, scale: Sequence[float] = ()) -> Figure:
    """Return a picture of one probe: lines against its column, or a heat map per model where it has two coordinates.

    Args:
        rows: of one probe.
        note: what the report says of it.
        scale: values that the colours of heat maps have to span, besides those of `rows`.
    """
    measured = [row for row in rows if row["value"] is not None]
    quantities = [name for name in note["quantities"] if any(row["quantity"] == name for row in measured)]
    models = list(dict.fromkeys(row["model"] for row in measured))
    places = [name for name in measured[0]["at"] if name != note["columns"]]
    with mpl.rc_context(STYLE):
        if not places:
            several = len(quantities) > 1
            figure = (
                Figure(figsize=(4.6 * len(quantities) + 1.2, 3.8), layout="constrained")
                if several
                else _small_figure(len(models))
            )
            for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
                _probe_lines(axes, [row for row in measured if row["quantity"] == quantity], models, note)
            _legend(figure, "")
            return figure
        figure = Figure(figsize=(3.4 * len(models) + 0.8, 2.6 * len(quantities) + 0.4), layout="constrained")
        panels = figure.subplots(len(quantities), len(models), squeeze=False)
        for line, quantity in zip(panels, quantities, strict=True):
            values = [*scale, *(float(row["value"] or 0.0) for row in measured if row["quantity"] == quantity)]
            limits = (min(0.0, *values), max(1.0, *values)) if max(values) <= 1 else (min(values), max(values))
            for axes, model in zip(line, models, strict=True):
                chosen = [row for row in measured if (row["quantity"], row["model"]) == (quantity, model)]
                image = _heat_map(axes, chosen, places, note["columns"], limits)
                axes.set_title(f"{model}: {quantity.replace('_', ' ')}", fontsize=9)
            figure.colorbar(image, ax=list(line), shrink=0.85)
    return figure


def _probe_lines(axes: Any, rows: Sequence[ProbeRow], models: Sequence[str], note: ProbeNote) -> None:
    """Draw one quantity against the probe's column."""
    column = note["columns"]
    for index, model in enumerate(models):
        points: dict[float, list[float]] = {}
        for row in rows:
            if row["model"] == model:
                where = row["length"] if column == "length" else row["at"][column]
                points.setdefault(where, []).append(float(row["value"] or 0.0))
        axes.plot(sorted(points), [np.mean(points[where]) for where in sorted(points)], label=model, **line_style(index))
    ticks = sorted({row["length"] if column == "length" else row["at"][column] for row in rows})
    axes.set_xscale("symlog" if min(ticks) <= 0 else "log", base=2)
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks], rotation=45 if len(ticks) > 5 else 0)
    axes.minorticks_off()
    axes.set_xlabel(f"{column.replace('_', ' ')}, tokens")
    axes.set_ylabel(rows[0]["quantity"].replace("_", " "))
    if "accuracy" in rows[0]["quantity"]:
        axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y", color="#eeeeee")


def _heat_map(axes: Any, rows: Sequence[ProbeRow], places: Sequence[str], column: str, limits: tuple[float, float]) -> Any:
    """Draw one quantity of one model by two coordinates; of three, at the longest length."""
    longest = max((row["length"] for row in rows), default=0)
    across, down = (column, places[0]) if len(places) == 1 else (places[1], places[0])
    chosen = rows if len(places) == 1 else [row for row in rows if row["length"] == longest]
    where = [{"length": row["length"], **row["at"]} for row in chosen]
    columns, lines = sorted({place[across] for place in where}), sorted({place[down] for place in where})
    grid = np.full((len(lines), len(columns)), np.nan)
    for row, place in zip(chosen, where, strict=True):
        grid[lines.index(place[down]), columns.index(place[across])] = row["value"]
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1])
    step = max(1, len(columns) // 8)
    axes.set_xticks(range(0, len(columns), step), [f"{value:,g}" for value in columns[::step]], rotation=45)
    step = max(1, len(lines) // 8)
    axes.set_yticks(range(0, len(lines), step), [f"{value:,g}" for value in lines[::step]])
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    return image


def accuracy_plot(rows: Sequence[AccuracyRow], trained: int) -> Figure:
    """Return accuracy against resolution, and beside it the difference to the control where there is one.

    Args:
        rows: of one measure.
        trained: the resolution that the models were trained at, in pixels.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    kinds = ["accuracy", "difference"] if any(row["control"] not in (None, row["model"]) for row in rows) else ["accuracy"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(kinds), 3.6 + 0.19 * ((len(models) + 4) // 4)), layout="constrained")
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            _accuracy_lines(axes, rows, models, trained, kind)
        _legend(figure, "")
    return figure


def accuracy_panel(rows: Sequence[AccuracyRow], models: Sequence[str], trained: int, kind: str) -> Figure:
    """Return one panel of `accuracy_plot`, small: `accuracy` or `difference`."""
    with mpl.rc_context(STYLE):
        figure = _small_figure(len(models) + 1)
        _accuracy_lines(figure.subplots(), rows, models, trained, kind)
        _legend(figure, "")
    return figure


def _accuracy_lines(axes: Any, rows: Sequence[AccuracyRow], models: Sequence[str], trained: int, kind: str) -> None:
    """Draw a line per model, in percent or percentage points, and the trained resolution."""
    for index, model in enumerate(models):
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: int(row["resolution"]))
        points = [(row["resolution"], 100 * row[kind]) for row in mine if row[kind] is not None]  # type: ignore[literal-required]
        if points:
            axes.plot(*zip(*points, strict=True), label=model, **line_style(index))
    axes.axvline(trained, color="#999999", linestyle="--", linewidth=1, label="trained resolution")
    ticks = sorted({row["resolution"] for row in rows})
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xlabel("height and width of an image, pixels")
    axes.set_ylabel("accuracy, %" if kind == "accuracy" else "accuracy less the control's, points")
    axes.grid(axis="y", color="#eeeeee")
