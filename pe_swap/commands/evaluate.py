"""`scripts/eval_long_context.py`: several models, on the same text.

Each model's rows are kept in a folder of their own as soon as they are measured. A rerun takes them from there where the model, the
text and what is measured are the same, by their content.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own
from transformers import AutoConfig, PreTrainedTokenizerBase

from pe_swap.errors import CheckpointError, DataError, PESwapError
from pe_swap.evaluation.comparison import require_control, with_ratios
from pe_swap.evaluation.effective_length import effective_lengths
from pe_swap.evaluation.evaluator import Evaluator, unmeasured_row
from pe_swap.evaluation.measures import Probe, chosen, descriptions
from pe_swap.evaluation.report import write_report
from pe_swap.evaluation.rows import PROTOCOL_VERSION, PerplexityRow, ProbeRow
from pe_swap.evaluation.seeds import joined, joined_probes
from pe_swap.evaluation.text import tokens_and_bytes, where_first_token_stands
from pe_swap.runs import data as text
from pe_swap.runs.config import DataSection, EvalConfig, MeasureSection, build, resolved
from pe_swap.runs.models import (
    content_hashes,
    device_of_process,
    is_causal_configuration,
    load_model,
    require_text_model,
    scheme_name,
)
from pe_swap.runs.output import require_kind, require_output_folder
from pe_swap.runs.progress import EveryMinute, on_terminal
from pe_swap.runs.records import Stopwatch, environment, fingerprint, read_record, write_record
from pe_swap.saving.model_card import record_evaluation

PARTS = "models"
"""Folder of the kept results of each model, in an evaluation's output folder."""

COMPARISON_ONLY = ("control", "effective_length_bound")
"""Settings that change no model's own numbers, so that kept results stay valid."""

DESCRIPTION = f"""Models at lengths they were never trained on, on the same text.

--protocols and --measures take:
{descriptions()}"""
"""The first part of the script's --help."""


