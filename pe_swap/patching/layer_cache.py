"""A view of the key-value cache for one layer: it rotates keys as they are written, and writes what is carried beside them.

The attention function runs after the cache update. Rotating the whole key buffer there would cost O(length) for every generated
token; rotated once on the way in, a step costs what it costs without rotation. What a scheme carries for every token goes in as
extra channels of its key, so that whatever the owner of a cache does to keys (beam search, cropping, static buffers, another
device) it does to them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from pe_swap.attention.call import AttentionCall
from pe_swap.errors import FamilyError, SwapStateError

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What transformers calls the cache in a call of a model or of an attention module: from 5.24 on, and before."""

CACHE_LENGTH_ARGUMENTS = ("cache_length", "past_key_values_length")
"""What it calls the number of cached tokens where a module is handed that alone."""


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a module's `forward`, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def cache_argument(module: nn.Module, names: Sequence[str] = CACHE_ARGUMENTS) -> str:
    """Return the name under which a module's `forward` takes its cache, one of `names`.

    Raises:
        FamilyError: it takes none by a name that pe_swap knows. Guessing would be worse than failing: a cache that goes by another
            name is used by the module and never seen by the scheme, which then gives a new token the position of the first.
    """
    parameters = parameters_of(module)
    for name in names:
        if name in parameters:
            return name
    listed = ", ".join(f"'{name}'" for name in names)
    raise FamilyError(
        f"{type(module).__name__}.forward takes none of {listed}, by which pe_swap finds the cache of a call; it takes "
        f"{', '.join(parameters)}. Nothing was patched. This transformers version may have renamed it: update pe_swap, or use a "
        "version it was tested with."
    )


def self_attention_cache(cache: Cache) -> Cache:
    """Return the part of a cache that self-attention uses."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class LayerCache:
    """Stands for a cache during one call of one self-attention module; only `update` is different.

    Self-attention of the patched families calls nothing else. It is no `Cache` on purpose: everything that owns the real cache
    (`generate`, beam search, cropping) keeps dealing with the real one.

    Attributes:
        cache: the real cache.
        context: the call's scheme and positions.
        carried: what goes beside the new keys, `[batch, heads, q_len, channels]`, or None.
    """

    def __init__(self, cache: Cache, context: AttentionCall, carried: Tensor | None) -> None:
        self.cache = cache
        self.context = context
        self.carried = carried

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Rotate the new keys, `[batch, heads, q_len, head_dim]`, add carried channels, then update the cache as it would itself.

        Returns:
            All keys, `[batch, heads, kv_len, head_dim + channels]`, and all values. `AttentionCall.split` takes keys apart.

        Raises:
            SwapStateError: the cache holds keys without these channels.
        """
        if self.context.keys_are_rotated:
            key_states = self.context.rotated(key_states, "key")
        if self.carried is not None:
            key_states = torch.cat((key_states, self.carried.to(key_states.device, key_states.dtype)), dim=-1)
            self._refuse_narrow_keys(key_states.shape[-1], layer_idx)
        updated: tuple[Tensor, Tensor] = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def _refuse_narrow_keys(self, width: int, layer_idx: int) -> None:
        """Refuse a cache that another scheme filled, or that was allocated by the model's own sizes."""
        layers, context = self.cache.layers, self.context
        keys = layers[layer_idx].keys if layer_idx < len(layers) else None
        if keys is not None and keys.dim() == 4 and keys.shape[-1] != width:
            raise SwapStateError(
                f"Layer {context.layer}'s cache holds keys of {keys.shape[-1]} channels, but the scheme '{context.scheme.name}' needs "
                f"{width}: it keeps numbers of its own beside each key. The cache was filled under another scheme, or allocated ahead "
                "of time (early_initialization). Pass a new, empty cache."
            )
