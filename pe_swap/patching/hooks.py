"""Forward pre-hooks: how positions reach an attention call without a copied `forward`.

They are module-level functions that read the module they sit on, so deep copies, pickling, threads and the recomputation of
gradient checkpointing all see the right scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from pe_swap.attention.backends import BINDING_ATTRIBUTE, autocasts, is_ours
from pe_swap.attention.call import AttentionCall, CallShared
from pe_swap.attention.kept_with_cache import kept_for
from pe_swap.attention.shared_in_call import ARGUMENT, NOTHING_SHARED, SharedInCall
from pe_swap.errors import UnsupportedBackendError
from pe_swap.patching.binding import LayerBinding
from pe_swap.patching.devices import on_device
from pe_swap.patching.layer_cache import CACHE_ARGUMENTS, LayerCache, self_attention_cache
from pe_swap.schemes.positions import slots_from

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def hand_on_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a self-attention module's call its scheme, its positions, what it carries, and its view of the cache.

    Raises:
        UnsupportedBackendError: the configuration was given an attention implementation behind pe_swap's back, which would drop
            the scheme in silence.
    """
    binding: LayerBinding = getattr(module, BINDING_ATTRIBUTE)
    kwargs = dict(kwargs)
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    if len(args) > 1:  # a caller's own; transformers names everything after the hidden states
        kwargs, args = {**dict(zip(binding.parameters[1:], args[1:], strict=False)), **kwargs}, args[:1]
    cache_argument = next((name for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), binding.cache_argument) or ""
    given = kwargs.get(cache_argument)
    cache = None if given is None else self_attention_cache(given)
    first_slot = 0 if cache is None else cache.get_seq_length(module.layer_idx)
    shared = kwargs.pop(ARGUMENT, NOTHING_SHARED)
    position_ids = kwargs.get("position_ids") if shared.position_ids is None else shared.position_ids
    call = scheme_call(module, binding, cache, first_slot, hidden_states, position_ids, shared)
    rotates_into_cache = cache is not None and "transform_query_key" in binding.hooks and call.scheme.caches_rotated_keys
    carried = (
        call.scheme.extra_key_channels(hidden_states, layer=binding.layer) if "extra_key_channels" in binding.hooks else None
    )
    attention_call = AttentionCall(
        binding.layer,
        binding.index,
        binding.hooks,
        binding.cache_argument,
        call,
        cache is not None,
        rotates_into_cache,
        carried if cache is None else None,
    )
    kwargs["attention_call"] = attention_call
    if cache is not None and (rotates_into_cache or carried is not None):
        kwargs[cache_argument] = LayerCache(cache, attention_call, carried)
    return args, kwargs


def scheme_call(
    module: Any,
    binding: LayerBinding,
    cache: Cache | None,
    first_slot: int | Tensor,
    hidden_states: Tensor,
    position_ids: Tensor | None,
    memo: SharedInCall,
) -> CallShared:
    """Return what the layers of a scheme share in a call of the model; worked out for the first of them.

    A generated token finds the processor's caches full of weights, so that each line run in every layer costs it four times what it
    costs in a loop of its own.

    Raises:
        UnsupportedBackendError: see `hand_on_positions`.
    """
    q_len, device, config = hidden_states.shape[1], hidden_states.device, module.config

    def work_out() -> CallShared:
        refuse_foreign_backend(binding, config._attn_implementation)
        slots = slots_from(first_slot, q_len, device)
        ids = slots[None, :] if position_ids is None else position_ids.to(device)
        scheme = on_device(binding.scheme, device)
        with torch.autocast(device.type, enabled=False) if autocasts(hidden_states) else nullcontext():
            rotation = scheme.prepare_positions(ids) if "transform_query_key" in binding.hooks else None
        return CallShared(scheme, slots, ids, rotation, memo, kept_for(cache, first_slot))

    if not isinstance(first_slot, int):  # a static cache counts in place, and will have counted these queries when attention runs
        return work_out()
    of = () if position_ids is None else (position_ids,)
    return memo.once((binding.index, first_slot, q_len, device, id(config)), of, work_out)


def refuse_foreign_backend(binding: LayerBinding, implementation: str) -> None:
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
