"""`scripts/compare.py`: several schemes from one base, trained equally, evaluated together.

Every part is a folder with a record: `base`, `schemes/LABEL`, `evaluation`; of every seed after the first, the trainings are in
`seeds/SEED`. A part whose record is done, and whose configuration, text and model are the same by their content, is not done again; one
that was stopped in the middle continues from its last checkpoint. So does the evaluation, model by model. So a seed can be added later.

With `data.images` the models are classifiers of images, and the report is of accuracy by resolution.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pe_swap.commands.evaluate import evaluate
from pe_swap.commands.finetune import finetune, run_fingerprint
from pe_swap.commands.held_out import require_measurable
from pe_swap.commands.images import evaluate_on_images, finetune_on_images, require_image_comparison, require_image_models
from pe_swap.errors import CheckpointError, ConfigError, DivergedError
from pe_swap.evaluation.accuracy_report import write_accuracy_report
from pe_swap.evaluation.comparison import require_control
from pe_swap.evaluation.evaluator import DIVERGED
from pe_swap.evaluation.measures import chosen
from pe_swap.evaluation.recovery import recovery
from pe_swap.evaluation.report import REPORTED, write_report
from pe_swap.plans import parts_of
from pe_swap.runs import data
from pe_swap.runs.config import (
    CompareConfig,
    ComparedScheme,
    EvalConfig,
    FinetuneConfig,
    TransitionSection,
    build,
    resolved,
)
from pe_swap.runs.images import Images, load_images
from pe_swap.runs.models import described, is_configuration, require_text_model
from pe_swap.runs.output import require_kind, require_output_folder
from pe_swap.runs.records import Stopwatch, environment, read_record, write_record
from pe_swap.schemes import SCHEMES, build_options
from pe_swap.training.resume import changed_keys, complete_checkpoints, settings_that_matter
from pe_swap.training.trainer import require_training_settings

SCHEME_FOLDERS = "schemes"
"""Folder of the trained models, one per label, in a comparison's output folder."""

