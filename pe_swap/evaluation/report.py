"""Tables, plots and CSV of an evaluation, from its record alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pe_swap.evaluation.comparison import differs, drawn_over
from pe_swap.evaluation.html_report import html_report
from pe_swap.evaluation.plots import plot, png, probe_plot, recovery_plot
from pe_swap.evaluation.recovery import curves, recovery_table
from pe_swap.evaluation.rows import PerplexityRow, ProbeNote, ProbeRow
from pe_swap.runs.files import write_whole

COLUMNS = (
    "model", "scheme", "seeds", "protocol", "length", "perplexity", "ci_low", "ci_high", "control", "ratio", "ratio_low", "ratio_high",
    "bits_per_byte", "tokens", "documents", "first_token", "protocol_version", "error",
)  # fmt: skip

PROBE_COLUMNS = ("model", "scheme", "seeds", "measure", "length", "at", "quantity", "value", "count", "protocol_version", "error")

REPORTED = ("data", "results", "runs", "probes", "measures", "effective_lengths", "protocol_version", "first_token", "unit")
"""Keys of an evaluation's record that a report is made from, beside seed, commit and trained lengths."""


def write_report(folder: Path, record: dict[str, Any], *, title: str = "At lengths never trained on") -> None:
    """Write `report.md`, `report.html`, `results.csv` and `perplexity.png` into a folder; of probes `probes.csv` and a picture each.

    Of trainings that were measured on the way, `recovery.png`. Each file is written whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    rows: list[PerplexityRow] = record["results"]
    probes: list[ProbeRow] = record.get("probes") or []
    trained_length = record.get("trained_length") or {}
    write_whole(folder / "results.csv", csv_table([*rows, *(record.get("runs") or [])]))
    parts = [f"# {title}", ""]
    if rows:
        write_whole(folder / "perplexity.png", png(plot(rows, trained_length)))
        parts += ["![perplexity against length](perplexity.png)", ""]
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        chosen = [row for row in rows if row["protocol"] == protocol]
        parts += [f"## {protocol}", "", *ratio_table(chosen), *unit_tables(chosen, record.get("unit") or "perplexity")]
        parts += [*refusals(chosen), *position_table(chosen)]
    parts += effective_length_table(record)
    if probes:
        write_whole(folder / "probes.csv", csv_table([{**row, "at": _at_text(row["at"])} for row in probes], PROBE_COLUMNS))
    for name, note in (record.get("measures") or {}).items():
        readings = [row for row in probes if row["measure"] == name]
        if any(row["value"] is not None for row in readings):
            write_whole(folder / f"{name}.png", png(probe_plot(readings, note)))
        parts += probe_section(name, note, readings)
    parts += start_table(record)
    measured = curves(record.get("parts") or {})
    if measured:
        write_whole(folder / "recovery.png", png(recovery_plot(measured)))
        parts += ["## Recovery", "", "![perplexity against tokens trained on](recovery.png)", ""]
        parts += recovery_table(record.get("recovery") or [])
    parts += [_footer(record), ""]
    markdown = "\n".join(parts)
    write_whole(folder / "report.md", markdown)
    write_whole(folder / "report.html", html_report(markdown, record))


def csv_table(rows: Sequence[Any], columns: Sequence[str] = COLUMNS) -> str:
    """Return the rows as CSV; lists are words, `0 1 2`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: " ".join(map(str, cell)) if isinstance(cell, list) else cell for key, cell in row.items()} for row in rows
    )
    return text.getvalue()


def _footer(record: dict[str, Any]) -> str:
    """Return what holds for every table."""
    data = record.get("data") or {}
    starts = {"window": "at the start of every window", "document": "at the start of a document alone"}
    where = starts.get(record.get("first_token") or "")
    repeated = data.get("repeated_documents")
    perplexities = (
        f"Perplexity is token-weighted; in brackets stands its 95% bootstrap interval over {drawn_over(record['results'])} (none of a "
        "single document)."
    )
    warning = f"**{repeated} of these documents were also trained on**, so their perplexity says little of other text."
    return " ".join(
        [
            f"Measured on {data.get('documents')} documents, {data.get('tokens')} tokens.",
            *([warning] if repeated else []),
            *([perplexities] if record["results"] else []),
            "A dash is a length that could not be taken; the reason stands below its table.",
            *([f"The tokenizer's first token stands {where}."] if where else []),
            f"Protocol {record.get('protocol_version')}, commit {record.get('commit')}, {seeds_in_words(record)}.",
        ]
    )


