"""BioGPT: a table from row 2 on."""

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Table
from pe_swap.families.native.table import two

register(
    "biogpt",
    Stack(
        Table("embed_positions", first_row=two),
        attention="layers.{layer}.self_attn",
        tokens="embed_tokens",
        is_causal=decoder,
    ),
)
