"""BART, mBART, Pegasus, Marian: a table of each part's own, learned or of sines."""

from typing import Any

from pe_swap.families.base import Stack, decoder, encoder, register
from pe_swap.families.native import Table
from pe_swap.families.native.table import two, zero


def has_encoder(config: Any) -> bool:
    """Tell whether a configuration is of the whole model: a decoder alone says that it is no encoder-decoder."""
    return bool(config.is_encoder_decoder)


for model_type in ("bart", "mbart", "pegasus", "marian"):
    scaled_outside = "embed_scale" if model_type in ("pegasus", "marian") else None
    first_row = two if model_type in ("bart", "mbart") else zero
    register(
        model_type,
        Stack(
            Table("encoder.embed_positions", first_row=first_row),
            attention="encoder.layers.{layer}.self_attn",
            tokens="encoder.embed_tokens",
            is_causal=encoder,
            name="encoder",
            caller="encoder",
            has_cache=False,
            num_layers="encoder_layers",
            num_heads="encoder_attention_heads",
            token_scale=scaled_outside,
            applies=has_encoder,
        ),
        Stack(
            Table("decoder.embed_positions", first_row=first_row),
            attention="decoder.layers.{layer}.self_attn",
            tokens="decoder.embed_tokens",
            is_causal=decoder,
            name="decoder",
            caller="decoder",
            num_layers="decoder_layers",
            num_heads="decoder_attention_heads",
            token_scale=scaled_outside,
        ),
    )
