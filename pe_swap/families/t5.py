"""T5 and mT5: a bias in buckets of each part's own, worked out in its first layer; scores are not scaled."""

from typing import Any

from pe_swap.families.base import Stack, decoder, encoder, register
from pe_swap.families.native import Bias


def has_decoder(config: Any) -> bool:
    """Tell whether a configuration is of the whole model."""
    return bool(config.is_encoder_decoder)


def stack(name: str, **settings: Any) -> Stack:
    """Return the description of the encoder or of the decoder.

    Both were trained at 512 tokens (Raffel et al., arXiv:1910.10683, section 3.1.2); no field of the configuration says so.
    """
    return Stack(
        Bias(name, f"{name}.block.0.layer.0.SelfAttention", length=512),
        attention=f"{name}.block.{{layer}}.layer.0.SelfAttention",
        tokens=f"{name}.embed_tokens",
        name=name,
        caller=name,
        length_field=None,
        guard_field="relative_attention_num_buckets",
        **settings,
    )


for model_type in ("t5", "mt5"):
    register(
        model_type,
        stack("encoder", is_causal=encoder, has_cache=False),
        stack("decoder", is_causal=decoder, num_layers="num_decoder_layers", applies=has_decoder),
    )