def seeds_in_words(record: dict[str, Any]) -> str:
    """Return the seeds of a record in words."""
    seeds = record.get("seeds") or [record.get("seed")]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _table(rows: Sequence[PerplexityRow], cell: Any) -> list[str]:
    """Return the lines of a table, a row per model and a column per length."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| model | scheme | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---|---|" + "---:|" * len(lengths))
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = {row["length"]: row for row in rows if row["model"] == model}
        scheme = next(iter(cells.values()))["scheme"]
        found = [cell(cells[length]) if length in cells else "-" for length in lengths]
        lines.append(f"| {model} | {scheme} | " + " | ".join(found) + " |")
    return lines


def markdown_table(rows: Sequence[PerplexityRow]) -> str:
    """Return the perplexities of one protocol as a Markdown table."""
    return "\n".join(_table(rows, _cell))


def ratio_table(rows: Sequence[PerplexityRow]) -> list[str]:
    """Return the lines of a table of ratios to the control; none where no two models were measured at one length."""
    controls: dict[str, list[int]] = {}
    for row in rows:
        if row.get("control") and row["control"] != row["model"] and row["ratio"] is not None:
            controls.setdefault(str(row["control"]), []).append(row["length"])
    if not controls:
        return []
    said = "; ".join(
        f"**{control}** at {', '.join(f'{length:,}' for length in sorted(set(lengths)))}" for control, lengths in controls.items()
    )
    lines = [
        f"Perplexity over the control's on the same documents. The control is {said}. In brackets stands the paired 95% interval over "
        f"{drawn_over(rows)}; a star marks an interval without 1.",
        "",
    ]
    return [*lines, *_table(rows, _ratio_cell), ""]


def _ratio_cell(row: PerplexityRow) -> str:
    """Return a row's ratio as text."""
    if row.get("ratio") is None:
        return "-"
    if row["control"] == row["model"]:
        return "1"
    low, high = row["ratio_low"], row["ratio_high"]
    interval = "" if low is None or high is None else f" [{_ratio(low)}, {_ratio(high)}]"
    star = "\\*" if differs(row) else ""
    return f"{_ratio(row['ratio'])}{interval}{star}"


def _ratio(value: float | None) -> str:
    """Return a ratio to three figures behind the point, or fewer where it is large."""
    return "-" if value is None else f"{value:.3f}" if value < 10 else _number(value)


def unit_tables(rows: Sequence[PerplexityRow], unit: str) -> list[str]:
    """Return the lines of the tables of perplexities and of bits per byte, the asked one first."""
    kind = "Perplexity" if rows[0]["protocol"] != "masked" else "Exponential of the loss on masked tokens"
    perplexities = [f"{kind}:", "", markdown_table(rows), ""]
    if all(row.get("bits_per_byte") is None for row in rows):
        return perplexities
    title = "Bits per byte of text, comparable between vocabularies:"
    bits = [title, "", *_table(rows, lambda row: "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.3f}"), ""]
    return [*bits, *perplexities] if unit == "bits_per_byte" else [*perplexities, *bits]


def refusals(rows: Sequence[PerplexityRow]) -> list[str]:
    """Return a line for every length that could not be taken, saying why."""
    lines = [f"* {row['model']} at {row['length']:,}: {row['error']}" for row in rows if row.get("error")]
    return [*lines, ""] if lines else []


def position_table(rows: Sequence[PerplexityRow]) -> list[str]:
    """Return the lines of a table of loss by position, at the longest length each model took."""
    longest: dict[str, PerplexityRow] = {}
    for row in sorted(rows, key=lambda row: int(row["length"])):
        if row.get("loss_by_position"):
            longest[row["model"]] = row
    buckets = sorted({(part["first"], part["last"]) for row in longest.values() for part in row["loss_by_position"]})
    if not buckets:
        return []
    by = "place in the window" if rows[0]["protocol"] == "masked" else "number of tokens they are predicted from"
    lines = [f"Mean loss (nats) of targets by {by}, at the longest length taken:", ""]
    heads = [f"{first:,}" if first == last else f"{first:,}-{last:,}" for first, last in buckets]
    lines += ["| model | length | " + " | ".join(heads) + " |"]
    lines += ["|---|---:|" + "---:|" * len(buckets)]
    for model, row in longest.items():
        found = {(part["first"], part["last"]): f"{part['loss']:.3f}" for part in row["loss_by_position"]}
        lines.append(f"| {model} | {row['length']:,} | " + " | ".join(found.get(bucket, "-") for bucket in buckets) + " |")
    return [*lines, ""]


