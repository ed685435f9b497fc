"""Tables, plots and CSV of a comparison on images, from its record alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pe_swap.evaluation.accuracy import differs_from_control
from pe_swap.evaluation.html_report import html_report
from pe_swap.evaluation.plots import accuracy_panel, accuracy_plot, png
from pe_swap.evaluation.report import csv_table, scheme_text, seeds_in_words
from pe_swap.evaluation.rows import AccuracyRow
from pe_swap.runs.files import write_whole

ACCURACY_COLUMNS = (
    "model", "scheme", "seeds", "measure", "resolution", "accuracy", "ci_low", "ci_high", "control", "difference", "difference_low",
    "difference_high", "images", "protocol_version",
)  # fmt: skip


def write_accuracy_report(folder: Path, record: dict[str, Any]) -> None:
    """Write `report.md`, `report.html`, `results.csv` and `accuracy.png` into a folder, each whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    rows: list[AccuracyRow] = record["accuracies"]
    trained = record["trained_resolution"]
    write_whole(folder / "results.csv", csv_table([*rows, *record["runs"]], ACCURACY_COLUMNS))
    parts = ["# At resolutions never trained on", ""]
    pictures = {}
    if rows:
        write_whole(folder / "accuracy.png", png(accuracy_plot(rows, trained)))
        parts += ["![accuracy by resolution](accuracy.png)", ""]
        models = list(dict.fromkeys(row["model"] for row in rows))
        pictures["accuracy.png"] = [
            ("Accuracy by resolution", accuracy_panel(rows, models, trained, "accuracy")),
            ("Difference to the control", accuracy_panel(rows, models, trained, "difference")),
        ]
        parts += difference_table(rows)
        parts += ["Accuracy, %:", "", *table(rows, accuracy_cell), ""]
    for label in record["diverged"]:
        parts += [f"* {label} diverged, so it is not measured. Train it again at a lower learning rate.", ""]
    parts += [*start_table(record), _footer(record), ""]
    markdown = "\n".join(parts)
    write_whole(folder / "report.md", markdown)
    write_whole(folder / "report.html", html_report(markdown, record, pictures))


def table(rows: Sequence[AccuracyRow], cell: Callable[[AccuracyRow], str]) -> list[str]:
    """Return the lines of a table, a row per model and a column per resolution."""
    resolutions = sorted({row["resolution"] for row in rows})
    lines = ["| model | scheme | " + " | ".join(f"{resolution} px" for resolution in resolutions) + " |"]
    lines.append("|---|---|" + "---:|" * len(resolutions))
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = {row["resolution"]: row for row in rows if row["model"] == model}
        scheme = next(iter(cells.values()))["scheme"]
        found = [cell(cells[resolution]) if resolution in cells else "-" for resolution in resolutions]
        lines.append(f"| {model} | {scheme} | " + " | ".join(found) + " |")
    return lines


def difference_table(rows: Sequence[AccuracyRow]) -> list[str]:
    """Return the lines of a table of differences to the control; none where there is no control."""
    controls = list(dict.fromkeys(row["control"] for row in rows if row["control"] not in (None, row["model"])))
    if not controls:
        return []
    said = f"Accuracy less that of **{controls[0]}** on the same images, in percentage points; in brackets the paired 95% interval over "
    return [f"{said}{drawn(rows)}; a star marks an interval without 0.", "", *table(rows, difference_cell), ""]


def drawn(rows: Sequence[AccuracyRow]) -> str:
    """Return what intervals are over."""
    return "images and seeds" if any(len(row["hits"]) > 1 for row in rows) else "images"


def difference_cell(row: AccuracyRow) -> str:
    """Return a row's difference to the control, in points."""
    if row["difference"] is None:
        return "-"
    if row["control"] == row["model"]:
        return "0"
    low, high = row["difference_low"], row["difference_high"]
    interval = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * row['difference']:+.1f}{interval}" + ("\\*" if differs_from_control(row) else "")


def accuracy_cell(row: AccuracyRow) -> str:
    """Return a row's accuracy, in percent."""
    low, high = row["ci_low"], row["ci_high"]
    interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * row['accuracy']:.1f}{interval}"


def start_table(record: dict[str, Any]) -> list[str]:
    """Return the lines of a table of what each swap did before any training, and what training made of it, with the first seed."""
    measured = {label: part["accuracy"] for label, part in record["parts"].items() if part.get("accuracy")}
    if not measured:
        return []
    schemes, base = record["config"]["schemes"], next(iter(measured.values()))
    lines = ["## Right after the swap, and after training", ""]
    lines += [f"Accuracy at {base['resolution']} px, %, with seed {record['seeds'][0]}.", ""]
    lines += ["| model | scheme | right after the swap | after training |", "|---|---|---:|---:|"]
    for label, found in measured.items():
        cells = (f"{100 * found[when]:.1f}" if found[when] is not None else "-" for when in ("after_swap", "after_training"))
        lines.append(f"| {label} | {scheme_text(schemes.get(label) or {})} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _footer(record: dict[str, Any]) -> str:
    """Return what holds for every table."""
    data = record["data"]
    return (
        f"Trained on {data['train']['images']:,} images at {record['trained_resolution']} px, measured on {data['eval']['images']:,} "
        f"others, resized. In brackets stands a 95% bootstrap interval over {drawn(record['accuracies'])}. Protocol "
        f"{record['protocol_version']}, commit {record['commit']}, {seeds_in_words(record)}."
    )