SEED_FOLDERS = "seeds"
"""Folder of the trainings with every seed after the first, one per seed."""

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+=,()-]{0,79}")
"""A name of a scheme in a comparison: a folder's name on every system, and a cell of a table."""


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train what is not trained yet, evaluate, and write one report; return the record.

    A scheme whose training diverged is rows that say so; a base that diverged is an error, as nothing could come of it.

    Raises:
        DivergedError: rows are errors that no length explains; record and report are written.
        PESwapError: the configuration, the text, the model or a scheme cannot be used; schemes are checked before anything runs.
    """
    watch, out = Stopwatch(), Path(config.out)
    require_comparison(config, out)
    source = loaded(config)
    labels: dict[str, str] = {}
    diverged = []
    for seed in config.seeds:
        folder, suffix = seed_folder(config, seed), "" if len(config.seeds) == 1 else f", seed {seed}"
        base = _base(config, seed, source, suffix)
        for label, scheme in config.schemes.items():
            section = finetune_config(config, base, scheme, seed, folder / SCHEME_FOLDERS / label)
            try:
                _finetune_once(section, f"{label}{suffix}", source, overwrite=config.overwrite)
            except DivergedError as error:
                print(f"{label}{suffix}: {error}", file=sys.stderr, flush=True)
                diverged.append(label)
            labels[section.out] = label
    record = {
        "kind": "comparison",
        "status": "done",
        "config": resolved(config),
        **environment(),
        "seeds": config.seeds,
    }
    if isinstance(source, Images):
        _report_images(config, record, labels, diverged, source)
        failed = sorted(set(diverged))
    else:
        _report_text(config, record, labels, source)
        failed = failed_labels([*record["results"], *record["runs"]], diverged)
    record["seconds"] = watch.seconds
    write_record(out, record)
    (write_accuracy_report if isinstance(source, Images) else write_report)(out, record)
    if failed:
        raise DivergedError(
            f"Rows of {', '.join(failed)} are errors; '{out / 'report.md'}' has the others. Its text says what to change."
        )
    return record


def loaded(config: CompareConfig) -> data.Text | Images:
    """Return what a comparison trains and measures on.

    Raises:
        PESwapError: it cannot be used, or the models cannot read it.
    """
    if config.data.images is None:
        if is_configuration(config.model):
            require_text_model(described(config.model))
        return data.load_text(config.data)
    images = load_images(config.data)
    require_image_models(config, images)
    return images


def _report_text(config: CompareConfig, record: dict[str, Any], labels: dict[str, str], text: data.Text) -> None:
    """Evaluate all models on text, and write into the record what its report is made from."""
    measured = _evaluate(config, labels, Path(config.out) / "evaluation", text)
    parts = _parts(config, "perplexity")
    record |= {
        "parts": parts[config.seeds[0]],
        "parts_of_further_seeds": {seed: parts[seed] for seed in config.seeds[1:]},
        "recovery": recovery(parts, next((label for label, scheme in config.schemes.items() if scheme.is_control), None)),
        **{key: measured[key] for key in REPORTED},
        "trained_length": {label: config.data.block_size for label in config.schemes},
    }


def _report_images(
    config: CompareConfig, record: dict[str, Any], labels: dict[str, str], diverged: Sequence[str], images: Images
) -> None:
    """Evaluate all models but those that diverged on images, and write into the record what its report is made from."""
    measured = {folder: label for folder, label in labels.items() if label not in diverged}
    parts = _parts(config, "accuracy")
    record |= {
        "parts": parts[config.seeds[0]],
        "parts_of_further_seeds": {seed: parts[seed] for seed in config.seeds[1:]},
        **evaluate_on_images(config, measured, Path(config.out) / "evaluation", images),
        "trained_resolution": require_image_models(config, images),
        "diverged": sorted(set(diverged)),
    }


def _parts(config: CompareConfig, measured: str) -> dict[int, dict[str, dict[str, Any]]]:
    """Return by seed and label a part's perplexity or accuracy before the swap, after it and after training, and its loss log."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in config.seeds:
        records = {label: read_record(seed_folder(config, seed) / SCHEME_FOLDERS / label) or {} for label in config.schemes}
        found[seed] = {
            label: {name: record.get(name) for name in (measured, "seconds", "training")} for label, record in records.items()
        }
    return found


def failed_labels(rows: Iterable[dict[str, Any]], diverged: Iterable[str]) -> list[str]:
    """Return the labels that diverged or have no number; a length beyond a model's own positions is no failure."""
    found = set(diverged)
    by_label: dict[str, list[Any]] = {}
    for row in rows:
        by_label.setdefault(row["model"], []).append(row["error"])
    found |= {label for label, errors in by_label.items() if all(errors) or DIVERGED in errors}
    return sorted(found)


def require_comparison(config: CompareConfig, out: Path) -> None:
    """Refuse what cannot be compared, before anything runs.

    Raises:
        PESwapError: a label, a scheme's options, a training section or the output folder cannot be used.
    """
    require_output_folder(out, (config.model, config.tokenizer))
    require_kind(out, "comparison")
    require_labels(config.schemes)
    of_images = config.data.images is not None
    chosen(config.eval, of_images=of_images)
    if of_images:
        require_image_comparison(config)
    require_control(config.eval.control, list(config.schemes))
    for scheme in config.schemes.values():
        if scheme.plan is not None:
            parts_of(scheme.plan, scheme.options)
        elif not scheme.is_control:
            build_options(SCHEMES[scheme.name].Options, scheme.options)
    for section in (config.base, config.train):
        if section is not None:
            require_training_settings(section)
            require_measurable(section, config.data)
    for label, scheme in config.schemes.items():
        require_training_settings(finetune_config(config, config.model, scheme, config.seeds[0], out / label).train)


