"""A composite model with a swapped part: its configuration, and the class that it is loaded into.

The part's swapped configuration stands in the composite's, in the field where its own stood, and says all of its positions. The
composite's own `pe_swap` says which parts those are. Its `model_type` is `pe_swap_<composite>`, so that no class of transformers
builds one whose part would have random positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pe_swap.assignment import FORMAT, saved_stacks, short
from pe_swap.errors import CheckpointError
from pe_swap.families import FAMILIES, SWAPPED_PREFIX, Composite, Family, described, family_name, known_loss_type
from pe_swap.saving.auto_classes import CLASS_PREFIX
from pe_swap.saving.swapped_config import SavedConfig, is_unswapped, set_class
from pe_swap.saving.swapped_model import LoadedModel
from pe_swap.version import __version__


class SwappedCompositeConfig(SavedConfig):
    """What a swapped composite's configuration does beyond its own class; mixed in before that class."""

    def describe(self: Any, parts: Mapping[str, Any]) -> None:
        """Write which parts are swapped.

        Args:
            parts: the configurations of the swapped parts, by the name of the part. They are shared with the models inside.
        """
        fields = {part.name: part.field for part in self.family.parts}
        for name, config in parts.items():
            setattr(self, fields[name], config)
        self.pe_swap = {
            "format": FORMAT,
            "version": __version__,
            "original_model_type": family_name(self.model_type),
            "parts": sorted(parts),
        }

    def unswapped(self: Any) -> Any:
        """Return a copy that is of the composite's own class again, and so are its parts."""
        return self._with_parts({name: config.unswapped() for name, config in self.family.swapped_parts(self).items()})

    def plain(self: Any) -> Any:
        """Return the composite's own configuration that is this model, or None where a part has none; see `SwappedConfig.plain`."""
        parts = {name: config.plain() for name, config in self.family.swapped_parts(self).items()}
        if not parts or None in parts.values():
            return None
        config = self._with_parts(parts)
        config.architectures = [name.removeprefix(CLASS_PREFIX) for name in self.architectures or []] or None
        return config

    def _with_parts(self: Any, parts: Mapping[str, Any]) -> Any:
        """Return a copy of the composite's own class, with these configurations of its parts."""
        config = copy.deepcopy(self)
        for part in self.family.parts:
            if part.name in parts:
                setattr(config, part.field, parts[part.name])
        del config.pe_swap
        set_class(config, self.family.config_class)
        return config

    def require_same_layers(self: Any) -> None:
        """Refuse parts whose layers are others than at the swap; see `SwappedConfig.require_same_layers`."""
        for config in self.family.swapped_parts(self).values():
            config.require_same_layers()

    def said_in_card(self: Any) -> dict[str, Any]:
        """Return what the model card is written from: the stacks of all parts."""
        parts = self.family.swapped_parts(self)
        stacks = {
            f"{name} {stack}".strip(): entry
            for name, config in parts.items()
            for stack, entry in saved_stacks(config.pe_swap).items()
        }
        return {**self.pe_swap, "stacks": stacks}

    @classmethod
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from the content of `config.json`; see the composite's class. An unswapped one gives the composite's own configuration.

        Raises:
            CheckpointError: what it says of its parts cannot be read, or what a part says of its positions.
        """
        composite: Composite = described(cls.model_type)  # type: ignore[assignment]
        if is_unswapped(cls, config_dict):
            return composite.config_class.from_dict(config_dict, **kwargs)
        saved = config_dict.get("pe_swap")
        named = saved.get("parts") if isinstance(saved, dict) else None
        fields = {part.name: part.field for part in composite.parts}
        if not isinstance(named, list) or not named or not all(isinstance(name, str) and name in fields for name in named):
            raise CheckpointError(
                f"config.json has the model_type '{cls.model_type}', and 'pe_swap.parts' is {short(named)}; it must be a list of its "
                f"swapped parts ({', '.join(fields)}). Save the model again with save_pretrained."
            )
        parts = {}
        for name in named:
            content = config_dict.get(fields[name])
            model_type = content.get("model_type") if isinstance(content, dict) else None
            if not isinstance(model_type, str) or not model_type.startswith(SWAPPED_PREFIX) or model_type not in CONFIG_MAPPING:
                raise CheckpointError(
                    f"config.json: 'pe_swap.parts' says that '{fields[name]}' is swapped, and its model_type is {short(model_type)}; it "
                    f"must be '{SWAPPED_PREFIX}<family>'. Save the model again with save_pretrained."
                )
            parts[fields[name]] = CONFIG_MAPPING[model_type].from_dict(content)
        return super().from_dict({**config_dict, **parts}, **kwargs)  # type: ignore[misc]

    def write_positions(self: Any, saved: dict[str, Any]) -> None:
        """Write what the parts write of themselves, each with its sentence, into what is saved, and which of them are swapped."""
        fields = {part.name: part.field for part in self.family.parts}
        parts = self.family.swapped_parts(self)
        for name, config in parts.items():
            content = config.to_diff_dict()
            saved[fields[name]] = {key: value for key, value in content.items() if key not in ("architectures", "auto_map")}
        saved["pe_swap"] = {**self.pe_swap, "parts": sorted(name for name, config in parts.items() if config.plain() is None)}


class SwappedComposite(LoadedModel):
    """What the classes of loaded swapped composites do beyond their own; mixed in before the composite's class.

    Attributes:
        swapped_class: from a family and a class of it to the class's swapped form; `class_names` sets it.
    """

    swapped_class: Callable[[Family, Any], Any]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the composite as it is unswapped, then put the swapped models in the places of their own.

        Args:
            config: the swapped composite's configuration.
            args: as the composite's class.
            kwargs: as the composite's class.
        """
        composite: Composite = config.family
        parts = composite.swapped_parts(config)
        fields = {part.name: part for part in composite.parts}
        with _unswapped_parts(config, parts):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for name, plain in composite.models_in(self).items():
            if name in parts:
                family = FAMILIES[family_name(parts[name].model_type)]
                swapped = self.swapped_class(family, type(plain))._from_config(parts[name])
                self.base_model.set_submodule(fields[name].path, swapped)
        self.tie_weights()  # a head is tied to the embeddings of the model that has just gone
        self.loss_type = known_loss_type(self)


@contextmanager
def _unswapped_parts(config: Any, parts: Mapping[str, Any]) -> Iterator[None]:
    """Let a configuration hold its parts' unswapped configurations, for as long as the composite's own class builds from it."""
    fields = {part.name: part.field for part in config.family.parts}
    for name, part in parts.items():
        setattr(config, fields[name], part.unswapped())
    try:
        yield
    finally:
        for name, part in parts.items():
            setattr(config, fields[name], part)
