"""`scripts/compare.py`: several schemes from one base, trained equally, evaluated together.

Every part is a folder with a record. A part whose record is done and whose configuration is the same is not done again; one that was
stopped in the middle continues from its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pe_swap.config import ORIGINAL, CompareConfig, EvalConfig, FinetuneConfig, SchemeSection, TrainSection, build, resolved
from pe_swap.errors import ConfigError
from pe_swap.evaluation.suite import evaluate
from pe_swap.models import is_configuration
from pe_swap.records import Stopwatch, environment, fingerprint, read_record, write_record
from pe_swap.report import write_report
from pe_swap.schemes import SCHEMES, build_options
from pe_swap.training import CHECKPOINTS, finetune, run_fingerprint


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train what is not trained yet, evaluate, and write one report; return the record.

    Raises:
        PESwapError: the configuration, the text, the model or a scheme cannot be used; schemes are checked before anything runs.
    """
    watch, out = Stopwatch(), Path(config.out)
    for scheme in config.schemes.values():
        if scheme.name != ORIGINAL:
            build_options(SCHEMES[scheme.name].Options, scheme.options)
    base = _base(config, out)
    folders = []
    for label, scheme in config.schemes.items():
        folder = out / label
        section = _finetune_config(config, base, scheme, config.train, folder)
        _finetune_once(section, label)
        folders.append(str(folder))
    measured = _evaluate_once(config, folders, out / "evaluation")
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


def _base(config: CompareConfig, out: Path) -> str:
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
    _finetune_once(section, "base")
    return section.out


def _finetune_config(
    config: CompareConfig, base: str, scheme: SchemeSection, train: TrainSection, folder: Path
) -> FinetuneConfig:
    """Return one scheme's run: the same for every scheme but for the scheme."""
    tokenizer = config.tokenizer if not is_configuration(config.model) else None
    return FinetuneConfig(
        model=base, tokenizer=tokenizer, scheme=scheme, data=config.data, train=train, seed=config.seed, out=str(folder)
    )


def _finetune_once(config: FinetuneConfig, label: str) -> None:
    """Run a part, continue it, or leave it where it is done."""
    out = Path(config.out)
    key = run_fingerprint(config)
    record = read_record(out)
    same = record is not None and record.get("fingerprint") == key
    if same and record is not None and record["status"] == "done":
        print(f"{label}: done before, kept", flush=True)
        return
    print(f"{label}: training", flush=True)
    started = same and any((out / CHECKPOINTS).glob("checkpoint-*"))
    finetune(config.model_copy(update={"resume": started}))


def _evaluate_once(config: CompareConfig, folders: list[str], out: Path) -> dict[str, Any]:
    """Evaluate all models together, or return what was measured before on the same models."""
    section = build(
        EvalConfig,
        {
            **resolved(config.eval),
            "models": folders,
            "data": resolved(config.data),
            "seed": config.seed,
            "out": str(out),
        },
    )
    trained = [(read_record(Path(folder)) or {}).get("fingerprint") for folder in folders]
    key = fingerprint([resolved(section), trained])
    record = read_record(out)
    if record is None or record.get("fingerprint") != key:
        record = evaluate(section)
        record["fingerprint"] = key
        write_record(out, record)
    return record


def _perplexities(folder: Path) -> dict[str, Any]:
    """Return a part's perplexity before the swap, after it and after training, and its loss log."""
    record = read_record(folder) or {}
    return {"perplexity": record.get("perplexity"), "seconds": record.get("seconds"), "training": record.get("training")}
