"""A tiny model of every family: its configuration stands here, once, and every test over families builds it from here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

import pe_swap
from pe_swap.families import FAMILIES, family_name
from pe_swap.families.classes import config_class_of, modeling_of
from pe_swap.patching.layer_cache import parameters_of

ROUNDING = 5e-6
"""Largest difference of logits over the largest logit that counts as rounding."""

VOCABULARY = 89
TRAINED_LENGTH = 32
PAD, BOS, EOS = 0, 1, 2

SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 12, "intermediate_size": 64}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
LENGTH = {"max_position_embeddings": TRAINED_LENGTH}
GROUPED = {"num_key_value_heads": 4}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
NO_DROPOUT = {
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "layerdrop": 0.0,
    "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "dropout_rate": 0.0, "seq_classif_dropout": 0.0,
    "embedding_dropout": 0.0, "mlp_dropout": 0.0, "classifier_dropout_prob": 0.0,
}  # fmt: skip

PARTS = {
    "d_model": 96, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {
    "d_model": 96,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 12,
    "decoder_start_token_id": 1,
}

BERT_LIKE = {**SIZES, **LENGTH}
LLAMA_LIKE = {**SIZES, **LENGTH, **GROUPED}
EXPERTS = {
    "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "n_routed_experts": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
"""Sizes of a mixture of experts, by every name that families have for them; a family takes those that it knows."""

STATE_SPACE = {"mamba_n_heads": 12, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
CONVOLUTIONS = {
    **LLAMA_LIKE,
    "num_hidden_layers": 4,
    "layer_types": ["full_attention", "conv", "full_attention", "full_attention"],
}

TINY: dict[str, dict[str, Any]] = {
    "albert": {**BERT_LIKE, "embedding_size": 48, "num_hidden_groups": 2},
    "apertus": LLAMA_LIKE,
    "arcee": LLAMA_LIKE,
    "bamba": {**LLAMA_LIKE, **STATE_SPACE, "num_hidden_layers": 4, "attn_layer_indices": [0, 2, 3]},
    "bart": {**PARTS, **LENGTH},
    "bert": BERT_LIKE,
    "biogpt": BERT_LIKE,
    "bloom": {"hidden_size": 96, "n_layer": 3, "n_head": 12},
    "camembert": {**BERT_LIKE, "max_position_embeddings": TRAINED_LENGTH + 1},
    "clip_text_model": BERT_LIKE,
    "codegen": {"n_embd": 96, "n_layer": 3, "n_head": 12, "n_positions": TRAINED_LENGTH, "rotary_dim": 4, "n_inner": 64},
    "cohere": LLAMA_LIKE,
    "cohere2": {**LLAMA_LIKE, **WINDOW},
    "data2vec-text": {**BERT_LIKE, "max_position_embeddings": TRAINED_LENGTH + 1},
    "distilbert": {"dim": 96, "n_layers": 3, "n_heads": 12, "hidden_dim": 64, **LENGTH},
    "electra": {**BERT_LIKE, "embedding_size": 48},
    "esm": {**BERT_LIKE, "position_embedding_type": "rotary", "mask_token_id": 4, "token_dropout": False},
    "eurobert": LLAMA_LIKE,
    "exaone4": {**LLAMA_LIKE, **WINDOW},
    "falcon": {**SIZES, **LENGTH, "num_kv_heads": 4},
    "gemma": {**LLAMA_LIKE, "head_dim": 8},
    "gemma2": {**LLAMA_LIKE, **WINDOW, "head_dim": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**LLAMA_LIKE, **WINDOW, "head_dim": 8, "query_pre_attn_scalar": 16},
    "glm": {**LLAMA_LIKE, "head_dim": 8},
    "glm4": {**LLAMA_LIKE, "head_dim": 8},
    "gpt2": {"n_embd": 96, "n_layer": 3, "n_head": 12, "n_positions": TRAINED_LENGTH},
    "gpt_bigcode": {"n_embd": 96, "n_layer": 3, "n_head": 12, "n_positions": TRAINED_LENGTH, "n_inner": 64},
    "gpt_neox": {**BERT_LIKE, "rotary_pct": 0.5},
    "gpt_oss": {
        **LLAMA_LIKE, **WINDOW, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "gptj": {"n_embd": 96, "n_layer": 3, "n_head": 12, "n_positions": TRAINED_LENGTH, "rotary_dim": 4, "n_inner": 64},
    "granite": LLAMA_LIKE,
    "granite_docling_text": LLAMA_LIKE,
    "helium": {**LLAMA_LIKE, "head_dim": 8},
    "llama": LLAMA_LIKE,
    "marian": {**PARTS, **LENGTH},
    "mbart": {**PARTS, **LENGTH},
    "ministral": {**LLAMA_LIKE, **WINDOW, "head_dim": 8},
    "mistral": {**LLAMA_LIKE, "sliding_window": 6, "head_dim": 8},
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 2, "num_experts_per_tok": 1},
    "modernbert": {**BERT_LIKE, "local_attention": 12, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "modernbert-decoder": {**BERT_LIKE, "local_attention": 12, "layer_types": WINDOW["layer_types"]},
    "mt5": T5,
    "mpt": {"d_model": 96, "n_layers": 3, "n_heads": 12, "max_seq_len": TRAINED_LENGTH, "expansion_ratio": 1},
    "nemotron": LLAMA_LIKE,
    "nomic_bert": BERT_LIKE,
    "olmo": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "olmo3": {**LLAMA_LIKE, **WINDOW},
    "opt": {**BERT_LIKE, "ffn_dim": 64, "word_embed_proj_dim": 96},
    "pegasus": {**PARTS, **LENGTH},
    "persimmon": LLAMA_LIKE,
    "phi": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen2_moe": {
        **LLAMA_LIKE, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "qwen3_moe": {**LLAMA_LIKE, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "roberta": {**BERT_LIKE, "max_position_embeddings": TRAINED_LENGTH + 1},
    "seed_oss": {**LLAMA_LIKE, "head_dim": 8},
    "smollm3": {**LLAMA_LIKE, "no_rope_layers": [1, 0, 1]},
    "stablelm": LLAMA_LIKE,
    "starcoder2": LLAMA_LIKE,
    "t5": T5,
    "whisper": {**PARTS, "max_target_positions": TRAINED_LENGTH, "max_source_positions": 8, "num_mel_bins": 4},
    "xlm-roberta": {**BERT_LIKE, "max_position_embeddings": TRAINED_LENGTH + 1},
    "apertus1p5_text": LLAMA_LIKE,
    "aria_text": {**LLAMA_LIKE, **EXPERTS},
    "bitnet": LLAMA_LIKE,
    "cohere2_moe": {**LLAMA_LIKE, **WINDOW, **EXPERTS},
    "cwm": {**LLAMA_LIKE, **WINDOW, "head_dim": 8},
    "dots1": {**LLAMA_LIKE, **WINDOW, **EXPERTS},
    "ernie4_5": {**LLAMA_LIKE, "head_dim": 8},
    "ernie4_5_moe": {**LLAMA_LIKE, **EXPERTS},
    "exaone_moe": {**LLAMA_LIKE, **WINDOW, **EXPERTS},
    "falcon_h1": {**LLAMA_LIKE, **STATE_SPACE, "mamba_d_ssm": 192, "head_dim": 8},
    "flex_olmo": {**LLAMA_LIKE, **EXPERTS},
    "glm4_moe": {**LLAMA_LIKE, **EXPERTS, "head_dim": 8},
    "granitemoe": {**LLAMA_LIKE, **EXPERTS},
    "granitemoehybrid": {
        **LLAMA_LIKE, **EXPERTS, **STATE_SPACE, "num_hidden_layers": 4, "position_embedding_type": "rope",
        "layer_types": ["attention", "mamba", "attention", "attention"], "shared_intermediate_size": 32,
    },
    "granitemoeshared": {**LLAMA_LIKE, **EXPERTS},
    "hyperclovax": {**LLAMA_LIKE, "head_dim": 8},
    "jais2": {**LLAMA_LIKE, "head_dim": 8},
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1},
    "laguna": {**LLAMA_LIKE, **WINDOW, **EXPERTS, "head_dim": 8},
    "mellum": {**LLAMA_LIKE, **WINDOW, **EXPERTS, "head_dim": 8},
    "minimax_m2": {**LLAMA_LIKE, **EXPERTS, "head_dim": 8},
    "ministral3": {**LLAMA_LIKE, "head_dim": 8},
    "olmoe": {**LLAMA_LIKE, **EXPERTS},
    "qwen3_next": {
        **LLAMA_LIKE, **EXPERTS, "num_hidden_layers": 4, "head_dim": 16,
        "layer_types": ["full_attention", "linear_attention", "full_attention", "full_attention"],
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
    },
    "solar_open": {**LLAMA_LIKE, **EXPERTS, "head_dim": 8},
    "vaultgemma": {**LLAMA_LIKE, **WINDOW, "head_dim": 8},
}  # fmt: skip
"""What differs from `AutoConfig.for_model(name)`; every registered family has an entry here or in `IMAGES`, and a test says so."""

PATCHES = {"image_size": 24, "patch_size": 4}
IMAGES: dict[str, dict[str, Any]] = {
    "beit": {**SIZES, **PATCHES, "use_relative_position_bias": True, "out_indices": [0, 1, 2, 3]},
    "clip_vision_model": {**SIZES, **PATCHES},
    "deit": {**SIZES, **PATCHES, "architectures": ["DeiTForImageClassification"]},  # of two with one head
    "dinov2": {**SIZES, **PATCHES, "mlp_ratio": 1},
    "dinov2_with_registers": {**SIZES, **PATCHES, "mlp_ratio": 1, "num_register_tokens": 3},
    "dinov3_vit": {**SIZES, **PATCHES, "num_register_tokens": 3},
    "siglip_vision_model": {**SIZES, **PATCHES},
    "vit": {**SIZES, **PATCHES},
    "vit_mae": {**SIZES, **PATCHES, "mask_ratio": 0.25, "decoder_hidden_size": 32, "decoder_num_attention_heads": 2},
}
"""The same for the families whose input is an image."""


IDS_ONLY = {"clip_text_model"}
"""Families that take no embeddings in place of ids, so that a scheme that replaces them has no way in."""


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"bert-decoder": ("bert", {"is_decoder": True})}
"""Other configurations of a family, each with its `model_type`."""


def model_type_of(family: str) -> str:
    """Return the `model_type` of a family or of a variant of one."""
    return VARIANTS[family][0] if family in VARIANTS else family


def is_causal(family: str) -> bool:
    """Tell whether a tiny model of the family looks back only."""
    return FAMILIES[model_type_of(family)].is_causal(config_of(family))


def looks_back_only(family: str) -> bool:
    """Tell whether every stack of a family is causal."""
    config = config_of(family)
    return all(stack.is_causal(config) for stack in FAMILIES[family].stacks_of(config))


def config_of(family: str, **overrides: Any) -> Any:
    """Return the tiny configuration of a family in `TINY`, or of one of its `VARIANTS`; fields by their standard names or the family's."""
    model_type, changes = VARIANTS.get(family, (family, {}))
    assert model_type in {**TINY, **IMAGES}, f"give '{model_type}' a line in TINY or IMAGES of tests/support/families.py"
    plain = AutoConfig.for_model(model_type)
    known = plain.to_dict()
    overrides = {plain.attribute_map.get(name, name): value for name, value in overrides.items()}
    own = IMAGES[model_type] if model_type in IMAGES else {**TOKENS, **TINY[model_type]}
    settings = {**{name: value for name, value in NO_DROPOUT.items() if name in known}, **own}
    settings |= {**changes, **overrides}
    settings = {name: value for name, value in settings.items() if name not in EXPERTS or name in known}
    return AutoConfig.for_model(model_type, **settings)


