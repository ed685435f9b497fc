"""Putting schemes into a model's modules, and taking them out. Used by a swap and by the loading of a swapped model."""

from __future__ import annotations

from typing import Any

from torch import nn

from pe_swap.families import Adapter
from pe_swap.patching.binding import LayerBinding
from pe_swap.patching.layer_cache import CACHE_ARGUMENTS, CACHE_LENGTH_ARGUMENTS, cache_argument, parameters_of
from pe_swap.patching.hooks import BINDING_ATTRIBUTE, add_pre_hook, hand_on_positions, remove_pre_hook
from pe_swap.patching.input_hook import INPUT_ATTRIBUTE, InputBinding, embed_positions
from pe_swap.attention.shared_in_call import bring_memo
from pe_swap.patching.holder import Original, Place, Positional, TokenTable
from pe_swap.schemes import Scheme
from pe_swap.assignment import Specification


def assemble(
    adapter: Adapter,
    base_model: nn.Module,
    config: Any,
    specification: Specification,
    schemes: list[Scheme],
    original: Original | None,
) -> Positional:
    """Return the module that will stand in the table's place, not yet attached.

    Raises:
        AdapterError: a module is not where the adapter says, or takes its cache by a name that pe_swap does not know.
    """
    owner, _, attribute = adapter.token_embedding.rpartition(".")
    adapter.find(base_model, adapter.token_embedding)
    for module in adapter.attention_modules(base_model, config):
        cache_argument(module)
    cache_argument(adapter.find(base_model, adapter.input_module), (*CACHE_ARGUMENTS, *CACHE_LENGTH_ARGUMENTS))
    tokens = TokenTable(adapter.find(base_model, owner), attribute)
    return Positional(schemes, specification.layers, specification.input, tokens, original)


def attach(adapter: Adapter, base_model: nn.Module, positional: Positional) -> None:
    """Put `positional` in the table's place and bind every layer that has a scheme."""
    base_model.set_submodule(adapter.position_embedding, positional)
    owner, _, attribute = adapter.position_embedding.rpartition(".")
    place = Place(adapter.find(base_model, owner), attribute)
    add_pre_hook(base_model, bring_memo)
    modules = adapter.attention_modules(base_model, base_model.config)
    for layer, (module, index) in enumerate(zip(modules, positional.scheme_of_layer, strict=True)):
        if index is None:
            continue
        binding = LayerBinding(place, index, layer, parameters_of(module), cache_argument(module))
        if binding.hooks:
            setattr(module, BINDING_ATTRIBUTE, binding)
            add_pre_hook(module, hand_on_positions)
    input_module = adapter.find(base_model, adapter.input_module)
    setattr(input_module, INPUT_ATTRIBUTE, InputBinding(place, input_module, adapter.fills_token_type_ids))
    add_pre_hook(input_module, embed_positions)


def detach(adapter: Adapter, base_model: nn.Module) -> None:
    """Undo `attach`, except for the table's place."""
    remove_pre_hook(base_model, bring_memo)
    input_module = adapter.find(base_model, adapter.input_module)
    remove_pre_hook(input_module, embed_positions)
    delattr(input_module, INPUT_ATTRIBUTE)
    for module in adapter.attention_modules(base_model, base_model.config):
        if hasattr(module, BINDING_ATTRIBUTE):
            remove_pre_hook(module, hand_on_positions)
            delattr(module, BINDING_ATTRIBUTE)
