"""OPT: a table from row 2 on, position ids that count the mask, queries that come scaled."""

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Table
from pe_swap.families.native.table import two

register(
    "opt",
    Stack(
        Table("decoder.embed_positions", first_row=two),
        attention="decoder.layers.{layer}.self_attn",
        tokens="decoder.embed_tokens",
        is_causal=decoder,
        caller="decoder",
        counts="mask",
        query_is_scaled=True,
    ),
)
