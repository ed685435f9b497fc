"""Loading a model by name, or starting one from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from pe_swap.errors import CheckpointError, ConfigError, PESwapError
from pe_swap.families import FAMILIES, family_name
from pe_swap.patching.install import holder_of
from pe_swap.runs.config import ORIGINAL, SchemeSection, read_yaml
from pe_swap.runs.records import file_hash
from pe_swap.swap import swap_positional

CONTENT = (
    "*.safetensors", "pytorch_model*.bin", "*.index.json", "config.json", "tokenizer*", "vocab*", "merges.txt", "*.model",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Files that make a model's folder what it is; not the model card, which an evaluation writes to, nor a record."""


def content_hashes(name: str | dict[str, Any] | None) -> dict[str, str]:
    """Return the SHA-256 of every file that decides what a local model, tokenizer or configuration is; none for what is not local."""
    path = Path(name) if isinstance(name, str) else None
    if path is None or not path.exists():
        return {}
    files = [path] if path.is_file() else {file for pattern in CONTENT for file in path.glob(pattern) if file.is_file()}
    return {file.name: file_hash(file) for file in sorted(files)}


def load_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a language model, swapped or not: a causal one, or a masked one where it is an encoder.

    Raises:
        CheckpointError: it is missing, incomplete or damaged.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        model: PreTrainedModel = language_model_class(config).from_pretrained(name, dtype=dtype)
    except PESwapError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"Cannot load a model from '{name}': {error}") from error
    return model


def language_model_class(config: Any) -> Any:
    """Return the Auto class of the language model a configuration describes."""
    family = family_name(config.model_type)
    is_encoder = family in FAMILIES and not FAMILIES[family].is_causal(config)
    return AutoModelForMaskedLM if is_encoder else AutoModelForCausalLM


def start_model(model: str | dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a model with random weights, with the tokenizer's vocabulary.

    Args:
        model: a configuration with its `model_type`, or the path of a JSON or YAML file that holds one.
        tokenizer: whose vocabulary size and special tokens the model takes.

    Raises:
        ConfigError: no `model_type`, or fields that transformers refuses.
    """
    settings = read_yaml(model) if isinstance(model, str) else dict(model)
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ConfigError(f"A model configuration needs a model_type ({', '.join(FAMILIES.names())}, ...), got {model_type!r}.")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **special, **settings})
        built: PreTrainedModel = language_model_class(config).from_config(config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"transformers refuses the model configuration {settings}: {error}") from error
    return built


def is_configuration(model: str | dict[str, Any]) -> bool:
    """Tell whether a model is named by a configuration to start from."""
    return isinstance(model, dict) or Path(model).suffix in (".json", ".yaml", ".yml")


def apply_scheme(model: PreTrainedModel, scheme: SchemeSection) -> PreTrainedModel:
    """Swap a model to a section's scheme; 'original' leaves it as it is."""
    if scheme.name == ORIGINAL:
        if scheme.options or scheme.layers is not None:
            raise ConfigError(
                f"scheme is '{ORIGINAL}' with {sorted(scheme.options) or 'layers'}; the control takes no options. Drop them, or name "
                "a scheme."
            )
        return model
    return swap_positional(model, scheme.name, layers=scheme.layers, **scheme.options)


def scheme_name(model: PreTrainedModel) -> str:
    """Return the names of a model's schemes, or 'original'."""
    family = family_name(model.config.model_type)
    holder = holder_of(model) if family in FAMILIES else None
    if holder is None:
        return ORIGINAL
    return "+".join(dict.fromkeys(holder.scheme_at(index).name for index in range(len(holder.schemes)))) or "none"


def is_causal(model: PreTrainedModel) -> bool:
    """Tell whether a model looks back only, so that perplexity is defined."""
    family = family_name(model.config.model_type)
    return (
        FAMILIES[family].is_causal(model.config) if family in FAMILIES else bool(getattr(model, "can_generate", lambda: True)())
    )


def longest_input(model: PreTrainedModel) -> int | None:
    """Return the most tokens a model can take, by its configuration, or None where that does not say."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(limit) if limit is not None else None
