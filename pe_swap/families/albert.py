"""ALBERT: BERT's table, and few attention modules that are each called for many layers: a scheme is per module."""

from typing import Any

from pe_swap.families.base import Stack, encoder, register
from pe_swap.families.native import Table


def shared_layers(config: Any) -> list[str]:
    """Return the paths of the attention modules: `layers=` of a swap counts them."""
    return [
        f"encoder.albert_layer_groups.{group}.albert_layers.{layer}.attention"
        for group in range(config.num_hidden_groups)
        for layer in range(config.inner_group_num)
    ]


register(
    "albert",
    Stack(
        Table("embeddings.position_embeddings"),
        attention="",
        layer_paths=shared_layers,
        tokens="embeddings.word_embeddings",
        is_causal=encoder,
        has_cache=False,
        fills_token_type_ids=True,
        input_size="embedding_size",
    ),
)
