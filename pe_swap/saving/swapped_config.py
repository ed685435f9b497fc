"""The configuration of a swapped model: what `config.json` says of its positions, and how it is read back.

A swapped model is an ordinary folder: safetensors, and a `config.json` whose `model_type` is `pe_swap_<family>` and whose
`pe_swap` holds schemes and options.

What must never happen is a model with random positions. A family's own class (`GPT2LMHeadModel.from_pretrained`) would build a
fresh table and only report it; so the saved length field is a sentence instead of a number, and building from it fails, with the
sentence in the error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pe_swap.assignment import FORMAT, checked_format, from_saved, short
from pe_swap.attention.backends import library_name, name_for
from pe_swap.errors import CheckpointError
from pe_swap.families import FAMILIES, Family, family_name
from pe_swap.patching.holder import SchemeHolder
from pe_swap.saving.auto_classes import LENGTH_SENTENCE, STUB, auto_map, stub_text, swapped_name
from pe_swap.saving.model_card import auto_class_of, update_model_card
from pe_swap.saving.peft import name_families
from pe_swap.schemes.options import LARGEST_LENGTH
from pe_swap.version import __version__

NO_LIMIT = 2**20
"""Positions: what length fields say for a scheme that never ends. Tools truncate and allocate by it, so it is no larger."""


class SwappedConfig:
    """What a swapped model's configuration does beyond its family's; mixed in before the family's class."""

    def describe(self: Any, holder: SchemeHolder, trained_length: int) -> None:
        """Write what the model is swapped to, the length it can take, and whether its attention is causal."""
        self.pe_swap = {
            "format": FORMAT,
            "version": __version__,
            "original_model_type": family_name(self.model_type),
            "trained_length": trained_length,
            "max_length": holder.max_length,
            "is_causal": self.family.is_causal(self),
            **holder.assignment(),
        }
        setattr(self, self.family.length_field, holder.max_length or NO_LIMIT)
        self._attn_implementation = self._attn_implementation

    def release(self: Any, length: int) -> None:
        """Turn into the family's own configuration again, with its own length."""
        implementation = library_name(self._attn_implementation)
        family = self.family
        del self.pe_swap
        self.__class__ = family.config_class
        setattr(self, family.length_field, length)
        self._attn_implementation = implementation

    @property
    def family(self: Any) -> Family:
        """The family's family."""
        return FAMILIES[family_name(type(self).model_type)]

    @property
    def _attn_implementation_internal(self: Any) -> str | None:
        """The implementation's name, ours where a scheme acts inside attention; transformers writes its own names here."""
        name: str | None = self.__dict__.get("_attn_implementation_internal")
        return name

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self: Any, name: str | None) -> None:
        saved = self.__dict__.get("pe_swap")
        if saved is not None:
            name = name_for(name, from_saved(saved, self.num_hidden_layers).attention_hooks())
        self.__dict__["_attn_implementation_internal"] = name

    @property
    def output_attentions(self: Any) -> bool | None:
        """Whether the model returns its attention probabilities; needs the implementation 'eager', as everywhere."""
        wanted: bool | None = self._output_attentions
        return wanted

    @output_attentions.setter
    def output_attentions(self: Any, value: bool | None) -> None:
        if value and self._attn_implementation is None:
            self._attn_implementation = "eager"
        self._output_attentions = value
        self.validate_output_attentions()

    def validate_output_attentions(self: Any) -> None:
        """Check that probabilities are asked of an implementation that has them."""
        implementation = library_name(self._attn_implementation)
        if self.output_attentions and implementation not in ("eager", None):
            raise ValueError(
                f"output_attentions=True needs the attention implementation 'eager', got '{implementation}'. "
                'Call model.set_attn_implementation("eager").'
            )

    @classmethod
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from the content of `config.json`; see the family's class.

        Raises:
            CheckpointError: what it says of positions cannot be read, was written by a newer pe_swap, or does not fit the model.
        """
        family = FAMILIES[family_name(cls.model_type)]
        if "pe_swap" not in config_dict:
            raise CheckpointError(
                f"config.json has the model_type '{cls.model_type}' but no 'pe_swap' object, which says what the positions were "
                "swapped to. Save the model again with save_pretrained."
            )
        saved = checked_format(config_dict["pe_swap"])
        limit = saved.get("max_length")
        if limit is not None and not _is_length(limit):
            raise CheckpointError(
                f"config.json: 'pe_swap.max_length' is {short(limit)}; it must be null or an integer from 1 to {LARGEST_LENGTH:,}."
            )
        trained_length_of(saved)
        config_dict = {**config_dict, _saved_field(cls, family): limit or NO_LIMIT}
        result = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        built = result[0] if isinstance(result, tuple) else result
        from_saved(saved, built.num_hidden_layers)
        _refuse_longer(family, built, limit)
        return result

    def to_dict(self: Any) -> dict[str, Any]:
        """Return all fields; see the family's class. PEFT asks for them to learn the `model_type`."""
        name_families()
        content: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return content

    def to_diff_dict(self: Any) -> dict[str, Any]:
        """Return what is written to `config.json`."""
        saved: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        if "pe_swap" not in saved:
            return saved
        saved[_saved_field(type(self), self.family)] = LENGTH_SENTENCE
        saved["architectures"] = [swapped_name(name) for name in saved.get("architectures") or []] or None
        saved["auto_map"] = auto_map(self.family)
        return saved

    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json`, the stub and the model card; see the family's class."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{STUB}.py").write_text(stub_text(self.family), encoding="utf-8")
        saved = self.to_diff_dict()
        update_model_card(folder, self.pe_swap, auto_class_of(saved["architectures"], saved["auto_map"]), {})
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]


def _refuse_longer(family: Family, config: Any, limit: int | None) -> None:
    """Refuse a length field, given beside a saved configuration, beyond where its positions end.

    Raises:
        CheckpointError: tools would read it, and send the model what it cannot take.
    """
    length = getattr(config, family.length_field)
    if limit is not None and isinstance(length, int) and length > limit:
        raise CheckpointError(
            f"{family.length_field} is given as {length:,}, but the positions of this swapped model end at {limit:,}. Load it without "
            f"the argument, and swap it to a scheme that goes on (learned with max_length={length}, rope, alibi, ...)."
        )


def _saved_field(config_class: Any, family: Family) -> str:
    """Return the length field's name in `config.json`: families map the standard name to their own."""
    name: str = config_class.attribute_map.get(family.length_field, family.length_field)
    return name


def trained_length_of(saved: Any) -> int:
    """Return the saved trained length.

    Raises:
        CheckpointError: it is not a positive integer.
    """
    length = saved.get("trained_length") if isinstance(saved, dict) else None
    if not _is_length(length):
        raise CheckpointError(
            f"config.json: 'pe_swap.trained_length' is {short(length)}; it must be an integer from 1 to {LARGEST_LENGTH:,}."
        )
    assert isinstance(length, int)
    return length


def _is_length(value: object) -> bool:
    """Tell whether a saved value is a number of positions."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_LENGTH
