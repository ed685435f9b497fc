"""The report as one HTML file that needs no network: the same tables, with pictures sized for a phone, configuration and versions.

It is made from the lines of `report.md`, so that the two cannot differ. Only what those lines use of Markdown is read: headings, tables,
lists, pictures, bold, code.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml
from matplotlib.figure import Figure

from pe_swap.evaluation.plots import panel_plot, position_plot, probe_plot, recovery_plot, svg, training_plot
from pe_swap.evaluation.recovery import curves
from pe_swap.evaluation.rows import PerplexityRow, ProbeNote, ProbeRow

PICTURE = re.compile(r"!\[(.*?)\]\((.*?)\)")

INTERVAL = re.compile(r"\[(\S+), (\S+)\]")

KEPT_WHOLE = r"[\1,&nbsp;\2]"
"""An interval in a cell: on a narrow screen a line ends before it and not within."""

ENVIRONMENT = (
    "versions",
    "commit",
    "uncommitted_changes",
    "device",
    "threads",
    "flushes_denormals",
    "protocol_version",
    "seconds",
)
"""Keys of a record that say where its numbers come from, beside the configuration."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 0 16px 48px; max-width: 1100px; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-top: 1px solid #ddd; padding-top: 1rem; }
.wide { overflow-x: auto; margin: 0.6rem 0 1.2rem; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 4px 10px; border-bottom: 1px solid #e5e5e5; text-align: left; } th { border-bottom-color: #999; }
.number { text-align: right; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; white-space: normal; min-width: 5.5em; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 12px; }
figure { margin: 0; } img { width: 100%; max-width: 520px; height: auto; display: block; }
figcaption { font-size: 0.875rem; color: #555; }
summary { cursor: pointer; color: #0b5394; }
@media (max-width: 600px) {
body { padding: 0 10px 32px; } table { font-size: 0.75rem; } th, td { padding: 3px 6px; } .number { white-space: normal; }
}
li, p { overflow-wrap: anywhere; } pre { overflow-x: auto; font-size: 0.8rem; background: #f6f6f6; padding: 12px; }
"""

LONG_TABLE = 16
"""A table with more rows than this is folded: the pictures above it say the same, and a phone's page would be endless."""

Captioned = Sequence[tuple[str, Figure]]


def html_report(markdown: str, record: Mapping[str, Any], figures: Mapping[str, Captioned] | None = None) -> str:
    """Return the page.

    Args:
        markdown: `report.md`; a picture in it is replaced by several, each readable on its own.
        record: of an evaluation or a comparison.
        figures: what stands in the place of each picture; those of perplexities and probes by default.
    """
    lines = markdown.splitlines()
    title = escape(next((line.removeprefix("# ") for line in lines if line.startswith("# ")), "Report"))
    about = {key: record[key] for key in ENVIRONMENT if record.get(key) is not None}
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        *body(lines, pictures(record) if figures is None else figures),
        *training_section(record),
        "<h2>Configuration and versions</h2>",
        f"<details open><summary>Versions</summary><pre>{_yaml(about)}</pre></details>",
        f"<details><summary>Configuration</summary><pre>{_yaml(record.get('config') or {})}</pre></details>",
        "</body></html>",
        "",
    ]
    return "\n".join(parts)


def _yaml(content: Mapping[str, Any]) -> str:
    """Return plain values as text for a page."""
    return escape(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def training_section(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of a section with the training losses of a comparison; none where it has none."""
    figure = training_plot(record.get("parts") or {})
    if figure is None:
        return []
    seeds = record.get("seeds") or []
    caption = "Loss while training" + (f", with seed {seeds[0]}" if len(seeds) > 1 else "")
    return ["<h2>While training</h2>", _grid([(caption, figure)])]


def pictures(record: Mapping[str, Any]) -> dict[str, Captioned]:
    """Return the pictures that stand in the place of each picture of `report.md`, with their captions."""
    rows: Sequence[PerplexityRow] = record["results"]
    trained = record.get("trained_length") or {}
    models = list(dict.fromkeys(row["model"] for row in rows))
    found: dict[str, Captioned] = {"perplexity.png": _of_perplexities(rows, models, trained)}
    measured = curves(record.get("parts") or {})
    if measured:
        seeds = record.get("seeds") or []
        seeded = f", with seed {seeds[0]}" if len(seeds) > 1 else ""
        found["recovery.png"] = [
            (
                "Perplexity by tokens trained on" + (f", {length:,} tokens of context" if len(measured) > 1 else "") + seeded,
                recovery_plot({length: by_label}),
            )
            for length, by_label in measured.items()
        ]
    notes: Mapping[str, ProbeNote] = record.get("measures") or {}
    for name, note in notes.items():
        readings: Sequence[ProbeRow] = [row for row in record.get("probes") or [] if row["measure"] == name]
        found[f"{name}.png"] = _of_probe(readings, note)
    return found


def _of_perplexities(rows: Sequence[PerplexityRow], models: Sequence[str], trained: Mapping[str, int | None]) -> Captioned:
    """Return perplexity, ratio and loss by position of each protocol."""
    found = []
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        chosen = [row for row in rows if row["protocol"] == protocol]
        found.append((f"{protocol}: by length", panel_plot(chosen, models, trained, "perplexity")))
        if any(row.get("ratio") is not None and row["control"] != row["model"] for row in chosen):
            found.append((f"{protocol}: divided by the control's", panel_plot(chosen, models, trained, "ratio")))
        if any(len(row["loss_by_position"]) > 1 for row in chosen):
            found.append((f"{protocol}: loss by position, at the longest length taken", position_plot(chosen, models)))
    return found


def _of_probe(rows: Sequence[ProbeRow], note: ProbeNote) -> Captioned:
    """Return a picture per quantity; per quantity and model where it is a heat map, all with one scale."""
    found = []
    for quantity, words in note["quantities"].items():
        chosen = [row for row in rows if row["quantity"] == quantity and row["value"] is not None]
        if not chosen:
            continue
        is_map = any(name != note["columns"] for name in chosen[0]["at"])
        values = [float(row["value"] or 0.0) for row in chosen]
        for model in dict.fromkeys(row["model"] for row in chosen) if is_map else [""]:
            mine = [row for row in chosen if not is_map or row["model"] == model]
            where = f", at {max(row['length'] for row in mine):,} tokens" if len(mine[0]["at"]) > 1 else ""
            found.append((f"{model}: {words}{where}" if is_map else words, probe_plot(mine, note, values)))
    return found


def _grid(figures: Captioned) -> str:
    """Return pictures side by side, as many as fit; SVG inside the page."""
    shown = []
    for caption, figure in figures:
        source, said = base64.b64encode(svg(figure)).decode(), escape(caption)
        image = f'<img alt="{said}" src="data:image/svg+xml;base64,{source}">'
        shown.append(f"<figure>{image}<figcaption>{said}</figcaption></figure>")
    return f'<div class="pictures">{"".join(shown)}</div>'


def body(lines: Sequence[str], figures: Mapping[str, Captioned]) -> list[str]:
    """Return the lines of a report as HTML."""
    found: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        last = index
        if line.startswith("|"):
            while last + 1 < len(lines) and lines[last + 1].startswith("|"):
                last += 1
            found += table(lines[index : last + 1])
        elif line.startswith("* "):
            while last + 1 < len(lines) and lines[last + 1].startswith("* "):
                last += 1
            found += ["<ul>", *(f"<li>{inline(item[2:])}</li>" for item in lines[index : last + 1]), "</ul>"]
        elif picture := PICTURE.fullmatch(line):
            found.append(_grid(figures.get(picture[2], ())))
        elif line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            found.append(f"<h{level}>{inline(line[level:].strip())}</h{level}>")
        elif line:
            found.append(f"<p>{inline(line)}</p>")
        index = last + 1
    return found


def table(lines: Sequence[str]) -> list[str]:
    """Return a Markdown table as HTML, in a frame that scrolls sideways on a narrow screen; a long one is folded."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    classes = [' class="number"' if mark.endswith(":") else "" for mark in rows[1]]
    found = ['<div class="wide"><table>']
    for number, cells in enumerate([rows[0], *rows[2:]]):
        tag = "td" if number else "th"
        shown = (
            f"<{tag}{kind}>{INTERVAL.sub(KEPT_WHOLE, inline(cell))}</{tag}>" for kind, cell in zip(classes, cells, strict=True)
        )
        found.append(f"<tr>{''.join(shown)}</tr>")
    found.append("</table></div>")
    count = len(rows) - 2
    return found if count <= LONG_TABLE else [f"<details><summary>Table of {count} rows</summary>", *found, "</details>"]


def inline(text: str) -> str:
    """Return a line's text as HTML: bold and code, everything else as it is."""
    shown = escape(text.replace("\\*", "\0"))
    shown = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", shown)
    shown = re.sub(r"`(.+?)`", r"<code>\1</code>", shown)
    return shown.replace("\0", "*")
