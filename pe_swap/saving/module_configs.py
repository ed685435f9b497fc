"""The configurations that the modules of a model hold: what takes their place in a swap, and putting it there.

A module holds the model's configuration object, or one of its own; other models may hold the same object. So a swap changes none, and
gives the modules copies.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pe_swap.assignment import saved_stacks
from pe_swap.families import Composite, Family
from pe_swap.patching.holder import SchemeHolder
from pe_swap.saving.class_names import swapped_config_class
from pe_swap.saving.swapped_config import entry_of, set_class


def swapped_configs(
    family: Family, model: PreTrainedModel, holders: Mapping[str, SchemeHolder], lengths: Mapping[str, Any]
) -> list[tuple[Any, Any]]:
    """Return every configuration object that the model's modules have, each with a copy that says what the model is swapped to.

    Other models that share a configuration keep it. An encoder-decoder may have one object per stack. Arguments as `swapped_config`.
    """
    return [(config, swapped_config(family, config, holders, lengths)) for config in own_configs(model)]


def swapped_config(family: Family, config: Any, holders: Mapping[str, SchemeHolder], lengths: Mapping[str, Any]) -> Any:
    """Return a copy of a configuration, swapped or not, that says what its model is swapped to.

    Args:
        family: the family.
        config: the configuration as it is.
        holders: what holds the schemes of each swapped stack, by the stack's name.
        lengths: for stacks that are swapped now for the first time, what their length field said.
    """
    new = copy.deepcopy(config)
    before = saved_stacks(config.pe_swap) if getattr(config, "pe_swap", None) is not None else {}
    set_class(new, swapped_config_class(family))
    entries = {}
    for stack in family.stacks_of(config):
        if stack.name in holders:
            old = before.get(stack.name)
            length = lengths.get(stack.name) if old is None else old["length"]
            guarded = getattr(config, stack.guard_field) if old is None else old["guarded"]
            unswapped = config if not before else config.unswapped()
            entries[stack.name] = entry_of(holders[stack.name], stack, unswapped, length, guarded)
    new.describe(entries)
    return new


def composite_configs(composite: Composite, model: PreTrainedModel, configs: Mapping[int, Any]) -> dict[int, Any]:
    """Return, for every configuration object of a composite, a copy that holds the configurations that its parts will have.

    Args:
        composite: the composite.
        model: a model of it.
        configs: by the identity of a part's configuration, the one that takes its place.
    """
    parts = {name: configs.get(id(inside.config), inside.config) for name, inside in composite.models_in(model).items()}
    fields = {part.name: part.field for part in composite.parts}
    changed = {}
    for config in own_configs(model):
        new = copy.deepcopy(config)
        set_class(new, swapped_config_class(composite))
        for name, part in parts.items():
            setattr(new, fields[name], part)
        swapped = composite.swapped_parts(new)
        if swapped:
            new.describe(swapped)
        else:
            del new.pe_swap
            set_class(new, composite.config_class)
        changed[id(config)] = new
    return changed


def own_configs(model: PreTrainedModel) -> list[Any]:
    """Return the configuration objects of a model's modules, each once, that are of the model's own class."""
    inside_holders = {id(module) for module in kept_modules(model)}
    configs = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(config) is type(model.config) and id(module) not in inside_holders:
            configs[id(config)] = config
    return list(configs.values())


def kept_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules inside holders that keep the unswapped configuration, by which they work out their numbers."""
    holders = [module for module in model.modules() if isinstance(module, SchemeHolder)]
    return [module for holder in holders for module in holder.kept.modules()]


def set_configs(model: PreTrainedModel, configs: dict[int, Any]) -> None:
    """Give every module of the model the new configuration in place of the one it has."""
    inside_holders = {id(module) for module in kept_modules(model)}
    for module in model.modules():
        new = configs.get(id(getattr(module, "config", None)))
        if new is not None and id(module) not in inside_holders:
            module.config = new
