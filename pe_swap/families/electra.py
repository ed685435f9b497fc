"""ELECTRA: BERT's modules; tokens and positions may be narrower than the layers."""

from pe_swap.families.base import Stack, as_configured, register
from pe_swap.families.native import Table

register(
    "electra",
    Stack(
        Table("embeddings.position_embeddings"),
        attention="encoder.layer.{layer}.attention.self",
        tokens="embeddings.word_embeddings",
        is_causal=as_configured,
        fills_token_type_ids=True,
        input_size="embedding_size",
    ),
)
