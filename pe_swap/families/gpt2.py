"""GPT-2: a table `wpe` added to the tokens, causal self-attention; cross-attention is left alone."""

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Table

register("gpt2", Stack(Table("wpe"), attention="h.{layer}.attn", tokens="wte", is_causal=decoder))