def effective_length_table(record: dict[str, Any]) -> list[str]:
    """Return the lines of a table of effective context lengths, a row per definition and a column per model."""
    found = record.get("effective_lengths") or []
    if not found:
        return []
    models = list(dict.fromkeys(entry["model"] for entry in found))
    lines = [
        "## Effective context length",
        "",
        "The longest measured length, in tokens, up to which all measured ones fulfil:",
        "",
    ]
    lines += ["| definition | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    for definition in dict.fromkeys(entry["definition"] for entry in found):
        mine = {entry["model"]: entry for entry in found if entry["definition"] == definition}
        lines.append(f"| {definition} | " + " | ".join(_effective_cell(mine.get(model)) for model in models) + " |")
    return [*lines, "", "`>=`: every length that was measured fulfils it. A dash: the shortest does not.", ""]


def _effective_cell(entry: Any) -> str:
    """Return an effective length as text."""
    if entry is None or entry["length"] is None:
        return "-"
    return f"{'>= ' if entry['length'] == entry['longest_measured'] else ''}{entry['length']:,}"


def probe_section(name: str, note: ProbeNote, rows: Sequence[ProbeRow]) -> list[str]:
    """Return the lines of one probe: what it is, a table per quantity, what could not be measured."""
    options = ", ".join(f"{option} {value}" for option, value in note["options"].items() if value is not None)
    mean = "".join(f", mean over {place}s" for place in note["averaged"])
    lines = [f"## {name}", "", note["title"] + (f" Options: {options}." if options else ""), ""]
    measured = [row for row in rows if row["value"] is not None]
    if measured:
        lines += [f"![{name}]({name}.png)", ""]
    for quantity, words in note["quantities"].items():
        chosen = [row for row in measured if row["quantity"] == quantity]
        if chosen:
            lines += [f"{words}{mean}:", "", *_probe_table(chosen, note), ""]
    refused = dict.fromkeys(f"* {row['model']} at {row['length']:,}: {row['error']}" for row in rows if row["error"])
    return [*lines, *refused, *([""] if refused else [])]


def _probe_table(rows: Sequence[ProbeRow], note: ProbeNote) -> list[str]:
    """Return the lines of a table of one quantity."""
    column, averaged = note["columns"], note["averaged"]

    def coordinates(row: ProbeRow) -> dict[str, float]:
        return {"length": row["length"], **row["at"]}

    columns = sorted({coordinates(row)[column] for row in rows})
    several = len({row["length"] for row in rows}) > 1
    keys = [key for key in coordinates(rows[0]) if key != column and key not in averaged and (key != "length" or several)]
    lines = ["| " + " | ".join(["model", "scheme", *keys, *(f"{value:,g}" for value in columns)]) + " |"]
    lines += ["|---|---|" + "---:|" * (len(keys) + len(columns))]
    groups: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for row in rows:
        where = coordinates(row)
        key = (row["model"], row["scheme"], *(where[name] for name in keys))
        groups.setdefault(key, {}).setdefault(where[column], []).append(float(row["value"] or 0.0))
    for (model, scheme, *places), cells in groups.items():
        found = [_reading(float(np.mean(cells[value]))) if value in cells else "-" for value in columns]
        lines.append("| " + " | ".join([model, scheme, *(f"{place:,g}" for place in places), *found]) + " |")
    return lines


def _reading(value: float) -> str:
    """Return a reading as text."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _at_text(at: dict[str, float]) -> str:
    """Return where a reading was taken, for CSV."""
    return " ".join(f"{name}={value:g}" for name, value in at.items())


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
        scheme = scheme_text(schemes.get(label) or {})
        lines.append(f"| {label} | {scheme} | {_point(found.get('after_swap'))} | {_point(found.get('after_training'))} |")
    return [*lines, ""]


def scheme_text(section: dict[str, Any]) -> str:
    """Return a scheme's name, or its plan's, which has none, and the options that its configuration gives."""
    named = section.get("name", "-") if section.get("plan") is None else f"plan {section['plan']}"
    unsaid = {"name": section.get("name"), "plan": section.get("plan"), "keep_mean": None}
    given = {name: value for name, value in section.items() if name not in unsaid or unsaid[name] != value}
    options = [f"{name}={value}" for name, value in given.items() if value is not None]
    return ", ".join([str(named), *options])


def _point(value: float | None) -> str:
    """Return a perplexity without an interval."""
    return "-" if value is None else _number(value)


def _cell(row: PerplexityRow) -> str:
    """Return one result as text."""
    if row["perplexity"] is None:
        return "-"
    if row["ci_low"] is None or row["ci_high"] is None:
        return _number(row["perplexity"])
    return f"{_number(row['perplexity'])} [{_number(row['ci_low'])}, {_number(row['ci_high'])}]"


def _number(value: float) -> str:
    """Return a perplexity to three or four figures."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"
