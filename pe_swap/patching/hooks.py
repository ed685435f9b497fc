"""Forward pre-hooks: how positions reach an attention call without a copied `forward`.

They are module-level functions that read the module they sit on, so deep copies, pickling, threads and the recomputation of
gradient checkpointing all see the right scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from pe_swap.attention.backends import autocasts
from pe_swap.attention.call import AttentionCall, CallShared
from pe_swap.attention.kept_with_cache import kept_for
from pe_swap.attention.names import BINDING_ATTRIBUTE, is_ours
from pe_swap.attention.one_query import bias_of_one_query
from pe_swap.attention.shared_in_call import ARGUMENT, NOTHING_SHARED, SharedInCall, as_rows
from pe_swap.errors import UnsupportedBackendError, UnsupportedModelError
from pe_swap.families.attention_modules.interface import CACHE_ARGUMENTS
from pe_swap.patching.binding import LayerBinding
from pe_swap.patching.devices import on_device
from pe_swap.patching.layer_cache import LayerCache, self_attention_cache
from pe_swap.schemes.base import Scheme
from pe_swap.schemes.positions import slots_from

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def hand_on_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a self-attention module's call its scheme, its positions, what it carries, and its view of the cache.

    Raises:
        UnsupportedBackendError: the configuration was given an attention implementation behind pe_swap's back, which would drop
            the scheme in silence; or the layer's keys are not its own.
    """
    binding: LayerBinding = getattr(module, BINDING_ATTRIBUTE)
    kwargs = dict(kwargs)
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    if len(args) > 1:  # a caller's own; transformers names everything after the hidden states
        kwargs, args = {**dict(zip(binding.parameters[1:], args[1:], strict=False)), **kwargs}, args[:1]
    cache_argument = binding.cache_argument
    if cache_argument is None or kwargs.get(cache_argument) is None:
        cache_argument = next((name for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), cache_argument)
    given = None if cache_argument is None else kwargs.get(cache_argument)
    cache = None if given is None else self_attention_cache(given)
    slots = CacheSlots() if cache is None else slots_in(cache, binding, hidden_states.shape[1])
    shared = kwargs.pop(ARGUMENT, NOTHING_SHARED)
    if binding.ids_from_mask and kwargs.get("attention_mask") is not None:
        kwargs["position_ids"] = ids_from_mask(kwargs["attention_mask"], slots, hidden_states.shape[1])
    call = shared_call(module, binding, cache, slots, hidden_states, kwargs.get("position_ids"), shared)
    transforms_into_cache = cache is not None and "transform_query_key" in binding.hooks and call.scheme.caches_rotated_keys
    carried = None
    if "extra_key_channels" in binding.hooks:
        carried = call.scheme.extra_key_channels(hidden_states, layer=binding.layer)
    attention_call = AttentionCall(
        binding.layer,
        binding.hooks,
        binding.cache_argument,
        call,
        cache is not None,
        slots.num_keys,
        transforms_into_cache,
        binding.query_is_scaled,
        carried,
        binding.native_bias_is_zero,
    )
    kwargs["attention_call"] = attention_call
    if cache is not None and (transforms_into_cache or carried is not None):
        assert cache_argument is not None
        kwargs[cache_argument] = LayerCache(cache, attention_call)
    return args, kwargs


class CacheSlots(NamedTuple):
    """Where the keys of a call stand, as the cache says before it takes them; the defaults are a call without a cache.

    Attributes:
        first_query: slot of the first query; a tensor where a static cache counts on its device.
        first_key: slot of the first key that the cache will return.
        num_keys: how many it will return, or None without a cache.
    """

    first_query: int | Tensor = 0
    first_key: int = 0
    num_keys: int | None = None


def ids_from_mask(mask: Tensor, slots: CacheSlots, q_len: int) -> Tensor:
    """Return the position ids of a call's queries, `[batch, q_len]`, int64: how many keys before theirs are not padding.

    Args:
        mask: `[batch, 1, q_len, kv_len]`; 0 or False where a query may look. Padding is what no query looks at.
        slots: where the keys of the call stand.
        q_len: number of queries.
    """
    is_real = (mask == 0).any(dim=-2)[:, 0].long()
    counted = (is_real.cumsum(-1) - 1).clamp(min=0)
    return counted.index_select(-1, slots_from(slots.first_query, q_len, mask.device))


