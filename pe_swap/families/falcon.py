"""Falcon with a rotation; attention is written out by hand. With ALiBi its bias is inside the mask that all layers share: no stack."""

from typing import Any

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Rotary


def has_rotation(config: Any) -> bool:
    """Tell whether a configuration is of a Falcon without ALiBi."""
    return not config.alibi


register(
    "falcon",
    Stack(
        Rotary(),
        attention="h.{layer}.self_attention",
        tokens="word_embeddings",
        is_causal=decoder,
        applies=has_rotation,
        attention_class="falcon:FalconAttention",
    ),
)
