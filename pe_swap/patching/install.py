"""Putting schemes into a model's modules, and taking them out. Used by a swap and by the loading of a swapped model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pe_swap.assignment import Assignment
from pe_swap.attention.backends import BINDING_ATTRIBUTE
from pe_swap.attention.shared_in_call import start_sharing
from pe_swap.errors import SwapStateError
from pe_swap.families import Family, family_for
from pe_swap.patching.binding import LayerBinding
from pe_swap.patching.holder import HolderRef, Original, SchemeHolder, TokenTable
from pe_swap.patching.hooks import add_pre_hook, hand_on_positions, remove_pre_hook
from pe_swap.patching.input_hook import INPUT_ATTRIBUTE, InputBinding, embed_positions
from pe_swap.patching.layer_cache import CACHE_ARGUMENTS, CACHE_LENGTH_ARGUMENTS, cache_argument, parameters_of
from pe_swap.schemes import Scheme


def assemble(
    family: Family,
    base_model: nn.Module,
    config: Any,
    assignment: Assignment,
    schemes: list[Scheme],
    original: Original | None,
) -> SchemeHolder:
    """Return the module that will stand in the table's place, not yet attached.

    Raises:
        FamilyError: a module is not where the family says, or takes its cache by a name that pe_swap does not know.
    """
    owner, _, attribute = family.token_embedding.rpartition(".")
    family.find(base_model, family.token_embedding)
    for module in family.attention_modules(base_model, config):
        cache_argument(module)
    cache_argument(family.find(base_model, family.input_module), (*CACHE_ARGUMENTS, *CACHE_LENGTH_ARGUMENTS))
    tokens = TokenTable(family.find(base_model, owner), attribute)
    return SchemeHolder(schemes, assignment.layers, assignment.input, tokens, original)


def attach(family: Family, base_model: nn.Module, holder: SchemeHolder) -> None:
    """Put `positional` in the table's place and bind every layer that has a scheme."""
    base_model.set_submodule(family.position_embedding, holder)
    owner, _, attribute = family.position_embedding.rpartition(".")
    holder_ref = HolderRef(family.find(base_model, owner), attribute)
    add_pre_hook(base_model, start_sharing)
    modules = family.attention_modules(base_model, base_model.config)
    for layer, (module, index) in enumerate(zip(modules, holder.scheme_of_layer, strict=True)):
        if index is None:
            continue
        binding = LayerBinding(holder_ref, index, layer, parameters_of(module), cache_argument(module))
        if binding.hooks:
            setattr(module, BINDING_ATTRIBUTE, binding)
            add_pre_hook(module, hand_on_positions)
    input_module = family.find(base_model, family.input_module)
    setattr(input_module, INPUT_ATTRIBUTE, InputBinding(holder_ref, input_module, family.fills_token_type_ids))
    add_pre_hook(input_module, embed_positions)


def detach(family: Family, base_model: nn.Module) -> None:
    """Undo `attach`, except for the table's place."""
    remove_pre_hook(base_model, start_sharing)
    input_module = family.find(base_model, family.input_module)
    remove_pre_hook(input_module, embed_positions)
    delattr(input_module, INPUT_ATTRIBUTE)
    for module in family.attention_modules(base_model, base_model.config):
        if hasattr(module, BINDING_ATTRIBUTE):
            remove_pre_hook(module, hand_on_positions)
            delattr(module, BINDING_ATTRIBUTE)


def holder_of(model: PreTrainedModel) -> SchemeHolder | None:
    """Return the module that holds a model's schemes, or None where the model is not swapped."""
    family = family_for(model)
    found = family.find(model.base_model, family.position_embedding)
    says_swapped = getattr(model.config, "pe_swap", None) is not None
    head, base = type(model).__name__, type(model.base_model).__name__
    if isinstance(found, SchemeHolder) and not says_swapped:
        raise SwapStateError(
            f"This {head} holds a {base} that was swapped by itself, and its own configuration does not say so: saved, it would come "
            f"back with random positions. Call restore_positional on the {base}, then swap the {head}."
        )
    if says_swapped and not isinstance(found, SchemeHolder):
        raise SwapStateError(
            f"The configuration of this {head} says that it is swapped, but {base}.{family.position_embedding} is a "
            f"{type(found).__name__}: something else has replaced the module that holds its schemes. Undo that before a swap or a "
            "restore."
        )
    return found if isinstance(found, SchemeHolder) else None


def positional_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that a swap brought, with their names in `model`: those that start untrained."""
    holder = holder_of(model)
    ours = set() if holder is None else {id(parameter) for parameter in holder.parameters()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in ours]
