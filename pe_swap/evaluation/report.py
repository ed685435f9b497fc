"""Tables and plots, from records alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

COLUMNS = ("model", "scheme", "protocol", "length", "perplexity", "ci_low", "ci_high", "tokens", "error")

COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f", "#bcbd22")
"""Okabe and Ito's colours, told apart by the colour-blind, and a few more; the control comes first, in black."""


def write_report(folder: Path, record: dict[str, Any], *, title: str = "Perplexity at lengths never trained on") -> None:
    """Write `report.md`, `results.csv` and `perplexity.png` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = record["results"]
    (folder / "results.csv").write_text(csv_table(rows), encoding="utf-8")
    plot(rows, record.get("trained_length") or {}).savefig(folder / "perplexity.png", dpi=150)
    parts = [f"# {title}", "", "![perplexity against length](perplexity.png)", ""]
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        chosen = [row for row in rows if row["protocol"] == protocol]
        parts += [f"## {protocol}", "", markdown_table(chosen), "", *refusals(chosen), *position_table(chosen)]
    parts += start_table(record)
    data = record.get("data") or {}
    parts += [
        f"{data.get('documents')} documents, {data.get('tokens')} tokens. Perplexity is token-weighted; in brackets its 95% bootstrap "
        f"interval over documents. A dash is a length that could not be taken; the reason stands below its table. "
        f"Commit {record.get('commit')}, seed {record.get('seed')}.",
        "",
    ]
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")


def csv_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of one protocol as a Markdown table, a row a model and a column a length."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| model | scheme | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---|---|" + "---:|" * len(lengths))
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = {row["length"]: row for row in rows if row["model"] == model}
        scheme = next(iter(cells.values()))["scheme"]
        lines.append(f"| {model} | {scheme} | " + " | ".join(_cell(cells.get(length)) for length in lengths) + " |")
    return "\n".join(lines)


def refusals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for every length that could not be taken, saying why."""
    lines = [f"* {row['model']} at {row['length']:,}: {row['error']}" for row in rows if row.get("error")]
    return [*lines, ""] if lines else []


def position_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of loss by position, at the longest length each model took."""
    longest: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: int(row["length"])):
        if row.get("loss_by_position"):
            longest[row["model"]] = row
    buckets = sorted({(part["from"], part["to"]) for row in longest.values() for part in row["loss_by_position"]})
    if not buckets:
        return []
    lines = ["Mean loss (nats) of targets by how many tokens they see, at the longest length taken:", ""]
    lines += ["| model | length | " + " | ".join(f"{low:,}-{high:,}" for low, high in buckets) + " |"]
    lines += ["|---|---:|" + "---:|" * len(buckets)]
    for model, row in longest.items():
        found = {(part["from"], part["to"]): f"{part['loss']:.3f}" for part in row["loss_by_position"]}
        lines.append(f"| {model} | {row['length']:,} | " + " | ".join(found.get(bucket, "-") for bucket in buckets) + " |")
    return [*lines, ""]


def start_table(record: dict[str, Any]) -> list[str]:
    """Return the lines of a table of what each swap did to the base before any training, and what training made of it.

    From the `parts` of a comparison's record, in their order; no lines where it has none.
    """
    measured = {label: part["perplexity"] for label, part in (record.get("parts") or {}).items() if part.get("perplexity")}
    if not measured:
        return []
    schemes = (record.get("config") or {}).get("schemes") or {}
    base = next(iter(measured.values()))
    lines = ["## Right after the swap, and after training", ""]
    lines += [
        f"Perplexity at {base['length']:,} tokens, on a sample of the documents above; the base has {_point(base['before_swap'])}.",
        "",
    ]
    lines += ["| model | scheme | right after the swap | after training |", "|---|---|---:|---:|"]
    for label, found in measured.items():
        scheme = _scheme_text(schemes.get(label) or {})
        lines.append(f"| {label} | {scheme} | {_point(found.get('after_swap'))} | {_point(found.get('after_training'))} |")
    return [*lines, ""]


def _scheme_text(section: dict[str, Any]) -> str:
    """Return a scheme's name and the options that its configuration gives."""
    options = [f"{name}={value}" for name, value in section.items() if name != "name" and value is not None]
    return ", ".join([str(section.get("name", "-")), *options])


def _point(value: float | None) -> str:
    """Return a perplexity without an interval."""
    return "-" if value is None else _number(value)


def _cell(row: dict[str, Any] | None) -> str:
    """Return one result as text."""
    if row is None or row["perplexity"] is None:
        return "-"
    return f"{_number(row['perplexity'])} [{_number(row['ci_low'])}, {_number(row['ci_high'])}]"


def _number(value: float) -> str:
    """Return a perplexity to three or four figures."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def plot(rows: Sequence[dict[str, Any]], trained_length: dict[str, int | None]) -> Figure:
    """Return perplexity against length, both logarithmic, a panel a protocol, with the trained length marked and lines labelled."""
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.5 * len(protocols), 4.5), layout="constrained")
        panels = figure.subplots(1, len(protocols), squeeze=False)[0]
        for axes, protocol in zip(panels, protocols, strict=True):
            _panel(axes, [row for row in rows if row["protocol"] == protocol], trained_length, protocol)
    return figure


def _panel(axes: Any, rows: Sequence[dict[str, Any]], trained_length: dict[str, int | None], protocol: str) -> None:
    """Draw one protocol's lines."""
    ends: list[tuple[float, float, str, str]] = []
    for index, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        colour = COLOURS[index % len(COLOURS)]
        points = sorted((row["length"], row) for row in rows if row["model"] == model and row["perplexity"] is not None)
        if not points:
            continue
        lengths, found = [length for length, _ in points], [row for _, row in points]
        axes.plot(lengths, [row["perplexity"] for row in found], color=colour, marker="o", markersize=3.5, linewidth=1.5)
        axes.fill_between(
            lengths,
            [row["ci_low"] for row in found],
            [row["ci_high"] for row in found],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
        asked = max(row["length"] for row in rows if row["model"] == model)
        label = model if lengths[-1] == asked else f"{model} (ends here)"
        ends.append((lengths[-1], found[-1]["perplexity"], label, colour))
    marked = {length for length in trained_length.values() if length is not None}
    if len(marked) == 1:
        axes.axvline(marked.pop(), color="#999999", linestyle="--", linewidth=1)
        axes.annotate(
            "trained length", (min(row["length"] for row in rows), 1.01), xycoords=("data", "axes fraction"), fontsize=8
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _label_ends(axes, ends)
    ticks = sorted({row["length"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.set_xlabel("context length, tokens")
    axes.set_ylabel("perplexity" if protocol != "masked" else "exp(loss on masked tokens)")
    axes.set_title(protocol, loc="right", color="#555555")
    axes.grid(axis="y", color="#eeeeee")


def _label_ends(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name at its end, apart enough to read."""
    if not ends:
        return
    low, high = axes.get_ylim()
    gap = (high / low) ** 0.05
    placed = low / gap
    for length, value, label, colour in sorted(ends, key=lambda end: end[1]):
        placed = max(value, placed * gap)
        axes.annotate(
            label, (length, value), xytext=(length * 1.06, placed), color=colour, va="center", fontsize=8.5, annotation_clip=False
        )
    axes.set_xlim(right=max(end[0] for end in ends) * 1.75)
