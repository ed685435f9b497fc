"""What transformers' Auto classes need of a swapped family: which head is whose, and the stub of a saved folder.

A folder holds a stub, so that `trust_remote_code=True` finds the same classes as `import pe_swap` registers. Names of classes only:
the classes themselves are built in `class_names`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import auto_factory, configuration_auto, modeling_auto, tokenization_auto

from pe_swap.families import COMPOSITES, FAMILIES, SWAPPED_PREFIX, Composite, Family, described, family_name

CLASS_PREFIX = "PESwap"
"""What the name of a swapped form of a class starts with; the family's own name follows."""

CLASSES_MODULE = "pe_swap.saving.class_names"
"""The module that has every class of the swapped families as an attribute: stubs import from it, pickles name it."""

STUB = "modeling_pe_swap"
"""Module name of the stub in a saved folder."""

LENGTH_SENTENCE = (
    "The positions of this model were swapped by pe_swap. Run: pip install pe-swap; then import pe_swap and load it with an Auto "
    "class (AutoModelForCausalLM, ...), or with trust_remote_code=True."
)

MISSING_SENTENCE = "The positions of this model were swapped by pe_swap, which is not installed. Run: pip install pe-swap"
"""What the stub says where it finds no pe_swap."""


def swapped_name(name: str) -> str:
    """Return the name of the swapped form of a class."""
    return name if name.startswith(CLASS_PREFIX) else CLASS_PREFIX + name


def auto_classes() -> dict[str, Any]:
    """Return transformers' Auto model classes by name."""
    everything: dict[str, Any] = vars(modeling_auto)
    return {
        name: found
        for name, found in everything.items()
        if isinstance(found, type)
        and issubclass(found, auto_factory._BaseAutoModelClass)
        and getattr(found, "_model_mapping", None) is not None
    }


def heads_by_auto_class(family: Family | Composite) -> dict[str, Any]:
    """Return, for every Auto class that knows the family, the head it builds."""
    heads = {}
    for name, auto_class in auto_classes().items():
        if family.config_class in auto_class._model_mapping:
            found = auto_class._model_mapping[family.config_class]
            heads[name] = found[0] if isinstance(found, tuple) else found
    return heads


def auto_map(family: Family | Composite) -> dict[str, str]:
    """Return what tells `trust_remote_code=True` which class of the stub to use."""
    names = {name: swapped_name(head.__name__) for name, head in heads_by_auto_class(family).items()}
    return {
        auto_class: f"{STUB}.{name}"
        for auto_class, name in {"AutoConfig": swapped_name(family.config_class.__name__), **names}.items()
    }


def stub_text(family: Family | Composite) -> str:
    """Return the text of the stub: an import of pe_swap's own classes, and what to install."""
    names = sorted({reference.partition(".")[2] for reference in auto_map(family).values()})
    imported = "".join(f"        {name},\n" for name in names)
    return f'''"""{LENGTH_SENTENCE}"""

try:
    from {CLASSES_MODULE} import (  # noqa: F401
{imported}    )
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "pe_swap":
        raise
    raise ImportError("{MISSING_SENTENCE}") from error
'''


class _SwappedConfigs(dict[str, Any]):
    """The configurations registered with `AutoConfig`, and the swapped families', built when one is looked up.

    Attributes:
        build: from a family to its swapped configuration class.
    """

    def __init__(self, registered: dict[str, Any], build: Callable[[Family | Composite], Any]) -> None:
        super().__init__(registered)
        self.build = build

    def __contains__(self, model_type: object) -> bool:
        """Tell whether `model_type` is registered, or a swapped family's."""
        if super().__contains__(model_type):
            return True
        if not isinstance(model_type, str) or not model_type.startswith(SWAPPED_PREFIX):
            return False
        return family_name(model_type) in FAMILIES or family_name(model_type) in COMPOSITES

    def __missing__(self, model_type: str) -> Any:
        """Build the class of a swapped family."""
        if model_type not in self:
            raise KeyError(model_type)
        self[model_type] = self.build(described(model_type))
        return self[model_type]


def register_config_classes(build: Callable[[Family | Composite], Any]) -> None:
    """Tell `AutoConfig` of every swapped family, without a class of any: what it costs does not grow with the families.

    `AutoConfig.register` wants the class itself, so what it writes into is replaced by a dictionary that builds it.

    Args:
        build: from a family to its swapped configuration class.
    """
    mapping = configuration_auto.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _SwappedConfigs):
        mapping._extra_content = _SwappedConfigs(mapping._extra_content, build)


def register_heads(family: Family | Composite, config_class: Any, build: Callable[[Family | Composite, Any], Any]) -> None:
    """Tell the Auto classes of models and tokenizers of one swapped family, as their documentation has custom models do.

    Args:
        family: the family.
        config_class: its swapped configuration class.
        build: from a family and a head to the head's swapped class.
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    tokenizer = tokenization_auto.TOKENIZER_MAPPING.get(family.config_class, None)
    if tokenizer is not None:
        slow, fast = tokenizer if isinstance(tokenizer, tuple) else (None, tokenizer)
        AutoTokenizer.register(config_class, slow_tokenizer_class=slow, fast_tokenizer_class=fast, exist_ok=True)
    known = auto_classes()
    for name, head in heads_by_auto_class(family).items():
        known[name].register(config_class, build(family, head), exist_ok=True)


def register_conversions(own_name: str, swapped: str) -> None:
    """Give a swapped family, or one of its heads, the conversions of weights between file and model that its own has.

    transformers keys them on the `model_type` (experts of mixtral) or the class's name (the head of gpt_neox). Without them the weights
    would be written in one form and looked for in another.

    Args:
        own_name: the family's `model_type`, or a head's name.
        swapped: that of the swapped form.
    """
    conversions = get_checkpoint_conversion_mapping(own_name)
    if conversions is not None:
        register_checkpoint_conversion_mapping(swapped, conversions, overwrite=True)
