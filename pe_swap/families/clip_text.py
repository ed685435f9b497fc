"""CLIP's text model: a table, causal attention, no cache."""

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Table

register(
    "clip_text_model",
    Stack(
        Table("embeddings.position_embedding"),
        attention="encoder.layers.{layer}.self_attn",
        tokens="embeddings.token_embedding",
        is_causal=decoder,
        has_cache=False,
    ),
    since="5.24",  # in 5.16 a head holds another base model
)
