"""EuroBERT and NomicBERT: encoders with Llama's rotation."""

from pe_swap.families.base import Stack, encoder, register
from pe_swap.families.native import Rotary

register(
    "eurobert",
    Stack(Rotary(), attention="layers.{layer}.self_attn", tokens="embed_tokens", is_causal=encoder, has_cache=False),
)
register(
    "nomic_bert",
    Stack(
        Rotary(), attention="layers.{layer}.self_attn", tokens="embeddings.word_embeddings", is_causal=encoder, has_cache=False
    ),
    since="5.24",  # in 5.16 token types end where the trained length ends
)
