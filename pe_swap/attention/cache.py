"""A view of the key-value cache that rotates keys as they are written.

The attention function runs after the cache update. Rotating the whole key buffer there would cost O(length) for every generated
token; rotated once on the way in, a step costs what it costs without rotation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from pe_swap.attention.binding import LayerBinding


def self_attention_cache(cache: Cache) -> Cache:
    """Return the part of a cache that self-attention uses."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class RotatingCache:
    """Stands for a cache during one call of one self-attention module; only `update` is different.

    Self-attention of the patched families calls nothing else. It is no `Cache` on purpose: everything that owns the real cache
    (`generate`, beam search, cropping) keeps dealing with the real one.
    """

    def __init__(self, cache: Cache, binding: LayerBinding, query_ids: Tensor) -> None:
        self.cache = cache
        self.binding = binding
        self.query_ids = query_ids

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Rotate the new keys, `[batch, heads, q_len, head_dim]`, then update the cache as it would itself."""
        ids = self.query_ids.to(key_states.device)
        rotated = self.binding.scheme.rotate(key_states, ids, role="key", layer=self.binding.layer)
        updated: tuple[Tensor, Tensor] = self.cache.update(rotated, value_states, layer_idx, *args, **kwargs)
        return updated
