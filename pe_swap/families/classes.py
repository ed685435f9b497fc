"""The classes of a family, from its `model_type` by transformers' Auto mappings; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

from pe_swap.errors import FamilyError


@cache
def config_class_of(model_type: str) -> type[PreTrainedConfig]:
    """Return the configuration class of a `model_type`. Imports its file, and no model.

    Raises:
        FamilyError: this transformers has no such `model_type`.
    """
    if model_type not in configuration_auto.CONFIG_MAPPING_NAMES:
        raise FamilyError(
            f"transformers has no configuration class for the model_type '{model_type}'. Use a version of transformers that has it, "
            "or remove the family."
        )
    found: type[PreTrainedConfig] = configuration_auto.CONFIG_MAPPING[model_type]
    return found


@cache
def base_model_class_of(model_type: str) -> type[PreTrainedModel]:
    """Return the class of the base model, which `AutoModel` builds. Imports the family's modeling file.

    Raises:
        FamilyError: `AutoModel` has none for this `model_type`.
    """
    found: Any = modeling_auto.MODEL_MAPPING.get(config_class_of(model_type), None)
    if found is None:
        raise FamilyError(
            f"AutoModel has no class for the model_type '{model_type}'. A family needs a base model of transformers."
        )
    base_model: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return base_model


@cache
def pretrained_class_of(model_type: str) -> type[PreTrainedModel]:
    """Return the class that the base model and all heads of a family inherit from, for instance `BertPreTrainedModel`."""
    parents = [parent for parent in base_model_class_of(model_type).__mro__ if issubclass(parent, PreTrainedModel)]
    return parents[-2]  # the last is PreTrainedModel itself


@cache
def modeling_of(model_type: str) -> ModuleType:
    """Return the module that defines the base model; the head classes of the family are found in it."""
    return sys.modules[base_model_class_of(model_type).__module__]


@cache
def head_classes_of(model_type: str) -> tuple[type[PreTrainedModel], ...]:
    """Return every model class of a family that can be built, base model and heads, in the order of their file."""
    parent = pretrained_class_of(model_type)
    return tuple(
        found
        for found in vars(modeling_of(model_type)).values()
        if isinstance(found, type) and issubclass(found, parent) and getattr(found, "forward", None) is not nn.Module.forward
    )


@cache
def composite_classes_of(model_type: str) -> tuple[type[PreTrainedModel], ...]:
    """Return every model class that is built from the configuration of a composite, in the order of their file.

    The classes of its parts stand in the same file and have configurations of their own. Not every composite has a class of `AutoModel`.
    """
    config_class = config_class_of(model_type)
    modeling = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    return tuple(
        found
        for found in vars(modeling).values()
        if isinstance(found, type)
        and issubclass(found, PreTrainedModel)
        and getattr(found, "config_class", None) is config_class
        and getattr(found, "forward", None) is not nn.Module.forward
    )
