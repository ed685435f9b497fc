"""BERT checkpoints of transformers 4 with relative positions.

transformers up to 4.57 gave BERT `position_embedding_type="relative_key"` and `"relative_key_query"` (Shaw et al., arXiv:1803.02155;
Huang et al., arXiv:2009.13658, method 4). transformers 5 took both out and still reads such checkpoints: as a BERT with an absolute
table that was never trained, and without a warning. They are the scheme `shaw`, unclipped.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import BertConfig, PreTrainedModel

from pe_swap.assignment import FORMAT
from pe_swap.errors import CheckpointError, UnsupportedModelError
from pe_swap.families import FAMILIES
from pe_swap.patching.holder import stand_in_weight
from pe_swap.patching.install import holder_of
from pe_swap.registry import did_you_mean
from pe_swap.saving.class_names import swapped_config_class, swapped_model_class
from pe_swap.schemes import build_options
from pe_swap.schemes.base import ATTENTION_HOOKS
from pe_swap.schemes.shaw import Shaw
from pe_swap.version import __version__

WHERE = frozenset({"subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only"})
"""Arguments of `from_pretrained` that say which files are meant: the configuration's are those of the weights."""

REFUSED = {
    "config": "the configuration is the checkpoint's, rewritten. Leave it out, and change fields of model.config afterwards",
    "output_loading_info": "weights that are missing or do not fit raise an error here. Leave it out",
}
"""Arguments of `from_pretrained` that are not taken, and why."""

VARIANTS = {"relative_key": "key", "relative_key_query": "key_query"}
"""transformers 4's `position_embedding_type` to the variant of `shaw`."""


def require_absolute_positions(config: Any, name: str) -> None:
    """Refuse a checkpoint whose `position_embedding_type` transformers 5 no longer reads: its distances would be dropped in silence.

    Args:
        config: a model's configuration.
        name: what the message calls the model.

    Raises:
        UnsupportedModelError: the field names relative positions.
    """
    kind = getattr(config, "position_embedding_type", None)
    if str(kind).startswith("relative"):
        raise UnsupportedModelError(
            f"{name} has position_embedding_type '{kind}', which transformers 5 ignores: it would run with a position table that was "
            "never trained. Load a BERT of this kind with pe_swap.saving.relative_key_bert.load_relative_key_bert, which makes it a "
            "model swapped to shaw."
        )


def load_relative_key_bert(
    path: str | os.PathLike[str], head: type[PreTrainedModel] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a relative BERT of transformers 4 as a model swapped to `shaw`, with the logits it had there.

    transformers 4 added `q_i . a[i - j + M - 1] / sqrt(head_dim)` to the scores (and `k_j . a[...]` for `relative_key_query`), with a
    table of `2 M - 1` rows a layer and M = `max_position_embeddings`, and no absolute positions. `shaw` counts from key to query, so its
    tables are these upside down, with `max_distance = M - 1`. Beyond M positions, where transformers 4 failed, the farthest vector is
    shared by all that is farther.

    Differs from transformers 4: none in a call without a cache. A decoder given more than one token with a cache measured every
    distance from the last of them there; here from each.

    Args:
        path: a folder or a name on the Hub. Weights must be safetensors.
        head: a BERT class of transformers; None takes the one that the checkpoint names.
        kwargs: for `from_pretrained` (`dtype`, `device_map`, ...), but for `config` and `output_loading_info`.

    Returns:
        The model, in evaluation mode, as `from_pretrained` returns it: it saves and loads like any swapped model.

    Raises:
        CheckpointError: no relative BERT, no known head, files that are missing, pickled or damaged, or an argument that is not taken.
    """
    for name in REFUSED.keys() & kwargs.keys():
        raise CheckpointError(
            f"load_relative_key_bert does not take '{name}' (given: {type(kwargs[name]).__name__}): {REFUSED[name]}."
        )
    try:
        content, _ = BertConfig.get_config_dict(path, **{name: kwargs[name] for name in WHERE & kwargs.keys()})
    except OSError as error:
        raise CheckpointError(
            f"'{path}' has no config.json that can be read; it must be a folder, or a name on the Hub, of a BERT saved by transformers. "
            f"Correct the path. transformers says: {error}"
        ) from error
    kind = content.pop("position_embedding_type", "absolute")
    if content.get("model_type") != "bert" or kind not in VARIANTS:
        raise CheckpointError(
            f"'{path}' is a '{content.get('model_type')}' with position_embedding_type '{kind}'; it must be a 'bert' with "
            f"{' or '.join(map(repr, VARIANTS))}. Load it with an Auto class of transformers."
        )
    family = FAMILIES["bert"]
    chosen: Any = _head(content.get("architectures"), path) if head is None else head
    rows = content.get("max_position_embeddings", BertConfig().max_position_embeddings)
    layers = content.get("num_hidden_layers", BertConfig().num_hidden_layers)
    for name, value in (("max_position_embeddings", rows), ("num_hidden_layers", layers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"'{path}' has the {name} {value!r} in its config.json; it must be a positive integer. Correct it there."
            )
    options = build_options(Shaw.Options, {"max_distance": rows - 1, "variant": VARIANTS[kind]})
    content["pe_swap"] = {
        "format": FORMAT,
        "version": __version__,
        "original_model_type": "bert",
        "trained_length": rows,
        "max_length": None,
        "length": rows,
        "guarded": rows,
        "is_causal": bool(content.get("is_decoder", False)),
        "attention_hooks": sorted(Shaw.hooks_for(options) & ATTENTION_HOOKS),
        "rope_parameters": None,
        "schemes": [{"name": options.scheme, "options": options.to_dict()}],
        "layers": [0] * layers,
        "input": 0,
    }
    config = swapped_config_class(family).from_dict(content)
    try:
        model: PreTrainedModel = swapped_model_class(family, chosen).from_pretrained(
            path, config=config, key_mapping=_new_names(layers), beside_old_table=True, **kwargs
        )
    except OSError as error:
        raise CheckpointError(
            f"The weights of '{path}' cannot be loaded: {error} Pickled weights are not read, as they can run code; save the model with "
            "transformers 4 once more: model.save_pretrained(folder, safe_serialization=True)."
        ) from error
    model._weight_conversions = None  # or transformers would save the turned tables under their old names
    holder = holder_of(model)
    assert holder is not None
    holder.weight = stand_in_weight(None).to(holder.tokens.weight)
    with torch.no_grad():
        for table in holder.parameters():
            table.copy_(table.flip(0))
    return model


def _head(architectures: object, path: str | os.PathLike[str]) -> type[PreTrainedModel]:
    """Return the head class that a checkpoint names.

    Raises:
        CheckpointError: it names none, or one that this transformers does not have.
    """
    known = {head.__name__: head for head in FAMILIES["bert"].head_classes()}
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name not in known:
        raise CheckpointError(
            f"'{path}' names {name!r} as its architecture, which is not a BERT class of transformers.{did_you_mean(name, known)} Give one "
            "as head, for instance head=BertForMaskedLM."
        )
    return known[name]


def _new_names(layers: int) -> dict[str, str]:
    """Return patterns of the old weights' names and what they become; the absolute table, which was never used, goes aside."""
    prefix = r"embeddings\.position_embeddings"
    tables = {
        rf"encoder\.layer\.{layer}\.attention\.self\.distance_embedding\.weight": (
            f"embeddings.position_embeddings.schemes.0.key_tables.{layer}"
        )
        for layer in range(layers)
    }
    return {rf"{prefix}\.weight": "unused_absolute_positions", **tables}
