"""GPTBigCode (StarCoder): GPT-2's table, one key head for all query heads; it allocates a mask of the square of its length field."""

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Table

register(
    "gpt_bigcode",
    Stack(Table("wpe"), attention="h.{layer}.attn", tokens="wte", is_causal=decoder, no_limit=2**13),
)
