"""A view of the key-value cache for one layer: keys are transformed as they are written, and what is carried goes beside them.

The attention function runs after the cache update. Transforming the whole key buffer there would cost O(length) for every generated
token; done once on the way in, a step costs what it costs without. What a scheme carries for every token goes in as
extra channels of its key, so that whatever the owner of a cache does to keys (beam search, cropping, static buffers, another
device) it does to them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, EncoderDecoderCache

from pe_swap.attention.call import AttentionCall, per_key_head
from pe_swap.errors import FamilyError, SwapStateError
from pe_swap.families.attention_modules.interface import CACHE_ARGUMENTS

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

    It is no `Cache` on purpose: everything that owns the real cache (`generate`, beam search, cropping) keeps dealing with the real one.

    Attributes:
        cache: the real cache, which answers everything else.
        call: the call's scheme and positions, and what goes beside its keys.
    """

    def __init__(self, cache: Cache, call: AttentionCall) -> None:
        self.cache = cache
        self.call = call

    def __getattr__(self, name: str) -> Any:
        """Return what the real cache has under a name."""
        if name in ("cache", "call"):  # a copy that has nothing yet
            raise AttributeError(name)
        return getattr(self.cache, name)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Transform the new keys, `[batch, key_heads, q_len, head_dim]`, add carried channels, then update the real cache.

        Returns:
            All keys, `[batch, key_heads, kv_len, width + groups * channels]`, and all values. `AttentionCall.split` takes keys apart.

        Raises:
            SwapStateError: the cache holds keys of another width, or would round what is carried.
        """
        if self.call.keys_are_transformed:
            key_states = self.call.transformed(key_states, "key")
        carried = self.call.carried
        if carried is not None:
            self._require_exact_keys(layer_idx)
            carried = per_key_head(carried.to(key_states.device, key_states.dtype), key_states.shape[1])
            key_states = torch.cat((key_states, carried), dim=-1)
        self._require_width(key_states.shape[-1], layer_idx)
        updated: tuple[Tensor, Tensor] = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def _require_width(self, width: int, layer_idx: int) -> None:
        """Refuse a cache that another scheme filled, or that was allocated by the model's own sizes."""
        layers, call = self.cache.layers, self.call
        keys = layers[layer_idx].keys if layer_idx < len(layers) else None
        if keys is not None and keys.dim() == 4 and keys.shape[-1] != width:
            raise SwapStateError(
                f"Layer {call.layer}'s cache holds keys of {keys.shape[-1]} channels, but the scheme '{call.scheme.name}' needs {width}. "
                "The cache was filled under another scheme, or allocated ahead of time (early_initialization, or prefill_chunk_size "
                "with a static cache): pass a new, empty cache, or a dynamic one."
            )

    def _require_exact_keys(self, layer_idx: int) -> None:
        """Refuse a cache that quantizes keys: it would round what is carried to a few bits, in groups that the width no longer fits."""
        layers, call = self.cache.layers, self.call
        if layer_idx < len(layers) and isinstance(layers[layer_idx], QUANTIZED_LAYER):
            raise SwapStateError(
                f"Layer {call.layer} carries the scheme '{call.scheme.name}', which keeps numbers of its own beside each key, and a "
                "quantized cache would round them. Use a cache that is not quantized, or another scheme."
            )


QUANTIZED_LAYER: type = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
"""What every quantized layer of a cache derives from, in this version of transformers."""
