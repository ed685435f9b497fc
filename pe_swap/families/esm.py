"""ESM: a rotation (ESM-2), or RoBERTa's table (ESM-1b), under one name; queries come scaled."""

from typing import Any

from pe_swap.families.base import Stack, encoder, register
from pe_swap.families.native import Rotary, Table
from pe_swap.families.native.table import after_padding


def is_rotary(config: Any) -> bool:
    """Tell whether a configuration is of ESM-2."""
    return bool(config.position_embedding_type == "rotary")


def has_table(config: Any) -> bool:
    """Tell whether a configuration is of ESM-1b."""
    return not is_rotary(config)


register(
    "esm",
    Stack(
        Rotary("rotary_embeddings"),
        attention="encoder.layer.{layer}.attention.self",
        tokens="embeddings.word_embeddings",
        is_causal=encoder,
        has_cache=False,
        query_is_scaled=True,
        applies=is_rotary,
    ),
    Stack(
        Table("embeddings.position_embeddings", first_row=after_padding),
        attention="encoder.layer.{layer}.attention.self",
        tokens="embeddings.word_embeddings",
        is_causal=encoder,
        counts="tokens",
        first_id=after_padding,
        has_cache=False,
        query_is_scaled=True,
        applies=has_table,
    ),
)
