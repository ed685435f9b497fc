"""Decoders that mix attention with layers of another sort (convolutions, state spaces, gated delta rules), which have no positions.

The stack is the layers with attention, in order, and `layers=` of a swap counts those. What the others know of order stays.
"""

from dataclasses import replace
from typing import Any

from pe_swap.families.base import register
from pe_swap.families.llama import LLAMA
from pe_swap.families.native import Rotary

ATTENTION = ("attention", "full_attention")


def with_attention(config: Any) -> list[str]:
    """Return the paths of the attention modules: not every layer has one."""
    return [f"layers.{layer}.self_attn" for layer, kind in enumerate(config.layer_types) if kind in ATTENTION]


def turns(config: Any) -> bool:
    """Tell whether a Granite's attention turns queries and keys; most of them have no positions."""
    return bool(config.position_embedding_type == "rope")


HYBRID = replace(LLAMA, layer_paths=with_attention)

for model_type in ("bamba", "lfm2", "qwen3_next"):
    register(model_type, HYBRID, since="5.24")
register("lfm2_moe", replace(HYBRID, native=Rotary("pos_emb")), since="5.24")
register("granitemoehybrid", replace(HYBRID, applies=turns), since="5.24")
register("falcon_h1", LLAMA, since="5.24")  # both in every layer
