"""Tables and plot of a benchmark, from its record alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from matplotlib.figure import Figure

from pe_swap.evaluation.plots import COLOURS
from pe_swap.runs.config import Task


class BenchmarkRow(TypedDict, total=False):
    """One ratio: a model over its reference, in one task."""

    task: Task
    """What was measured."""
    model: str
    """Scheme with its options, or the family of a peer."""
    reference: str
    """What it is divided by: `original`, the unswapped model, or for a peer the measured family with the same scheme."""
    length: int
    """Tokens of the pass; for `decode`, cached tokens; of images, height and width in pixels."""
    ratio: float
    """Time over the reference's, the median of the pairs; for `memory`, bytes over bytes."""
    low: float
    """First quartile of the pairs' ratios; not for `memory`."""
    high: float
    """Third quartile; not for `memory`."""
    pairs: int
    """Pairs of runs; not for `memory`."""
    seconds: float
    """Median time of a run, and that of the reference; not for `memory`."""
    reference_seconds: float
    megabytes: float
    """Peak of the process, or on a GPU of its tensors there, MiB, and that of the reference's; for `memory` only."""
    reference_megabytes: float


TASK_TITLES = {
    "forward": "Forward pass, time over the unswapped model's",
    "train": "Training step (forward, loss, backward), time over the unswapped model's",
    "decode": "Decoding time over the unswapped model's, by number of cached tokens",
    "memory": "Peak memory of a process that runs one forward pass (on a GPU: of its tensors there), over the unswapped model's",
    "peer": "Models of transformers with the scheme built in, time over ours with the same scheme",
}


def benchmark_table(record: dict[str, Any]) -> str:
    """Return a benchmark's record as Markdown: ratios, with their quartiles."""
    config, rows = record["config"], record["results"]
    grouped = f" ({config['key_value_heads']} of keys)" if config.get("key_value_heads") else ""
    shape = f"{config['layers']} layers, {config['hidden_size']} wide, {config['heads']} heads{grouped}, "
    shape += f"vocabulary {config['vocab_size']:,}"
    batch = "batch 1"
    if is_of_images := record.get("unit") == "pixels":
        shape = (
            f"{config['layers']} layers, {config['hidden_size']} wide, {config['heads']} heads, patches of {config['patch_size']}"
        )
        batch = f"{config['images']} images; columns are heights and widths in pixels"
    where = f"{config['dtype']} on {record['device']}"
    lines = ["# What a scheme costs", "", f"{config['family']}, {shape}, {where}, {batch}; {record['processor']},"]
    flushed = ", denormal numbers flushed on the CPU" if record.get("flushes_denormals") else ""
    lines += [f"{config['threads']} threads, torch {record['versions']['torch']}, commit {record['commit']}{flushed}.", ""]
    for task, title in TASK_TITLES.items():
        chosen = [row for row in rows if _benchmark_group(row) == task]
        if chosen:
            lines += [f"## {title}", "", *_ratio_table(chosen, task == "peer", 3 if is_of_images else 2), ""]
    return "\n".join(lines)


def _benchmark_group(row: BenchmarkRow) -> str:
    """Return the table a row belongs to."""
    return str(row["task"]) if row["reference"] == "original" else "peer"


def _ratio_table(rows: Sequence[BenchmarkRow], is_peer: bool, digits: int) -> list[str]:
    """Return the lines of one table; a row a model, a column a length, or a task for peers."""
    columns = list(dict.fromkeys(row["task"] if is_peer else row["length"] for row in rows))
    heads = [str(column) if is_peer else f"{column:,}" for column in columns]
    lines = ["| " + " | ".join(["against" if is_peer else "scheme", *heads]) + " |", "|---|" + "---:|" * len(columns)]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        cells = {row["task"] if is_peer else row["length"]: _ratio_cell(row, digits) for row in mine}
        label = f"{model} over {mine[0]['reference']}" if is_peer else model
        lines.append("| " + " | ".join([label, *(cells.get(column, "-") for column in columns)]) + " |")
    return lines


def _ratio_cell(row: BenchmarkRow, digits: int) -> str:
    """Return a ratio, with its quartiles where it has them."""
    found = [f"{row[key]:.{digits}f}" for key in ("ratio", "low", "high") if key in row]
    return f"{found[0]} [{found[1]}, {found[2]}]" if len(found) == 3 else found[0]


def benchmark_plot(rows: Sequence[BenchmarkRow], unit: str) -> Figure:
    """Return ratio against length, in tokens or pixels, a panel a task."""
    tasks = [task for task in TASK_TITLES if task != "peer" and any(_benchmark_group(row) == task for row in rows)]
    figure = Figure(figsize=(4.2 * max(1, len(tasks)), 3.8), layout="constrained")
    panels = figure.subplots(1, max(1, len(tasks)), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=False):
        chosen = [row for row in rows if _benchmark_group(row) == task]
        for index, model in enumerate(dict.fromkeys(row["model"] for row in chosen)):
            points = sorted((row["length"], row["ratio"]) for row in chosen if row["model"] == model)
            style = {"color": COLOURS[index % len(COLOURS)], "marker": "o", "markersize": 3.5}
            axes.plot([length for length, _ in points], [ratio for _, ratio in points], label=model, **style)
        axes.axhline(1, color="#999999", linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        ticks = sorted({row["length"] for row in chosen})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(unit)
        axes.set_ylabel("over the unswapped model")
        axes.set_title(task, loc="right", color="#555555")
        axes.legend(fontsize=7, frameon=False)
    return figure
