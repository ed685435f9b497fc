"""The classes of swapped models, generated from their family's, each under its name: `PESwapGPT2LMHeadModel`.

`model_type` is `pe_swap_<family>`. Pickles and the stub of a saved folder find the classes as attributes of this module.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers

from pe_swap.families import COMPOSITES, FAMILIES, SWAPPED_PREFIX, Composite, Family, described
from pe_swap.saving.auto_classes import CLASS_PREFIX, register_config_classes, register_conversions, register_heads, swapped_name
from pe_swap.saving.swapped_composite import SwappedComposite, SwappedCompositeConfig
from pe_swap.saving.swapped_config import SwappedConfig
from pe_swap.saving.swapped_model import SwappedModel


def register_auto_classes() -> None:
    """Tell transformers' Auto classes of every swapped family: of a configuration by its name, of the rest once it is built."""
    register_config_classes(swapped_config_class)


@cache
def swapped_config_class(family: Family | Composite) -> Any:
    """Return the configuration class of a swapped family. The first call registers the family's heads with the Auto classes."""
    config_class = _config_class(family)
    register_heads(family, config_class, _model_class)
    return config_class


def swapped_model_class(family: Family | Composite, head: Any) -> Any:
    """Return the class that a saved swapped model with this head is loaded into."""
    swapped_config_class(family)
    return _model_class(family, head)


@cache
def _config_class(family: Family | Composite) -> Any:
    """Return the configuration class of a swapped family, which no Auto class knows yet."""
    register_conversions(family.model_type, SWAPPED_PREFIX + family.model_type)
    return type(
        swapped_name(family.config_class.__name__),
        (SwappedCompositeConfig if isinstance(family, Composite) else SwappedConfig, family.config_class),
        {
            "__module__": __name__,
            "__doc__": f"Configuration of a swapped {family.model_type} model.",
            "model_type": SWAPPED_PREFIX + family.model_type,
        },
    )


@cache
def _model_class(family: Family | Composite, head: Any) -> Any:
    """Return the swapped form of a head, which no Auto class knows yet."""
    register_conversions(head.__name__, swapped_name(head.__name__))
    is_composite = isinstance(family, Composite)
    return type(
        swapped_name(head.__name__),
        (SwappedComposite if is_composite else SwappedModel, head),
        {
            "__module__": __name__,
            "__doc__": f"{head.__name__} with swapped positions.",
            "config_class": _config_class(family),
            **({"swapped_class": staticmethod(swapped_model_class)} if is_composite else {}),
        },
    )


def __getattr__(name: str) -> Any:
    """Return a generated class by name: pickles and stubs refer to classes as attributes of this module.

    transformers exports the family's own class and knows in which file it is, so that no other family's is imported. The heads that it
    does not export are looked for in every family.
    """
    own_name = name.removeprefix(CLASS_PREFIX)
    if own_name != name:
        own = getattr(transformers, own_name, None)
        model_type = str(getattr(getattr(own, "config_class", own), "model_type", None))
        everything = [*FAMILIES.names(), *COMPOSITES.names()]
        for family in map(described, [model_type] if model_type in everything else everything):
            if own_name == family.config_class.__name__:
                return swapped_config_class(family)
            heads: list[Any] = list(family.head_classes())
            for head in heads:
                if own_name == head.__name__:
                    return swapped_model_class(family, head)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