def require_labels(labels: Iterable[str]) -> None:
    """Refuse labels that are no folder's name, or that a file system may take for one another.

    Raises:
        ConfigError: there is one.
    """
    seen: dict[str, str] = {}
    for label in labels:
        if not LABEL.fullmatch(label) or label != label.strip(" ."):
            raise ConfigError(
                f"schemes has the label {label!r}, which becomes a folder's name: letters, digits, spaces and ._+=,()- after a letter or "
                "digit, at most 80, with no space or dot at the end. Choose another label."
            )
        other = seen.setdefault(label.casefold(), label)
        if other != label:
            raise ConfigError(
                f"schemes has the labels '{other}' and '{label}', one folder on some systems. Choose another label."
            )


def seed_folder(config: CompareConfig, seed: int) -> Path:
    """Return the folder of the trainings with a seed."""
    out = Path(config.out)
    return out if seed == config.seeds[0] else out / SEED_FOLDERS / str(seed)


def _base(config: CompareConfig, seed: int, source: data.Text | Images, suffix: str) -> str | dict[str, Any]:
    """Return the base model: trained first, one per seed, where it starts from a configuration and `base` says how."""
    if config.base is None or not is_configuration(config.model):
        return config.model
    section = FinetuneConfig(
        model=config.model,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        data=config.data,
        train=config.base,
        seed=seed,
        out=str(seed_folder(config, seed) / "base"),
    )
    _finetune_once(section, f"base{suffix}", source, overwrite=config.overwrite)
    return section.out


def finetune_config(
    config: CompareConfig, base: str | dict[str, Any], scheme: ComparedScheme, seed: int, folder: Path
) -> FinetuneConfig:
    """Return one scheme's run; runs differ in the scheme, and in the transition to it, alone. The control has none."""
    transition = TransitionSection() if scheme.is_control else scheme.transition or config.train.transition
    starts_anew = is_configuration(base)
    tokenizer = config.tokenizer if starts_anew or not is_configuration(config.model) else None
    vocab_size = config.vocab_size if starts_anew else None
    return FinetuneConfig(
        model=base,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        scheme=scheme.section,
        data=config.data,
        train=config.train.model_copy(update={"transition": transition}),
        seed=seed,
        out=str(folder),
    )


def _finetune_once(config: FinetuneConfig, label: str, source: data.Text | Images, *, overwrite: bool) -> None:
    """Run a part, continue it, or leave it where it is done.

    Raises:
        CheckpointError: its folder holds another part, and `overwrite` is false.
        DivergedError: it diverged, now or before; done again it would do the same.
    """
    out = Path(config.out)
    record = read_record(out)
    same = record is not None and record.get("fingerprint") == run_fingerprint(config, source.key)
    if record is not None and same and record["status"] in ("done", "diverged"):
        if record["status"] == "diverged":
            _finetune(config.model_copy(update={"resume": True}), source)  # says so
        print(f"{label}: done before, kept", flush=True)
        return
    if record is not None and not same and not overwrite:
        raise CheckpointError(
            f"'{out}' holds a part of {_what_differs(record, config)}. Bring that back, train the part anew with --overwrite, or compare "
            "in another --out."
        )
    resume = same and bool(complete_checkpoints(out))
    print(f"{label}: {'continuing' if resume else 'training'}", flush=True)
    _finetune(config.model_copy(update={"resume": resume, "overwrite": overwrite and not resume}), source)


def _finetune(config: FinetuneConfig, source: data.Text | Images) -> dict[str, Any]:
    """Run a part on what the comparison reads."""
    return finetune_on_images(config, source) if isinstance(source, Images) else finetune(config, source)


def _what_differs(record: dict[str, Any], config: FinetuneConfig) -> str:
    """Return what a part's record and its configuration differ in."""
    changed = changed_keys(settings_that_matter(record.get("config") or {}), settings_that_matter(resolved(config)))
    return f"another configuration (another {', '.join(changed)})" if changed else "other data or another model"


def _evaluate(config: CompareConfig, labels: dict[str, str], out: Path, text: data.Text) -> dict[str, Any]:
    """Evaluate all models on the held-out text; each model that was measured before on the same is kept."""
    settings = {"models": list(labels), "data": resolved(config.data), "seed": config.seeds[0], "out": str(out)}
    return evaluate(build(EvalConfig, {**resolved(config.eval), **settings}), text, labels)
