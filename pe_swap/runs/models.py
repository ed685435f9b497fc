"""Loading a model by name, or starting one from a configuration."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto

from pe_swap.errors import CheckpointError, ConfigError, DataError, PESwapError, UnsupportedModelError
from pe_swap.families import COMPOSITES, FAMILIES, family_name
from pe_swap.families.native import Table
from pe_swap.patching.install import holder_in, holder_of
from pe_swap.registry import did_you_mean
from pe_swap.runs.config import ORIGINAL, SchemeSection
from pe_swap.runs.records import file_hash, uses_gpu
from pe_swap.runs.yaml_reader import read_yaml
from pe_swap.saving.relative_key_bert import require_absolute_positions
from pe_swap.swap import swap_positional

CONTENT = (
    "*.safetensors", "pytorch_model*.bin", "*.index.json", "config.json", "tokenizer*", "vocab*", "merges.txt", "*.model",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Files that make a model's folder what it is; not the model card, which an evaluation writes to, nor a record."""


ADAPTER = "adapter_config.json"
"""The file that makes a folder an adapter of PEFT."""

SPLITS_WEIGHTS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""Variables of `accelerate launch` under which the weights of a model are split over processes, each of which places its own."""

UNUSED_IN_STATES = "pooler."
"""Where the weights begin that BERT's body has and its last hidden states do not come from."""


def content_hashes(name: str | dict[str, Any] | None) -> dict[str, str]:
    """Return the SHA-256 of every file that decides what a local model, tokenizer or configuration is; none for what is not local."""
    path = Path(name) if isinstance(name, str) else None
    if path is None or not path.exists():
        return {}
    files = [path] if path.is_file() else {file for pattern in CONTENT for file in path.glob(pattern) if file.is_file()}
    return {file.name: file_hash(file) for file in sorted(files)}


def load_model(name: str, dtype: torch.dtype = torch.float32, *, with_head: bool = True) -> PreTrainedModel:
    """Load a language model, swapped or not: a causal one, or a masked one where it is an encoder.

    Args:
        name: hub name or folder.
        dtype: of the weights.
        with_head: whether it needs its head for words; without, a sentence encoder will do.

    Raises:
        CheckpointError: it is missing, incomplete (a head without weights, for instance) or damaged.
        UnsupportedModelError: its positions are of a kind that transformers no longer reads, or it is neither causal nor masked, or a
            model of images.
    """
    if (Path(name) / ADAPTER).is_file() and not (Path(name) / "config.json").is_file():
        raise CheckpointError(
            f"'{name}' holds an adapter of PEFT and no model. Merge it into its base, model.merge_and_unload().save_pretrained(...), and "
            "name that folder."
        )
    try:
        config = AutoConfig.from_pretrained(name)
        require_absolute_positions(config, f"'{name}'")
        require_text_model(config)
        model_class = language_model_class(config) if with_head else AutoModel
        model, info = model_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except PESwapError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"Cannot load a model from '{name}': {error}") from error
    missing = sorted(key for key in info["missing_keys"] if with_head or not key.startswith(UNUSED_IN_STATES))
    if missing:
        listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise CheckpointError(
            f"'{name}' has no weights for {listed} of {type(model).__name__}; they would be random, and so would every perplexity. Name a "
            "checkpoint that was saved with its language model head."
        )
    if with_head:
        require_one_direction(model, name)
    loaded: PreTrainedModel = model
    return loaded


