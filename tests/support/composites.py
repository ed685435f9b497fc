"""A tiny model of every composite: what its parts are stands here, once."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, EncoderDecoderModel, PreTrainedModel, VisionEncoderDecoderModel

from pe_swap.families import COMPOSITES
from tests.support.families import BOS, EOS, GROUPED, PAD, SIZES, TRAINED_LENGTH, VOCABULARY, config_of, tiny

TEXT = {
    **SIZES,
    **GROUPED,
    "head_dim": 8,
    "vocab_size": VOCABULARY + 2,
    "max_position_embeddings": TRAINED_LENGTH,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
IMAGE_TOKEN = VOCABULARY + 1

PARTS: dict[str, tuple[str, str]] = {
    "aria": ("aria_text", "idefics3_vision"),
    "aya_vision": ("cohere2", "siglip_vision_model"),
    "clip": ("clip_text_model", "clip_vision_model"),
    "cohere2_vision": ("cohere2", "siglip_vision_model"),
    "gemma3": ("gemma3_text", "siglip_vision_model"),
    "idefics3": ("llama", "idefics3_vision"),
    "internvl": ("qwen2", "internvl_vision"),
    "lfm2_vl": ("lfm2", "siglip2_vision_model"),
    "lighton_ocr": ("qwen3", "pixtral"),
    "llava": ("llama", "clip_vision_model"),
    "llava_next": ("llama", "clip_vision_model"),
    "llava_next_video": ("llama", "clip_vision_model"),
    "llava_onevision": ("qwen2", "siglip_vision_model"),
    "mistral3": ("mistral", "pixtral"),
    "modernvbert": ("modernbert", "siglip_vision_model"),
    "paligemma": ("gemma", "siglip_vision_model"),
    "qwen2_audio": ("qwen2", "qwen2_audio_encoder"),
    "siglip": ("siglip_text_model", "siglip_vision_model"),
    "smolvlm": ("llama", "smolvlm_vision"),
    "vipllava": ("llama", "clip_vision_model"),
    "voxtral": ("llama", "voxtral_encoder"),
}
"""The `model_type` of the text's and of the other part."""

OTHERS: dict[str, dict[str, Any]] = {"llava": {"image_token_index": IMAGE_TOKEN, "image_seq_length": 16}}
"""Further fields of a composite's configuration."""


def config_of_composite(name: str) -> Any:
    """Return the tiny configuration of a composite that is built of a text's and another part."""
    assert name in PARTS, f"give '{name}' a line in PARTS of tests/support/composites.py"
    text, other = PARTS[name]
    field = "audio_config" if name in ("qwen2_audio", "voxtral") else "vision_config"
    parts = {"text_config": {"model_type": text, **_known(text, TEXT)}, field: {"model_type": other, **_known(other, IMAGE)}}
    return AutoConfig.for_model(name, **parts, **OTHERS.get(name, {}))


def _known(model_type: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a configuration has."""
    known = AutoConfig.for_model(model_type)
    return {name: value for name, value in settings.items() if hasattr(known, name)}


def tiny_composite(name: str, head: str = "") -> PreTrainedModel:
    """Return a tiny model of a composite with random weights, in evaluation mode, whose positions show.

    Args:
        name: its `model_type`.
        head: the name of the class; the one that is for generating, or else the last, where it is left out.
    """
    torch.manual_seed(1)
    if name == "encoder-decoder":
        model: PreTrainedModel = EncoderDecoderModel(
            encoder=AutoModel.from_config(config_of("bert")), decoder=tiny("gpt2", add_cross_attention=True, is_decoder=True)
        )
    elif name == "vision-encoder-decoder":
        model = VisionEncoderDecoderModel(
            encoder=AutoModel.from_config(config_of("vit")), decoder=tiny("gpt2", add_cross_attention=True, is_decoder=True)
        )
    else:
        heads = {found.__name__: found for found in COMPOSITES[name].head_classes()}
        wanted = head or next((found for found in heads if found.endswith("ForConditionalGeneration")), list(heads)[-1])
        model = heads[wanted](config_of_composite(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
    if name.endswith("encoder-decoder"):
        model.config.decoder_start_token_id, model.config.pad_token_id = BOS, PAD
    return model.eval()
