"""Composite models: one made of several whole models, each with a configuration of its own (LLaVA, CLIP, EncoderDecoderModel).

A composite has no positions itself. What is swapped is a model inside it, of a family; the composite's configuration then holds that
model's swapped configuration in place of its own. A composite is one line of data: where its parts are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from pe_swap.errors import UnsupportedModelError
from pe_swap.families.base import FAMILIES, SWAPPED_PREFIX, Family, family_name, require_family
from pe_swap.families.classes import composite_classes_of, config_class_of
from pe_swap.registry import Registry
from pe_swap.schemes.base import ATTENTION_HOOKS, Scheme

COMPOSITES: Registry[Composite] = Registry("composite model")


@dataclass(frozen=True)
class Part:
    """A model inside a composite.

    Attributes:
        name: its name (`part=` of a swap).
        field: the field of the composite's configuration that holds its configuration.
        path: where it is, relative to the composite's base model.
        is_default: a swap that names no part is for it.
        looks_both_ways: its causal attention looks both ways within what stands for an image.
    """

    name: str
    field: str
    path: str
    is_default: bool = True
    looks_both_ways: bool = False


@dataclass(frozen=True)
class Composite:
    """One `model_type` of transformers whose models are made of whole models.

    Attributes:
        model_type: the composite's `config.model_type`.
        parts: the models inside.
    """

    model_type: str
    parts: tuple[Part, ...]

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """The composite's configuration class."""
        return config_class_of(self.model_type)

    def head_classes(self) -> list[type[PreTrainedModel]]:
        """Return every model class of the composite that can be built. Imports its modeling file."""
        return list(composite_classes_of(self.model_type))

    def models_in(self, model: PreTrainedModel) -> dict[str, PreTrainedModel]:
        """Return the whole models that are inside a model of this composite, by the name of the part; a class may lack one."""
        found: dict[str, PreTrainedModel] = {}
        for part in self.parts:
            inside: Any = model.base_model
            for name in part.path.split("."):
                inside = getattr(inside, name, None)
            if isinstance(inside, PreTrainedModel):
                found[part.name] = inside
        return found

    def swapped_parts(self, config: Any) -> dict[str, Any]:
        """Return the configurations of the parts that are swapped, by the name of the part."""
        configs = {part.name: getattr(config, part.field, None) for part in self.parts}
        return {name: found for name, found in configs.items() if hasattr(found, "pe_swap")}

    def require_fits(self, name: str, scheme: Scheme) -> None:
        """Refuse a scheme whose scores are defined for earlier keys only where attention looks both ways within an image.

        Raises:
            UnsupportedModelError: it is one, in a part where attention does.
        """
        both_ways = any(part.looks_both_ways for part in self.parts if part.name == name)
        if both_ways and scheme.hooks & ATTENTION_HOOKS - {"transform_query_key", "query_scale"}:
            raise UnsupportedModelError(
                f"The scheme '{scheme.name}' of a decoder is defined for earlier keys only, and in a {self.model_type} the tokens of an "
                "image attend to later ones. Choose rope, hope, none, or a scheme on the input."
            )

    def chosen(self, model: PreTrainedModel, part: str | None) -> dict[str, PreTrainedModel]:
        """Return the models that a swap or a restore is for, by the name of the part.

        Raises:
            UnsupportedModelError: the composite has no such part, or the model there is of no known family.
        """
        inside = self.models_in(model)
        default = [found.name for found in self.parts if found.is_default and found.name in inside] or list(inside)
        names = default if part is None else [part]
        for name in names:
            if name not in inside:
                raise UnsupportedModelError(
                    f"part is {part!r}, and the parts of this {type(model).__name__} are {' and '.join(map(repr, inside))}. Leave it out "
                    f"(then it is {' and '.join(map(repr, default))}), or name one of them."
                )
            of_part = f"{type(inside[name]).__name__}, the {name} part of this {type(model).__name__}"
            require_family(family_name(inside[name].config.model_type), of_part)
        return {name: inside[name] for name in names}


def register_composites(model_types: Iterable[str], *parts: Part, since: str = "5.16") -> None:
    """File composites of one build under their `model_type`, where the installed transformers has them.

    Args:
        model_types: their `config.model_type`.
        parts: the models inside.
        since: the first version of transformers whose files are as the parts say.
    """
    for model_type in model_types:
        if model_type in CONFIG_MAPPING_NAMES and Version(transformers.__version__) >= Version(since):
            COMPOSITES.register(model_type)(Composite(model_type, parts))


def composite_of(model: object) -> Composite | None:
    """Return the composite that a model is of, or None where it is none."""
    name = family_name(model.config.model_type) if isinstance(model, PreTrainedModel) else ""
    if name not in COMPOSITES:
        return None
    return COMPOSITES[name]


def described(model_type: str) -> Family | Composite:
    """Return the family or the composite of a `model_type`, swapped or not.

    Raises:
        UnknownNameError: it is neither.
    """
    name = model_type.removeprefix(SWAPPED_PREFIX)
    return COMPOSITES[name] if name in COMPOSITES else FAMILIES[name]