def device_of_process() -> torch.device:
    """Return the device on which this process trains and measures: its GPU, or the CPU where there is none.

    It is the CPU too where a launcher says so, or splits the weights of a model over processes (FSDP, DeepSpeed) and places them itself.
    """
    if not uses_gpu() or any(map(parse_flag_from_env, SPLITS_WEIGHTS)):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def is_headless(name: str) -> bool:
    """Tell whether a checkpoint says that it was saved without a head, as sentence encoders are."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return False  # loading it says what is wrong
    return any(saved in modeling_auto.MODEL_MAPPING_NAMES.values() for saved in config.architectures or ())


def require_text_model(config: Any) -> None:
    """Refuse a model of images, one that is made of several models, or an encoder-decoder, where text goes in.

    Raises:
        UnsupportedModelError: it is one.
    """
    if family_name(config.model_type) in COMPOSITES:
        raise UnsupportedModelError(
            f"A model of type '{config.model_type}' is made of several models, and the scripts train and measure a language model by "
            "itself. Swap it in Python with swap_positional(model, ...), and train it with its own data."
        )
    if takes_images(config):
        raise UnsupportedModelError(
            f"A model of type '{config.model_type}' reads images, and the data are text. Name a language model, or data.images in a "
            "configuration of compare.py."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"A model of type '{config.model_type}' is an encoder with a decoder, and the scripts train and measure one of them by itself. "
            "Swap it in Python with swap_positional(model, ...), and train it with its own pairs of texts."
        )


def takes_images(config: Any) -> bool:
    """Tell whether a configuration is of a family of images, swapped or not."""
    family = family_name(config.model_type)
    return family in FAMILIES and FAMILIES[family].takes_images


def language_model_class(config: Any) -> Any:
    """Return the Auto class of the language model that a configuration describes."""
    return AutoModelForCausalLM if is_causal_configuration(config) else AutoModelForMaskedLM


def is_causal_configuration(config: Any) -> bool:
    """Tell whether a configuration describes a model that looks back only: its family says so, else what transformers has for it."""
    family = family_name(config.model_type)
    if family in FAMILIES:
        return FAMILIES[family].is_causal(config)
    return family not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(getattr(config, "is_decoder", False))


@torch.no_grad()
def require_one_direction(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that is taken for a causal one and looks ahead, by what it does on a few tokens.

    Raises:
        UnsupportedModelError: the logits of early tokens follow a later one.
    """
    if not is_causal(model) or model.config.vocab_size < 4:
        return
    was_training = model.training
    model.eval()
    input_ids = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 0]], device=model.device)
    first, second = model(input_ids).logits[:, :3].float()
    model.train(was_training)
    if torch.isfinite(first).all() and not torch.allclose(first, second, rtol=1e-2, atol=1e-2):
        raise UnsupportedModelError(
            f"'{name}' ({type(model).__name__}) was taken for a causal language model, but its outputs follow later tokens: it would know "
            "what it has to predict. Name a decoder (is_decoder true), or an encoder with a masked language model head."
        )