def slots_in(cache: Cache, binding: LayerBinding, q_len: int) -> CacheSlots:
    """Return where a layer's keys stand in a cache, before its update.

    Raises:
        UnsupportedBackendError: the layer stores no keys of its own; or the cache has no layers, as that of continuous batching.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:  # pages that rows share: a key's place says nothing about its distance
        raise UnsupportedBackendError(
            f"Layer {binding.layer} carries the scheme '{binding.scheme.name}' inside attention, but its cache is a "
            f"{type(cache).__name__}, which does not say where the keys of a row stand (that of generate_batch, continuous batching, is "
            "one). Use model.generate, or a scheme that acts on the input."
        )
    layer: Any = layers[binding.cache_layer] if binding.cache_layer < len(layers) else None
    if type(layer) is DynamicLayer and type(cache) is DynamicCache:
        length = layer.get_seq_length()  # one function for the five behind the calls below, which say the same of such a cache
        return CacheSlots(length, 0, length + q_len)
    if layer is not None and not hasattr(layer, "get_seq_length"):
        raise UnsupportedBackendError(
            f"Layer {binding.layer} carries the scheme '{binding.scheme.name}', but stores no keys in the cache "
            f"({type(layer).__name__}): it reads those of another layer, whose positions pe_swap does not know. Swap "
            "only layers that store their keys (layers=[...]), or use_cache=False."
        )
    num_keys, first_key = cache.get_mask_sizes(q_len, binding.cache_layer)
    return CacheSlots(cache.get_seq_length(binding.cache_layer), first_key, num_keys)


def shared_call(
    module: Any,
    binding: LayerBinding,
    cache: Cache | None,
    slots: CacheSlots,
    hidden_states: Tensor,
    position_ids: Tensor | None,
    shared: SharedInCall,
) -> CallShared:
    """Return what the layers of a scheme share in a call of the model; computed for the first of them.

    In decoding, Python's overhead per layer is large: measured four times that of a loop that does nothing else.

    Raises:
        UnsupportedBackendError: see `hand_on_positions`.
    """
    q_len, device, config = hidden_states.shape[1], hidden_states.device, getattr(module, "config", None)
    position_ids = position_ids if shared.position_ids is None else shared.position_ids

    def compute() -> CallShared:
        if config is not None:
            require_our_backend(binding, config._attn_implementation)
        query_slots = slots_from(slots.first_query, q_len, device)
        ids = query_slots[None, :] if position_ids is None else as_rows(position_ids.to(device))
        scheme = on_device(binding.scheme, device)
        if shared.sides or scheme.geometry.sides:
            require_grid(scheme, ids, shared.sides, q_len)
        with torch.autocast(device.type, enabled=False) if autocasts(hidden_states) else nullcontext():
            rotation = prepared_for(scheme, ids, shared.sides) if "transform_query_key" in binding.hooks else None
        first_query = slots.first_query - slots.first_key if isinstance(slots.first_query, int) else None
        kept = kept_for(cache, slots.first_query)
        call = CallShared(
            scheme, binding.index, query_slots, ids, slots.first_key, first_query, rotation, shared, kept, shared.sides
        )
        bias = None
        if q_len == 1 and slots.num_keys is not None and not autocasts(hidden_states):  # biases are computed outside autocast
            bias = bias_of_one_query(call, binding.hooks, slots.num_keys, binding.layer)
        return call if bias is None else replace(call, bias_of_one_query=bias)

    if not isinstance(slots.first_query, int):  # a static cache counts in place, and will have counted these queries in attention
        return compute()
    inputs = () if position_ids is None else (position_ids,)
    key = (binding.index, slots.first_query, slots.first_key, cache is None, q_len, device, id(config))
    return shared.get(key, inputs, compute)


def prepared_for(scheme: Scheme, position_ids: Tensor, sides: tuple[int, ...]) -> Any:
    """Return what the scheme's `transform_query_key` needs of positions, in a row or on a grid."""
    return scheme.prepare_grid(position_ids, sides) if sides else scheme.prepare_positions(position_ids)


def require_grid(scheme: Scheme, position_ids: Tensor, sides: tuple[int, ...], q_len: int) -> None:
    """Refuse positions that are not those of the patches that a layer is called with.

    Raises:
        UnsupportedModelError: a layer is called by itself, or tokens were taken out or added on the way to it.
    """
    if len(sides) != len(scheme.geometry.sides):
        raise UnsupportedModelError(
            f"A layer with the scheme '{scheme.name}' was called without the rows and columns of its patches, which the whole model "
            "works out from the image. Call the whole model, not a layer of it."
        )
    if position_ids.shape[1] != q_len:
        raise UnsupportedModelError(
            f"A layer with the scheme '{scheme.name}' was called with {q_len} tokens, but the image has {position_ids.shape[1]}, those "
            "that stand nowhere included, so it is unknown where they stand. Undo what takes tokens out of this model or adds some."
        )


def require_our_backend(binding: LayerBinding, implementation: str) -> None:
    """Refuse an attention implementation that would drop the scheme.

    Raises:
        UnsupportedBackendError: see `hand_on_positions`.
    """
    if not is_ours(implementation):
        raise UnsupportedBackendError(
            f"Layer {binding.layer} carries the scheme '{binding.scheme.name}', but its attention implementation is "
            f"'{implementation}', which knows nothing of it and would drop it. "
            "Set implementations with model.set_attn_implementation(...)."
        )


def add_pre_hook(module: nn.Module, hook: PreHook) -> None:
    """Register `hook` on `module`, before hooks of others, so that they see what the module will see."""
    module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def remove_pre_hook(module: nn.Module, hook: PreHook) -> None:
    """Remove every registration of `hook` from `module`.

    By the function's identity and not by a handle: a deep copy of a model has hooks, but handles only to its original.
    """
    for key, registered in list(module._forward_pre_hooks.items()):
        if registered is hook:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
