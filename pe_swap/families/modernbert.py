"""ModernBERT, as encoder and as decoder: a rotation for layers with a window and one for the others."""

from pe_swap.families.base import Stack, decoder, encoder, register
from pe_swap.families.native import Rotary

register(
    "modernbert",
    Stack(Rotary(), attention="layers.{layer}.attn", tokens="embeddings.tok_embeddings", is_causal=encoder, has_cache=False),
)
register(
    "modernbert-decoder",
    Stack(Rotary(), attention="layers.{layer}.attn", tokens="embeddings.tok_embeddings", is_causal=decoder),
)
