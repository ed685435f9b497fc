"""The parts of a comparison on images: swap a classifier, fine-tune it, save it; and measure all at several resolutions."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel, set_seed

from pe_swap.commands.evaluate import distinct, part_folder, trained_seeds
from pe_swap.commands.finetune import close_record, open_output, processes, record_writer, run_fingerprint
from pe_swap.errors import ConfigError
from pe_swap.evaluation.accuracy import accuracy_row, joined_accuracies, with_differences
from pe_swap.evaluation.measures import ImageMeasure, chosen, measure
from pe_swap.evaluation.rows import PROTOCOL_VERSION, AccuracyRow
from pe_swap.families.native.grid import two_sides
from pe_swap.runs.config import CompareConfig, FinetuneConfig, MeasureSection, resolved
from pe_swap.runs.image_models import image_config, load_image_model, require_resolution, start_image_model
from pe_swap.runs.images import Images
from pe_swap.runs.models import apply_scheme, content_hashes, device_of_process, is_configuration, scheme_name
from pe_swap.runs.records import Stopwatch, environment, fingerprint, is_main_process, read_record, write_record
from pe_swap.training.images import require_image_training, train_on_images


def require_image_comparison(config: CompareConfig) -> None:
    """Refuse settings of text in a comparison on images, before any image is read.

    Raises:
        ConfigError: there is one.
    """
    for key in ("tokenizer", "vocab_size"):
        if getattr(config, key) is not None:
            raise ConfigError(f"{key} is {getattr(config, key)!r}, which is of text, and data.images has none. Drop the key.")
    if "lengths" in config.eval.model_fields_set:
        raise ConfigError(
            "eval.lengths counts tokens of text, and data.images has none. Name pixels under eval.options.accuracy.resolutions."
        )
    for section in (config.base, config.train):
        if section is not None:
            require_image_training(section)
    for scheme in config.schemes.values():
        if scheme.transition is not None:
            raise ConfigError("A scheme has a transition, which is for text, and data.images has none. Leave it out.")


def require_image_models(config: CompareConfig, images: Images) -> int:
    """Return the resolution that the models are trained at, in pixels.

    Raises:
        PESwapError: the model is no classifier of these images, or its patches do not divide a resolution that is to be measured.
    """
    model = image_config(config.model, images)
    for one in image_measures(config.eval):
        for resolution in one.resolutions():
            require_resolution(model, resolution)
    height, width = two_sides(model.image_size)
    if height != width:
        raise ConfigError(
            f"The model's image_size is {height} by {width}, and accuracy is measured on squares. Set image_size to one number."
        )
    return height


def image_measures(settings: MeasureSection) -> list[ImageMeasure]:
    """Return the measures that a comparison on images is to take."""
    return [one for one in chosen(settings, of_images=True) if isinstance(one, ImageMeasure)]


def finetune_on_images(config: FinetuneConfig, images: Images) -> dict[str, Any]:
    """Swap, fine-tune and save a classifier; return the record, which is also written to the output folder.

    Args:
        config: model, scheme, and how to train.
        images: what `config.data` names.

    Raises:
        DivergedError: the training ended with losses or weights that are not finite; the record says so too.
        PESwapError: the configuration, the model, the scheme or the output folder cannot be used.
    """
    watch, out = Stopwatch(), Path(config.out)
    key = run_fingerprint(config, images.key)
    output, finished = open_output(config, out, key, images.key)
    if finished is not None:
        return finished
    set_seed(config.seed)
    model = start_image_model(config.model, images) if is_configuration(config.model) else load_image_model(str(config.model))
    clear_device_cache(garbage_collection=True)  # of the training before
    model.to(device_of_process())
    before = accuracy(model, images)
    apply_scheme(model, config.scheme)
    record: dict[str, Any] = {
        "kind": "finetune",
        "status": "running",
        "fingerprint": key,
        "config": resolved(config),
        **environment(),
        "processes": processes(),
        "seed": config.seed,
        "data": {**described_images(images), "sha256": images.key},
        "scheme": scheme_name(model),
        "accuracy": {
            "resolution": two_sides(model.config.image_size)[0],
            "before_swap": before,
            "after_swap": accuracy(model, images),
            "after_training": None,
        },
    }
    write = record_writer(output, record)

    def start() -> None:
        """Delete what an earlier run wrote, and write the record."""
        if is_main_process() and not config.resume:
            output.delete()
        write()

    record["training"] = train_on_images(
        model,
        images.train,
        config.train,
        seed=config.seed,
        output=output,
        resume=config.resume,
        on_start=start,
        on_checkpoint=write,
    )
    trained = config.train.max_steps > 0
    record["accuracy"]["after_training"] = accuracy(model, images) if trained else None
    close_record(record, model, config, watch, write)
    return record


def accuracy(model: PreTrainedModel, images: Images) -> float:
    """Return the share of held-out images that a model is right about, at the resolution that it is trained at."""
    one, was_training = measure("accuracy"), model.training
    assert isinstance(one, ImageMeasure)
    hits = one.hits(model.eval(), images.held_out, two_sides(model.config.image_size)[0])
    model.train(was_training)
    return float(hits.double().mean())


def described_images(images: Images) -> dict[str, Any]:
    """Return how many images there are, for a record."""
    return {"train": {"images": len(images.train)}, "eval": {"images": len(images.held_out)}}


def evaluate_on_images(config: CompareConfig, labels: Mapping[str, str], out: Path, images: Images) -> dict[str, Any]:
    """Measure every model, or take what was measured before of the same; return the rows.

    Args:
        config: the comparison's.
        labels: label of each model's folder; models of one label are one model's trainings with several seeds.
        out: where each model's rows are kept.
        images: to measure on.

    Returns:
        `accuracies`, one row per label and resolution, and `runs`, one per training where there are several seeds.
    """
    rows: list[AccuracyRow] = []
    measures = image_measures(config.eval)
    asked = {one.name: one.options.model_dump(mode="json") for one in measures}
    for name, label in labels.items():
        key = fingerprint([PROTOCOL_VERSION, asked, images.key, name, content_hashes(name)])
        part = read_record(part_folder(out, name))
        if part is None or part.get("fingerprint") != key:
            clear_device_cache(garbage_collection=True)  # of the model before: a swapped one is a reference cycle
            model = load_image_model(name).eval().to(device_of_process())
            found = [
                accuracy_row(one.name, resolution, one.hits(model, images.held_out, resolution))
                for one in measures
                for resolution in one.resolutions()
            ]
            part = {"kind": "measured model", "fingerprint": key, "scheme": scheme_name(model), "accuracies": found}
            write_record(part_folder(out, name), part)
        else:
            print(f"{label}: measured before, kept", file=sys.stderr)
        kept: list[AccuracyRow] = part["accuracies"]
        rows += [{**row, "model": label, "scheme": part["scheme"], "seeds": trained_seeds(name)} for row in kept]
    drawn: dict[str, Any] = {"samples": config.eval.bootstrap_samples, "seed": config.seeds[0]}
    groups = [[row for row in rows if row["seeds"] == seeds] for seeds in distinct(row["seeds"] for row in rows)]
    of_each = [
        row
        for group in (groups if len(config.seeds) > 1 else [])
        for row in with_differences(joined_accuracies(group, **drawn), control=config.eval.control, **drawn)
    ]
    accuracies = with_differences(joined_accuracies(rows, **drawn), control=config.eval.control, **drawn)
    return {"accuracies": accuracies, "runs": of_each, "data": described_images(images), "protocol_version": PROTOCOL_VERSION}
