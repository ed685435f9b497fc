"""Small models with 12 heads, and the scheme options every matrix test runs over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

import pe_swap
from pe_swap.families import FAMILIES
from pe_swap.patching.install import positional_parameters
from pe_swap.patching.layer_cache import cache_argument
from pe_swap.schemes import SCHEMES
from tests.support.families import PAD, TRAINED_LENGTH, VOCABULARY, is_causal, tiny, token_ids

__all__ = ["TRAINED_LENGTH", "VOCABULARY", "token_ids"]

LONGROPE = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 14}
LONGROPE |= {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.5, 2.0, 4.0, 8.0]}

# One entry a scheme and form worth testing; a test checks that every registered scheme has one.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "alibi": ("alibi", {}),
    "alibi-trained": ("alibi", {"slopes": "geometric", "trainable": True}),
    "binary": ("binary", {}),
    "concat": ("concat", {}),
    "concat-learned": ("concat", {"table": "learned", "dim": 7}),
    "cope": ("cope", {}),
    "cope-short": ("cope", {"num_positions": 5}),
    "deberta": ("deberta", {}),
    "deberta-clip": ("deberta", {"buckets": "clip", "span": 6, "terms": "content_to_position", "scale": "paper"}),
    "deberta-log": ("deberta", {"span": 8, "max_distance": 20, "scale": "paper", "layer_norm": True}),
    "fire": ("fire", {}),
    "fire-shared": ("fire", {"functions": "shared", "hidden_units": 5, "threshold": 11.0, "scale": 0.5, "start": "zero"}),
    "fox": ("fox", {}),
    "fox-fading": ("fox", {"initial_reach": 4.0}),
    "hope": ("hope", {}),
    "hope-fast": ("hope", {"longest_period": 10.0, "base": 50.0, "layout": "interleaved"}),
    "index": ("index", {}),
    "kerple": ("kerple", {}),
    "kerple-power": ("kerple", {"variant": "power", "kernels": "per_layer", "start": "random"}),
    "learned": ("learned", {"max_length": 64}),
    "learned-tile": ("learned", {"max_length": 50, "extend": "tile"}),
    "none": ("none", {}),
    "none-norm": ("none", {"qk_norm": True, "temperature": "log"}),
    "rerope": ("rerope", {"window": 5}),
    "rerope-interleaved": ("rerope", {"window": 9, "layout": "interleaved", "fraction": 0.5, "logit_scale": "log_n"}),
    "rope": ("rope", {}),
    "rope-dynamic": ("rope", {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}),
    "rope-longrope": ("rope", LONGROPE),
    "rope-proportional": ("rope", {"rope_type": "proportional", "fraction": 0.5}),
    "rope-yarn": ("rope", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "base": 100.0}),
    "rope-planes": ("rope", {"planes": "low", "planes_share": 0.5}),
    "rope-interleaved": ("rope", {"base": 500.0, "layout": "interleaved", "fraction": 0.5}),
    "sandwich": ("sandwich", {}),
    "sandwich-gym": ("sandwich", {"convention": "attention_gym", "width": 16}),
    "self-extend": ("self_extend", {"window": 5}),
    "self-extend-triples": ("self_extend", {"window": 7, "group_size": 3, "base": 500.0}),
    "shaw": ("shaw", {"max_distance": 5}),
    "shaw-all": ("shaw", {"max_distance": 9, "variant": "key_query", "value": True}),
    "sinusoidal": ("sinusoidal", {"base": 100.0, "layout": "split"}),
    "transformer-xl": ("transformer_xl", {}),
    "transformer-xl-per-layer": ("transformer_xl", {"biases": "per_layer", "max_distance": 7}),
    "xpos": ("xpos", {}),
    "xpos-half": ("xpos", {"scale_base": 20, "gamma": 0.1, "base": 300.0, "layout": "half"}),
    "t5": ("t5", {"num_buckets": 8, "max_distance": 12}),
}
LENGTH_DEPENDENT = ("rope-dynamic", "rope-longrope")
"""Cases that do not claim that a cached pass equals an uncached one; the matrix checks that they are these."""
TURN_A_PART = ("gpt_neox", "gptj")
"""Families whose rotation turns half of each head, so that it has half as many planes as the cases give factors for."""
MATRIX_FAMILIES = ("gpt2", "bert", "bert-decoder")
"""Families in which every case runs, and a variant, where the covering cases do."""
DECODERS = [family for family in MATRIX_FAMILIES if is_causal(family)]


def pairs(families: Iterable[str], cases: Iterable[str] = CASES) -> list[tuple[str, str]]:
    """Return every case in every family that it is defined for, as `(case, family)`."""
    return [
        (case, family) for case in cases for family in families if is_causal(family) or not SCHEMES[CASES[case][0]].causal_only
    ]


BACKENDS = ("eager", "sdpa")

ROUNDING = {"atol": 2e-5, "rtol": 1e-4}
"""For `torch.testing.assert_close`: float32, two layers, sums in another order."""


def build(family: str, backend: str = "sdpa", **config: Any) -> PreTrainedModel:
    """Return a model of two layers with random weights, dropout off."""
    return tiny(family, **{"num_hidden_layers": 2, "attn_implementation": backend, **config})


def swapped(family: str, case: str, backend: str = "sdpa", **config: Any) -> PreTrainedModel:
    """Return a small model swapped to a case, its positional parameters moved off their neutral start."""
    name, options = CASES[case]
    model = pe_swap.swap_positional(build(family, backend, **config), name, **options)
    disturb(model)
    return model


def swapped_tiny(family: str, case: str) -> PreTrainedModel:
    """Return the tiny model of any family swapped to a case, as `swapped`, with the options that its own positions ask for."""
    name, options = CASES[case]
    if name == "concat" and "dim" in options and FAMILIES[family].stacks[0].native.kind != "table":
        options = {**options, "table": "sinusoidal"}
    if case == "rope-longrope" and family in TURN_A_PART:
        options = {**options, **{factors: options[factors][::2] for factors in ("short_factor", "long_factor")}}
    model = pe_swap.swap_positional(tiny(family), name, **options)
    disturb(model)
    return model


def disturb(model: PreTrainedModel) -> None:
    """Move every positional parameter, so that what it does shows."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in positional_parameters(model):
            scale = 0.02 if name.endswith("_weight") else 0.5
            parameter.add_(torch.randn_like(parameter) * scale)


def logits(model: nn.Module, *args: Tensor, **kwargs: Any) -> Tensor:
    """Return the logits of a call, without gradients."""
    with torch.no_grad():
        found: Tensor = model(*args, **kwargs).logits
    return found


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of unequal lengths as a batch padded on the left, and its attention mask."""
    length = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, length - row.shape[1] :], mask[index, length - row.shape[1] :] = row[0], 1
    return ids, mask


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """Return the arguments of a call with a cache, by the name this transformers version has for it."""
    return {cache_argument(model): cache, "use_cache": True}


def checkpoint_activations(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """Turn gradient checkpointing on, by the name this transformers version has for it."""
    name = (
        "activation_checkpointing_enable"
        if hasattr(model, "activation_checkpointing_enable")
        else "gradient_checkpointing_enable"
    )
    getattr(model, name)({"use_reentrant": use_reentrant})