def evaluate(config: EvalConfig, known_text: text.Text | None = None, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Evaluate every model and write record, tables and plots; return the record.

    Of several models, one that cannot be loaded or measured is rows that say why, so that the others' results stand.

    Args:
        config: models, lengths, measures.
        known_text: the text that the models were trained and are evaluated on, where it has been read already; `config.data` names
            the documents to evaluate on by default, and the models' own records those that they were trained on.
        labels: each model's name in the report. Models of one name are one model's trainings with several seeds, and one row.

    Raises:
        PESwapError: the text cannot be used, a measure or a model is not there, none can be measured, or two models have different
            tokens.
    """
    watch, out = Stopwatch(), Path(config.out)
    measures = chosen(config)
    labels = short_labels(config.models) if labels is None else labels
    require_control(config.control, list(labels.values()))
    require_output_folder(out, (*config.models, config.tokenizer))
    require_kind(out, "evaluation")
    configurations = {name: require_model(name) for name in config.models}
    tokenizers = _tokenizers(config)
    for name, configuration in configurations.items():
        if len(tokenizers[name]) > configuration.vocab_size:
            raise DataError(
                f"The tokenizer has {len(tokenizers[name]):,} tokens, the model '{name}' has {configuration.vocab_size:,}. Models "
                "compared on the same tokens need one vocabulary; name it with --tokenizer, or evaluate this model alone."
            )
    whole = text.load_documents(_all_for_evaluation(config).data, "eval") if known_text is None else known_text.held_out
    repeated = _repeated_documents(config, whole[: config.max_documents], known_text)
    texts = [document[: config.max_document_characters] for document in whole]
    evaluators: dict[int, Evaluator] = {}
    for tokenizer in tokenizers.values():
        if id(tokenizer) not in evaluators:
            documents, byte_ends = tokens_and_bytes(texts, tokenizer)
            text.require_tokens(documents, "eval")
            evaluators[id(tokenizer)] = Evaluator(documents, tokenizer, config, config.seed, byte_ends)
    rows: list[PerplexityRow] = []
    probes: list[ProbeRow] = []
    failures: dict[str, PESwapError] = {}
    bar = tqdm(config.models, desc="models", disable=None)
    for name in bar:
        label, evaluator = labels[name], evaluators[id(tokenizers[name])]
        shared = _shared_key(config, evaluator)
        key = fingerprint([shared, name, content_hashes(name), getattr(configurations[name], "_commit_hash", None)])
        part = read_record(part_folder(out, name))
        try:
            if part is None or part.get("fingerprint") != key:
                part = {"kind": "measured model", "fingerprint": key, **_measure(config, evaluator, name, label, bar)}
                write_record(part_folder(out, name), part)
            else:
                bar.write(f"{label}: measured before, kept", file=sys.stderr)
        except DataError:  # of the text, which is the same for all
            raise
        except PESwapError as error:
            failures[name] = error.with_traceback(None)  # whose frames hold the model
            bar.write(f"{label}: {error}", file=sys.stderr)
            rows += _error_rows(config, label, trained_seeds(name), str(error))
            continue
        found: list[PerplexityRow] = part["results"]
        kept: list[ProbeRow] = part["probes"]
        for row in (*found, *kept):
            row["model"], row["seeds"] = label, trained_seeds(name)  # labels depend on what the model is compared with
        rows, probes = rows + found, probes + kept
        if getattr(configurations[name], "pe_swap", None):
            _update_card(Path(name), found, described_text(config.data))
    if len(failures) == len(config.models):
        raise next(iter(failures.values()))
    drawn: dict[str, Any] = {"samples": config.bootstrap_samples, "seed": config.seed}
    ratios = {"control": config.control, "unit": config.unit, **drawn}
    by_seed = [[row for row in rows if row["seeds"] == seeds] for seeds in distinct(row["seeds"] for row in rows)]
    has_runs = len(set(labels.values())) < len(labels)
    runs = [row for group in by_seed for row in with_ratios(group, **ratios)] if has_runs else []
    rows, probes = with_ratios(joined(rows, **drawn), **ratios), joined_probes(probes)
    trained = {labels[name]: trained_length(configurations[name], name) for name in config.models}
    first = evaluators[id(tokenizers[config.models[0]])]
    record = {
        "kind": "evaluation",
        "status": "done",
        "config": resolved(config),
        **environment(),
        "seed": config.seed,
        "seconds": watch.seconds,
        "protocol_version": PROTOCOL_VERSION,
        "first_token": where_first_token_stands(first.tokenizer, config),
        "unit": config.unit,
        "data": {**text.describe(first.text().documents), "repeated_documents": repeated},
        "trained_length": trained,
        "measures": {one.name: one.note() for one in measures if isinstance(one, Probe)},
        "results": rows,
        "runs": runs,
        "probes": probes,
        "effective_lengths": effective_lengths(rows, probes, trained, config.effective_length_bound),
    }
    write_record(out, record)
    write_report(out, record)
    return record


def _tokenizers(config: EvalConfig) -> dict[str, PreTrainedTokenizerBase]:
    """Return each model's tokenizer: one and the same, unless bits per byte are asked for and vocabularies differ.

    Raises:
        DataError: vocabularies differ and a setting counts tokens, which would then be of different text.
    """
    if config.tokenizer is not None:
        return dict.fromkeys(config.models, text.load_tokenizer(config.tokenizer))
    own = {name: text.load_tokenizer(name) for name in config.models}
    first = own[config.models[0]]
    differing = [name for name, tokenizer in own.items() if tokenizer.get_vocab() != first.get_vocab()]
    if not differing:
        return dict.fromkeys(config.models, first)
    if config.unit == "perplexity":
        raise DataError(
            f"The models '{config.models[0]}' and '{differing[0]}' have different vocabularies; perplexities are compared on the same "
            "tokens. Compare --unit bits_per_byte, evaluate them apart, or name the one vocabulary that holds for both with --tokenizer."
        )
    if config.max_document_tokens is not None or "same_targets" in config.protocols:
        what = "max_document_tokens" if config.max_document_tokens is not None else "same_targets"
        raise DataError(
            f"The models '{config.models[0]}' and '{differing[0]}' have different vocabularies, so {what} would take different text from "
            "each. Use max_document_characters, and the protocols nonoverlapping and sliding."
        )
    return own


def _repeated_documents(config: EvalConfig, texts: Sequence[str], known_text: text.Text | None) -> int | None:
    """Return how many documents to evaluate on were also trained on, by the models' records; None where none of them says it.

    A record names its text and holds its hash. Text that is not there any more, or has changed since, says nothing.
    """
    if known_text is not None:
        return len(text.shared_documents(known_text.train, texts))
    trained: dict[str, Sequence[str]] = {}
    for name in config.models:
        record = read_record(Path(name)) or {}
        key = (record.get("data") or {}).get("sha256")
        if record.get("kind") != "finetune" or key is None or key in trained:
            continue
        try:
            data = text.load_text(build(DataSection, record["config"]["data"]))
        except PESwapError:
            continue
        if data.key == key:
            trained[key] = data.train
    if not trained:
        return None
    repeated = len(text.shared_documents([document for documents in trained.values() for document in documents], texts))
    if repeated:
        print(f"{repeated:,} documents to measure on were also trained on", file=sys.stderr)
    return repeated


def part_folder(out: Path, name: str) -> Path:
    """Return the folder of one model's results; labels may be paths, and two models may have the same last part."""
    return out / PARTS / f"{Path(name).name}-{fingerprint(name)[:8]}"


def _shared_key(config: EvalConfig, evaluator: Evaluator) -> str:
    """Return a hash of all that decides every model's numbers: what is measured, how, and on which tokens."""
    names = MeasureSection.model_fields.keys() - set(COMPARISON_ONLY)
    measure = {name: value for name, value in resolved(config).items() if name in names}
    special = sorted((name, str(token)) for name, token in evaluator.tokenizer.special_tokens_map.items())
    return fingerprint(
        [
            PROTOCOL_VERSION,
            sorted(PerplexityRow.__annotations__),
            measure,
            config.dtype,
            config.seed,
            evaluator.documents,
            special,
        ]
    )


def _measure(config: EvalConfig, evaluator: Evaluator, name: str, label: str, bar: Any) -> dict[str, Any]:
    """Return one model's rows."""
    causal = is_causal_configuration(require_model(name))
    with_head = evaluator.needs_vocabulary(causal=causal)
    clear_device_cache(garbage_collection=True)  # of the model before: a swapped one is a reference cycle
    model = load_model(name, getattr(torch, config.dtype), with_head=with_head).eval().to(device_of_process())
    scheme = scheme_name(model)
    minutes, watch = EveryMinute(), Stopwatch()

    def progress(said: str) -> None:
        """Show what is measured: in the bar, or as a line per minute where a log has none."""
        bar.set_postfix_str(said)
        if not on_terminal() and minutes.is_due():
            print(said, file=sys.stderr, flush=True)

    rows = evaluator.rows(model, label, scheme, progress=progress)
    if tokens := sum(row["tokens"] for row in rows):
        speed = f"{tokens:,} targets scored in {watch.seconds:,} s, {tokens / max(watch.seconds, 0.1):,.0f} per second"
        bar.write(f"{label}: {speed}", file=sys.stderr)
    return {"results": rows, "probes": evaluator.probe_rows(model, label, scheme, progress=progress)}


def _error_rows(config: EvalConfig, label: str, seeds: list[int], error: str) -> list[PerplexityRow]:
    """Return the rows of a model that could not be loaded or measured."""
    found = [unmeasured_row(label, "-", protocol, length, error) for protocol in config.protocols for length in config.lengths]
    return [{**row, "seeds": seeds} for row in found]


def distinct(seeds: Iterable[list[int]]) -> list[list[int]]:
    """Return each list of seeds once, in order."""
    return [list(found) for found in dict.fromkeys(map(tuple, seeds))]


def described_text(section: DataSection) -> dict[str, str]:
    """Return what text was measured on, by the names that a model card's `model-index` has."""
    if section.dataset:
        return {"type": section.dataset, "name": f"{section.dataset} ({section.eval_split})"}
    if section.sotu:
        first, last = section.eval_years
        return {"type": "sotu", "name": f"State of the Union messages, {first} to {last}"}
    return {
        "type": "text",
        "name": ", ".join(Path(path).name for path in section.eval_text_files or section.text_files or ["text"]),
    }


def _update_card(folder: Path, rows: Sequence[Mapping[str, Any]], dataset: Mapping[str, str]) -> None:
    """Write what the first protocol measured into the model card of a local folder; a hub cache is not ours to write to."""
    if not folder.is_dir() or any(part.startswith("models--") for part in folder.resolve().parts):
        return
    measured = [row for row in rows if row["perplexity"] is not None]
    chosen = [row for row in measured if row["protocol"] == measured[0]["protocol"]]
    if not chosen:
        return
    protocol = chosen[0]["protocol"].replace("masked", "masked (the exponential of the loss on masked tokens)")
    measured_on = f"{protocol}, {max(row['tokens'] for row in chosen):,} tokens scored."
    try:
        record_evaluation(folder, {row["length"]: row["perplexity"] for row in chosen}, measured_on=measured_on, dataset=dataset)
    except (OSError, CheckpointError) as error:
        print(f"What was measured could not be written into the model card in '{folder}': {error}", file=sys.stderr)


def _all_for_evaluation(config: EvalConfig) -> EvalConfig:
    """Return the configuration with its text files all to be evaluated: nothing is held out of an evaluation."""
    if config.data.text_files and not config.data.eval_text_files:
        data = config.data.model_copy(update={"eval_text_files": config.data.text_files})
        return config.model_copy(update={"data": data})
    return config


def require_model(name: str) -> Any:
    """Look for a model before any is measured, so that a wrong name costs no time; return its configuration.

    Raises:
        CheckpointError: there is none under that name.
        UnsupportedModelError: it is no language model.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        require_text_model(config)
        return config
    except PESwapError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"Cannot load a model from '{name}': {error}. --models takes folders that hold a config.json and weights, or hub names."
        ) from error


def short_labels(models: Sequence[str]) -> dict[str, str]:
    """Return each model's label: the last part of its path, or all of it where two would have the same."""
    last = [Path(name).name or name for name in models]
    return {name: label if last.count(label) == 1 else name for name, label in zip(models, last, strict=True)}


def trained_seeds(name: str) -> list[int]:
    """Return the seed of a model's training, from the record in its folder; empty where it has none."""
    record = read_record(Path(name)) or {}
    return [int(record["seed"])] if record.get("kind") == "finetune" else []


def trained_length(configuration: Any, name: str) -> int | None:
    """Return the length a model was trained at, for the plot: of our own runs the block size, else that of its own positions."""
    record = read_record(Path(name)) or {}
    if record.get("kind") == "finetune":
        return int(record["config"]["data"]["block_size"])
    swapped = getattr(configuration, "pe_swap", None)
    length = swapped["trained_length"] if swapped else getattr(configuration, "max_position_embeddings", None)
    return None if length is None else int(length)
