"""What a swapped model says of itself in its folder's README.md, the model card.

The card is kept as peft keeps its own: a file that is there stays, and only what is ours in it is brought up to date, the section
between two comments and the tags.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pe_swap.errors import CheckpointError

FILE = "README.md"
TAG = "pe_swap"
TASKS = {"AutoModelForMaskedLM": "fill-mask"}
"""The hub's name of what a class is for, where it is not generating text."""
BEGIN, END = "<!-- pe_swap: begin -->", "<!-- pe_swap: end -->"
SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
FINE_TUNED = re.compile(r"^- Fine-tuned after the swap at: ([\d,]+) tokens\.$", re.MULTILINE)


def update_model_card(
    folder: Path,
    saved: Mapping[str, Any],
    auto_class: str,
    perplexities: Mapping[int, float],
    *,
    measured_on: str = "",
    fine_tuned_length: int | None = None,
    dataset: Mapping[str, str] | None = None,
) -> None:
    """Write or bring up to date the model card of a folder.

    Args:
        folder: a saved model's folder.
        saved: what its `config.json` holds under `pe_swap`.
        auto_class: name of the Auto class that loads it.
        perplexities: what was measured, by length in tokens; empty where nothing was.
        measured_on: how and on what it was measured, in a few words.
        fine_tuned_length: tokens in a block of fine-tuning after the swap; None where there was none.
        dataset: `type` and `name`, as hubs show them, of the text that was measured on.
    """
    path = folder / FILE
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False) if path.exists() else _empty_card()
    except Exception as error:  # whatever a YAML parser raises on somebody's file; weights must be saved all the same
        warnings.warn(
            f"'{path}' cannot be read as a model card ({' '.join(str(error).split())}), so it was left as it is and says nothing of "
            "the positions. Correct the YAML block at its top, or delete the file, and save again.",
            stacklevel=2,
        )
        return
    lines = section_text(saved, auto_class, perplexities, measured_on=measured_on, fine_tuned_length=fine_tuned_length)
    section = f"{BEGIN}\n{lines}\n{END}"
    text = card.text
    card.text = SECTION.sub(lambda _: section, text, count=1) if SECTION.search(text) else f"{text.rstrip()}\n\n{section}\n"
    card.data["library_name"] = card.data.get("library_name") or "transformers"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), TAG})
    results = [result for result in card.data.get("eval_results") or [] if (result.metric_args or {}).get("measured_by") != TAG]
    results += model_index(perplexities, auto_class, measured_on, dataset or {})
    card.data["eval_results"] = results or None
    card.data["model_name"] = card.data.get("model_name") or folder.resolve().name if results else None
    card.save(path)


def model_index(
    perplexities: Mapping[int, float], auto_class: str, measured_on: str, dataset: Mapping[str, str]
) -> Sequence[EvalResult]:
    """Return what was measured in the form that hubs show; each entry says that it is ours, so that it can be replaced."""
    return [
        EvalResult(
            task_type=TASKS.get(auto_class, "text-generation"),
            dataset_type=dataset.get("type", "text"),
            dataset_name=dataset.get("name", "text"),
            metric_type="perplexity",
            metric_value=float(f"{value:.6g}"),
            metric_name=f"Perplexity at {length:,} tokens",
            metric_args={"length": length, "measured_on": measured_on, "measured_by": TAG},
        )
        for length, value in sorted(perplexities.items())
    ]


def _empty_card() -> ModelCard:
    """Return a card with nothing in it."""
    return ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")


