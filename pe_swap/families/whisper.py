"""Whisper's decoder: a learned table, queries that come scaled. Its encoder has frames and no tokens, and is left out."""

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Table

register(
    "whisper",
    Stack(
        Table("decoder.embed_positions"),
        attention="decoder.layers.{layer}.self_attn",
        tokens="decoder.embed_tokens",
        is_causal=decoder,
        name="decoder",
        caller="decoder",
        query_is_scaled=True,
        length_field="max_target_positions",
        guard_field="max_target_positions",
        num_layers="decoder_layers",
        num_heads="decoder_attention_heads",
    ),
)
