"""GPT-J and CodeGen: a table of sines, then cosines, of a part of each head, in interleaved layout."""

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import SineTable

for model_type in ("gptj", "codegen"):
    # Before, each layer had a table of sines of its own.
    register(model_type, Stack(SineTable(), attention="h.{layer}.attn", tokens="wte", is_causal=decoder), since="5.24")
