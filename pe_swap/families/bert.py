"""BERT: a table added to the tokens inside `embeddings`, two-sided self-attention, causal as a decoder."""

from pe_swap.families.base import Stack, as_configured, register
from pe_swap.families.native import Table

register(
    "bert",
    Stack(
        Table("embeddings.position_embeddings"),
        attention="encoder.layer.{layer}.attention.self",
        tokens="embeddings.word_embeddings",
        is_causal=as_configured,
        fills_token_type_ids=True,
    ),
)
