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
    "apertus", "arcee", "gemma", "gemma2", "gemma3_text", "gpt_oss", "granite", "llama", "ministral", "mistral", "mixtral", "nemotron",
    "olmo", "olmo2", "olmo3", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "stablelm", "starcoder2",
)  # fmt: skip
"""Families that differ in nothing that positions depend on."""

INTERLEAVED = ("cohere", "glm", "glm4", "helium")
"""Families whose rotation pairs neighbouring dimensions."""


def has_rope(config: Any, layer: int) -> bool:
    """Tell whether a SmolLM3 turns a layer."""
    return bool(config.no_rope_layers[layer])


def slides(config: Any, layer: int) -> bool:
    """Tell whether a Cohere 2 or EXAONE 4 turns a layer: the layers with a window, or all where it has none."""
    if config.model_type.endswith("exaone4") and config.sliding_window is None:
        return True
    return bool(config.layer_types[layer] == "sliding_attention")


for model_type in ALIKE:
    register(model_type, LLAMA)
for model_type in INTERLEAVED:
    register(model_type, replace(LLAMA, native=Rotary(layout="interleaved")))
register("smollm3", replace(LLAMA, native=Rotary(turns=has_rope)))
register("cohere2", replace(LLAMA, native=Rotary(layout="interleaved", turns=slides)))
register("exaone4", replace(LLAMA, native=Rotary(turns=slides)))