def has_language_model_head(family: str) -> bool:
    """Tell whether transformers has a language model of a family, and no base model alone."""
    kinds = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    config_class = config_class_of(model_type_of(family))
    return any(config_class in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING") for kind in kinds)


def auto_class(family: str) -> Any:
    """Return the Auto class of the family's language model."""
    if FAMILIES[model_type_of(family)].takes_images:
        has_head = config_class_of(family) in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        return AutoModelForImageClassification if has_head else AutoModel
    if family == "whisper":
        return AutoModelForSpeechSeq2Seq
    if not has_language_model_head(family):
        return AutoModel
    if len(FAMILIES[model_type_of(family)].stacks_of(config_of(family))) > 1:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM if is_causal(family) else AutoModelForMaskedLM


PROTOTYPES: dict[str, tuple[PreTrainedModel, Tensor]] = {}
"""Models that `tiny` has built, with the state that they left the random numbers in; to copy one takes a third of the time."""


def tiny(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Return a tiny model with random weights, in evaluation mode, whose positions show."""
    key = repr((family, dtype, sorted(overrides.items())))
    if key not in PROTOTYPES:
        torch.manual_seed(1)
        model: PreTrainedModel = auto_class(family).from_config(config_of(family, **overrides), dtype=dtype)
        let_positions_show(model)
        PROTOTYPES[key] = model.eval(), torch.get_rng_state()
    prototype, random_state = PROTOTYPES[key]
    torch.set_rng_state(random_state)
    return copy.deepcopy(prototype)


def let_positions_show(model: PreTrainedModel) -> None:
    """Enlarge every matrix inside the layers: scores of a fresh model are all but equal, and positions would hardly show."""
    takes_images = FAMILIES[family_name(model.config.model_type)].takes_images
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if takes_images and "position" in name:  # zeros, in some
                parameter.normal_()
            elif takes_images and parameter.dim() == 2:  # as small as in texts, where some families draw larger ones
                parameter.normal_(std=0.08)
            elif parameter.dim() == 2 and not any(
                part in name for part in ("embed", "wte", "lm_head", "relative", "decoder.weight")
            ):
                parameter.mul_(4.0)


def token_ids(batch: int, length: int, seed: int = 3) -> Tensor:
    """Return random token ids, `[batch, length]`, none of them special."""
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def images(batch: int, height: int = 24, width: int = 24, seed: int = 3) -> Tensor:
    """Return random images, `[batch, 3, height, width]`."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def noise_of(pixels: Tensor) -> Tensor:
    """Return the noise by which ViTMAE keeps patches: one that belongs to an image, so that it is the same in every batch."""
    return F.avg_pool2d(pixels.float(), 4).mean(1).flatten(1)


def inputs_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a call on rows of tokens; an encoder-decoder decodes them from the same rows, or from sound.

    A model of images gets one per row, which differ as the rows do.
    """
    known = parameters_of(model)
    sound = torch.linspace(-1, 1, 64).reshape(1, 4, 16).expand(len(ids), -1, -1)
    given = {"input_ids": ids, "input_features": sound.to(model.dtype)}
    if "pixel_values" in known:
        given["pixel_values"] = images(1).to(model.dtype) * (ids.to(model.dtype).mean(-1) / VOCABULARY + 0.5)[:, None, None, None]
    if "noise" in known:
        given["noise"] = noise_of(given["pixel_values"])
    if "decoder_input_ids" in known:
        given["decoder_input_ids"] = ids if "input_features" in known else ids.flip(1)
    return {name: value for name, value in given.items() if name in known}


def outputs(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """Return logits (or states, of a model without a vocabulary head) of rows of tokens."""
    with torch.no_grad():
        found = model(**inputs_of(model, ids), **kwargs)
    result: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return result


def options_on_a_grid(family: str, scheme: str) -> dict[str, Any]:
    """Return the options that a scheme needs in a family of images: a size, where there is no table to match."""
    has_table = FAMILIES[family].stacks_of(config_of(family))[0].native.kind == "grid"
    return {"scale": 0.5} if scheme == "sinusoidal" and not has_table else {}


def takes_sdpa(model: PreTrainedModel) -> bool:
    """Tell whether a family computes under sdpa what it computes under eager; before 5.22, transformers dropped soft caps there."""
    return bool(model._supports_sdpa) and getattr(model.config, "attn_logit_softcapping", None) is None


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; what `ROUNDING` bounds."""
    return float((found - expected).abs().max() / expected.abs().max())


def described_alike() -> dict[str, list[str]]:
    """Return the families by what describes them: one name per description, the one its file has, and all that share it."""
    groups: list[list[str]] = []
    for name in FAMILIES.names():
        same = next((group for group in groups if FAMILIES[group[0]].stacks == FAMILIES[name].stacks), None)
        groups.append([name]) if same is None else same.append(name)
    folder = Path(pe_swap.families.__file__).parent
    return {next((name for name in group if (folder / f"{name}.py").exists()), group[0]): group for group in groups}


def exported_heads(family: str) -> list[type[PreTrainedModel]]:
    """Return the classes of a family that transformers exports, base model and heads."""
    exported = set(modeling_of(family).__all__)
    heads = FAMILIES[family].head_classes()
    return [head for head in heads if head.__name__ in exported and head.config_class is FAMILIES[family].config_class]
