"""Llama, and every family that is built as it is: one line for each.

They have `layers.N.self_attn`, a module `rotary_emb` that turns position ids into sines and cosines once per call, and `embed_tokens`.
What differs in tensors (key heads, width of a head, norms of queries and keys, windows, caps, sinks) is a fact of the call.
"""

from dataclasses import replace
from typing import Any

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Rotary

LLAMA = Stack(Rotary(), attention="layers.{layer}.self_attn", tokens="embed_tokens", is_causal=decoder)

ALIKE = (
    "apertus", "apertus1p5_text", "arcee", "aria_text", "bitnet", "cwm", "dots1", "flex_olmo", "gemma", "gemma2", "gemma3_text",
    "glm4_moe", "gpt_oss", "granite", "granite_docling_text", "granitemoe", "granitemoeshared", "hyperclovax", "jais2",
    "laguna", "llama", "mellum", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2",
    "olmo3", "olmoe", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "solar_open",
    "stablelm", "starcoder2", "vaultgemma",
)  # fmt: skip
"""Families that differ in nothing that positions depend on."""

INTERLEAVED = ("cohere", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium")
"""Families whose rotation pairs neighbouring dimensions."""


def has_rope(config: Any, layer: int) -> bool:
    """Tell whether a SmolLM3 turns a layer."""
    return bool(config.no_rope_layers[layer])


def slides(config: Any, layer: int) -> bool:
    """Tell whether a Cohere 2 or EXAONE 4 turns a layer: those with a window; an EXAONE without windows turns all."""
    if "exaone" in config.model_type and config.sliding_window is None:
        return True
    return bool(config.layer_types[layer] == "sliding_attention")


for model_type in ALIKE:
    register(model_type, LLAMA)
for model_type in INTERLEAVED:
    register(model_type, replace(LLAMA, native=Rotary(layout="interleaved")))
register("smollm3", replace(LLAMA, native=Rotary(turns=has_rope)))
for model_type in ("cohere2", "cohere2_moe"):
    register(model_type, replace(LLAMA, native=Rotary(layout="interleaved", turns=slides)))
for model_type in ("exaone4", "exaone_moe"):
    register(model_type, replace(LLAMA, native=Rotary(turns=slides)))
