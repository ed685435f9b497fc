"""DistilBERT: BERT's table without token types or a cache; position ids do not reach its layers."""

from pe_swap.families.base import Stack, encoder, register
from pe_swap.families.native import Table

register(
    "distilbert",
    Stack(
        Table("embeddings.position_embeddings"),
        attention="transformer.layer.{layer}.attention",
        tokens="embeddings.word_embeddings",
        is_causal=encoder,
        has_cache=False,
    ),
)
