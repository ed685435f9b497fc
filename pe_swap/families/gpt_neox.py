"""GPT-NeoX (Pythia): Llama's rotation, of a part of each head, under other names."""

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Rotary

register("gpt_neox", Stack(Rotary(), attention="layers.{layer}.attention", tokens="embed_in", is_causal=decoder))
