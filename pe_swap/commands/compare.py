"""`scripts/compare.py`: several schemes from one base, trained equally, evaluated together.

Every part is a folder with a record. A part whose record is done, and whose configuration, text and model are the same by their
content, is not done again; one that was stopped in the middle continues from its last checkpoint. So does the evaluation, model by
model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pe_swap.commands.evaluate import evaluate
from pe_swap.commands.finetune import finetune, run_fingerprint, text_digest
from pe_swap.errors import CheckpointError, ConfigError, DivergedError
from pe_swap.evaluation.report import write_report
from pe_swap.runs import data
from pe_swap.runs.config import ORIGINAL, CompareConfig, EvalConfig, FinetuneConfig, SchemeSection, TrainSection, build, resolved
from pe_swap.runs.models import is_configuration
from pe_swap.runs.records import Stopwatch, environment, read_record, write_record
from pe_swap.schemes import SCHEMES, build_options
from pe_swap.training.resume import complete_checkpoints


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train what is not trained yet, evaluate, and write one report; return the record.

    A scheme whose training diverged is rows that say so; a base that diverged is an error, as nothing could come of it.

    Raises:
        PESwapError: the configuration, the text, the model or a scheme cannot be used; schemes are checked before anything runs.
    """
    watch, out = Stopwatch(), Path(config.out)
    for scheme in config.schemes.values():
        if scheme.name != ORIGINAL:
            build_options(SCHEMES[scheme.name].Options, scheme.options)
    text_key = text_digest(config.data)
    base = _base(config, out, text_key)
    folders = []
    for label, scheme in config.schemes.items():
        folder = out / label
        section = _finetune_config(config, base, scheme, config.train, folder)
        try:
            _finetune_once(section, label, text_key)
        except DivergedError as error:
            print(f"{label}: {error}", file=sys.stderr, flush=True)
        folders.append(str(folder))
    measured = _evaluate(config, folders, out / "evaluation")
    record = {
        "kind": "comparison",
        "status": "done",
        "config": resolved(config),
        **environment(),
        "seed": config.seed,
        "seconds": watch.seconds,
        "parts": {label: _perplexities(out / label) for label in config.schemes},
        "data": measured["data"],
        "trained_length": {label: config.data.block_size for label in config.schemes},
        "results": measured["results"],
    }
    write_record(out, record)
    write_report(out, record)
    return record


def _base(config: CompareConfig, out: Path, text_key: str) -> str:
    """Return the name of the base model, trained first where it starts from a configuration."""
    if not is_configuration(config.model):
        return str(config.model)
    if config.base is None:
        raise ConfigError(
            "A model started from a configuration has to be trained first: say how under 'base', or name a trained model."
        )
    section = FinetuneConfig(
        model=config.model,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        data=config.data,
        train=config.base,
        seed=config.seed,
        out=str(out / "base"),
    )
    _finetune_once(section, "base", text_key)
    return section.out


def _finetune_config(
    config: CompareConfig, base: str, scheme: SchemeSection, train: TrainSection, folder: Path
) -> FinetuneConfig:
    """Return one scheme's run: the same for every scheme but for the scheme."""
    tokenizer = config.tokenizer if not is_configuration(config.model) else None
    return FinetuneConfig(
        model=base, tokenizer=tokenizer, scheme=scheme, data=config.data, train=train, seed=config.seed, out=str(folder)
    )


def _finetune_once(config: FinetuneConfig, label: str, text_key: str) -> None:
    """Run a part, continue it, or leave it where it is done.

    Raises:
        CheckpointError: its folder holds what another run left when it was stopped.
        DivergedError: it diverged, now or before; done again it would do the same.
    """
    out = Path(config.out)
    record = read_record(out) or {}
    same = record.get("fingerprint") == run_fingerprint(config, text_key)
    if same and record["status"] == "diverged":
        raise DivergedError(
            f"The training in '{out}' diverged before, and nothing it depends on has changed. Train with a lower learning_rate, or more "
            "warmup_steps."
        )
    if same and record["status"] == "done":
        print(f"{label}: done before, kept", flush=True)
        return
    started = bool(complete_checkpoints(out))
    if started and not same and record.get("status") == "running":
        raise CheckpointError(
            f"'{out}' holds checkpoints of a part that was stopped, of another configuration, text or model. Bring those back to continue "
            "it, delete the folder, or compare in another --out."
        )
    print(f"{label}: training", flush=True)
    finetune(config.model_copy(update={"resume": same and started}))


def _evaluate(config: CompareConfig, folders: list[str], out: Path) -> dict[str, Any]:
    """Evaluate all models on the held-out text; each model that was measured before on the same is kept."""
    settings = {"models": folders, "data": resolved(config.data), "seed": config.seed, "out": str(out)}
    return evaluate(build(EvalConfig, {**resolved(config.eval), **settings}), data.load_documents(config.data, "eval"))


def _perplexities(folder: Path) -> dict[str, Any]:
    """Return a part's perplexity before the swap, after it and after training, and its loss log."""
    record = read_record(folder) or {}
    return {"perplexity": record.get("perplexity"), "seconds": record.get("seconds"), "training": record.get("training")}