def start_model(model: str | dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a model with random weights, with the tokenizer's vocabulary.

    Args:
        model: a configuration with its `model_type`, or the path of a JSON or YAML file that holds one.
        tokenizer: whose vocabulary size and special tokens the model takes.

    Raises:
        ConfigError: no `model_type`, or fields that transformers refuses.
        UnsupportedModelError: it is a model of images.
    """
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = described(model, vocab_size=len(tokenizer), **special)
    require_text_model(config)
    try:
        built: PreTrainedModel = language_model_class(config).from_config(config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"transformers refuses the model configuration {model}: {error}") from error
    return built


def described(model: str | dict[str, Any], **defaults: Any) -> Any:
    """Return the configuration that a model to start is described by.

    Args:
        model: as `start_model`.
        defaults: fields that the description may leave out.

    Raises:
        ConfigError: as `start_model`.
    """
    settings = read_yaml(model) if isinstance(model, str) else dict(model)
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ConfigError(f"A model configuration needs a model_type ({', '.join(FAMILIES.names())}, ...), got {model_type!r}.")
    _require_known_fields(model_type, settings, model)
    try:
        return AutoConfig.for_model(model_type, **{**defaults, **settings})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"transformers refuses the model configuration {settings}: {error}") from error


LEGACY_FIELDS = frozenset({"rope_theta", "rope_scaling", "torch_dtype", "num_labels", "attn_implementation"})
"""Fields that every configuration of transformers takes and keeps under another name."""


def _require_known_fields(model_type: str, settings: dict[str, Any], model: str | dict[str, Any]) -> None:
    """Refuse fields that a model's configuration does not have, which transformers would store and never read.

    A file that transformers itself saved may have more: older versions wrote fields that no model reads.

    Raises:
        ConfigError: there is one, or no such model type.
    """
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"transformers knows no model_type '{model_type}'.{did_you_mean(model_type, CONFIG_MAPPING)} Correct it."
        )
    if isinstance(model, str) and "transformers_version" in settings:
        return
    config_class = CONFIG_MAPPING[model_type]
    known = {name for base in config_class.__mro__ for name in inspect.signature(base.__init__).parameters}
    known |= {*vars(config_class()), *config_class.attribute_map, *LEGACY_FIELDS}
    for field in settings:
        if field not in known:
            raise ConfigError(
                f"A model of type '{model_type}' has no field '{field}'.{did_you_mean(field, known)} Correct it under 'model', or drop it."
            )


def is_configuration(model: str | dict[str, Any]) -> bool:
    """Tell whether a model is named by a configuration to start from."""
    return isinstance(model, dict) or Path(model).suffix in (".json", ".yaml", ".yml")


def apply_scheme(model: PreTrainedModel, scheme: SchemeSection) -> PreTrainedModel:
    """Swap a model to a section's scheme; 'original' leaves it as it is."""
    if scheme.plan is not None:
        if scheme.name != ORIGINAL:
            raise ConfigError(
                f"scheme has the name '{scheme.name}' and the plan '{scheme.plan}'; it must have one of them. Drop the other."
            )
        return swap_positional(model, plan=scheme.plan, layers=scheme.layers, keep_mean=scheme.keep_mean, **scheme.options)
    if scheme.name == ORIGINAL:
        if scheme.options or scheme.layers is not None or scheme.keep_mean is not None:
            given = sorted(scheme.options) or ("layers" if scheme.layers is not None else "keep_mean")
            raise ConfigError(f"scheme is '{ORIGINAL}' with {given}; the control takes no options. Drop them, or name a scheme.")
        return model
    return swap_positional(model, scheme.name, layers=scheme.layers, keep_mean=scheme.keep_mean, **scheme.options)


def scheme_name(model: PreTrainedModel) -> str:
    """Return the names of a model's schemes, or 'original'."""
    family = family_name(model.config.model_type)
    holder = holder_of(model) if family in FAMILIES else None
    if holder is None:
        return ORIGINAL
    return "+".join(dict.fromkeys(holder.scheme_at(index).name for index in range(len(holder.schemes)))) or "none"


def is_causal(model: PreTrainedModel) -> bool:
    """Tell whether a model looks back only, so that perplexity is defined."""
    return is_causal_configuration(model.config)


def longest_input(model: PreTrainedModel) -> int | None:
    """Return the most tokens a model can take, or None where nothing ends it.

    Of a model's own positions only a table ends: a rotation or a bias goes on, well or badly, which is what an evaluation is to find
    out. A swapped model's configuration says the length that its schemes allow.
    """
    name = model.config.model_type
    stacks = FAMILIES[name].stacks_in(model.base_model, model.config) if name in FAMILIES else ()
    if stacks and all(holder_in(model, stack) is None for stack in stacks):
        tables = [stack.native for stack in stacks if isinstance(stack.native, Table)]
        lengths = [table.trained_length(model.config, table.require_native(model.base_model)) for table in tables]
        return min((length for length in lengths if length is not None), default=None)
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(limit) if limit is not None else None


def require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that the model has no row for.

    Raises:
        DataError: it has.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise DataError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the model has rows for {rows:,}. Name the model's own tokenizer with "
            "--tokenizer, or give the model a larger vocab_size."
        )