def section_text(
    saved: Mapping[str, Any],
    auto_class: str,
    perplexities: Mapping[int, float],
    *,
    measured_on: str = "",
    fine_tuned_length: int | None = None,
) -> str:
    """Return the section: schemes, options, lengths, how to load."""
    stacks: Mapping[str, Mapping[str, Any]] = saved.get("stacks", {"": saved})
    rows = [
        f"| {scheme['name']} | {_options(scheme['options'])} | {_where(name, index, stack['layers'], stack['input'])} |"
        for name, stack in stacks.items()
        for index, scheme in enumerate(stack["schemes"])
    ]
    limit = min((stack["max_length"] for stack in stacks.values() if stack["max_length"] is not None), default=None)
    trained = " and ".join(f"{length:,}" for length in sorted({stack["trained_length"] for stack in stacks.values()}))
    is_plain = any(stack["rope_parameters"] is not None for stack in stacks.values())
    measured = [f"| {length:,} | {value:.4g} |" for length, value in sorted(perplexities.items())]
    table = [measured_on, "", "| evaluated length, tokens | perplexity |", "|---:|---:|", *measured]
    evaluated = table if measured else ["none recorded."]
    fine_tuned = [] if fine_tuned_length is None else [f"- Fine-tuned after the swap at: {fine_tuned_length:,} tokens."]
    kept = [
        "- The mean row of the model's own position table stays: a constant, added to every token embedding (`keep_mean=True`)."
    ]
    lines = [
        "## Positions",
        "",
        f"The positional scheme of this {saved['original_model_type']} model was swapped by pe_swap {saved['version']}.",
        "",
        "| scheme | options | where |",
        "|---|---|---|",
        *rows,
        "",
        f"- Trained length before the swap: {trained} positions.",
        *fine_tuned,
        *(kept if any(stack.get("keep_mean") for stack in stacks.values()) else []),
        f"- Longest input: {'no limit of the scheme' if limit is None else f'{limit:,} positions'}.",
        f"- Evaluated lengths: {evaluated[0]}".rstrip(),
        *evaluated[1:],
        "",
        "```python",
        *([] if is_plain else ["import pe_swap  # pip install pe-swap"]),
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("path/or/name")',
        "```",
        "",
        "It is an ordinary model of its family with other `rope_parameters`: pe_swap is not needed to load it."
        if is_plain
        else "Without the import, `trust_remote_code=True` does the same; pe_swap has to be installed either way.",
    ]
    return "\n".join(lines)


def _options(options: Mapping[str, Any]) -> str:
    """Return options as they would be written in a call."""
    return ", ".join(f"`{name}={value!r}`" for name, value in sorted(options.items())) or "none"


def _where(stack: str, index: int, layers: list[int | None], acting_on_input: int | None) -> str:
    """Return in words what a scheme serves, with the stack where a model has several."""
    of_stack = f" of the {stack}" if stack else ""
    served = [layer for layer, at in enumerate(layers) if at == index]
    if len(served) == len(layers):
        return f"every layer{of_stack}"
    if not served:
        return f"the input{of_stack}" if index == acting_on_input else "nothing"
    return f"layers {', '.join(map(str, served))}{of_stack}" + (", and the input" if index == acting_on_input else "")


def record_evaluation(
    folder: str | Path, perplexities: Mapping[int, float], *, measured_on: str = "", dataset: Mapping[str, str] | None = None
) -> None:
    """Write measured perplexities into the model card of a saved folder, in place of any that it held, and into its `model-index`.

    Saving the model again drops them: its weights may have changed since.

    Args:
        folder: a folder that `save_pretrained` wrote.
        perplexities: perplexity by length in tokens.
        measured_on: how and on what, in a few words.
        dataset: `type` and `name`, as hubs show them, of the text.

    Raises:
        CheckpointError: the folder holds no swapped model.
        OSError: the card cannot be written.
    """
    saved, auto_class = _saved(Path(folder))
    card = Path(folder) / FILE
    said = FINE_TUNED.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    length = int(said[1].replace(",", "")) if said else None
    update_model_card(
        Path(folder), saved, auto_class, perplexities, measured_on=measured_on, fine_tuned_length=length, dataset=dataset
    )


def record_fine_tuning(folder: str | Path, length: int, said: Mapping[str, Any] | None = None) -> None:
    """Write into the model card of a saved folder at how many tokens it was fine-tuned after the swap.

    Saving the model again drops it, as it drops what was measured.

    Args:
        folder: a folder that `save_pretrained` wrote.
        length: tokens in a block of training text.
        said: what the card is written from, where the model was saved under its family's own class, whose `config.json` does not hold it.

    Raises:
        CheckpointError: the folder holds no swapped model, and `said` is None.
    """
    saved, auto_class = _saved(Path(folder)) if said is None else (said, auto_class_of([], {}))
    update_model_card(Path(folder), saved, auto_class, {}, fine_tuned_length=length)


def _saved(folder: Path) -> tuple[Mapping[str, Any], str]:
    """Return what a folder's `config.json` holds under `pe_swap`, and the Auto class that loads the model."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        saved, auto_map = content["pe_swap"], content["auto_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is not the configuration of a swapped model ({error}). Name a folder that save_pretrained wrote."
        ) from error
    return saved, auto_class_of(content.get("architectures"), auto_map)


def auto_class_of(architectures: object, auto_map: Mapping[str, str]) -> str:
    """Return the name of the Auto class that loads a saved class, `AutoModel` where none names it."""
    names = architectures if isinstance(architectures, list) else []
    wanted = {str(name) for name in names}
    found = [auto for auto, reference in auto_map.items() if reference.rpartition(".")[2] in wanted]
    return min(found, key=lambda name: name == "AutoModelForPreTraining", default="AutoModel")
