"""The configuration of a swapped model: what `config.json` says of its positions, and how it is read back.

A swapped model is an ordinary folder: safetensors, and a `config.json` whose `model_type` is `pe_swap_<family>` and whose
`pe_swap` holds schemes and options.

What must never happen is a model with random positions. A family's own class (`GPT2LMHeadModel.from_pretrained`) would build a
fresh table and only report it; so the saved length field is a sentence instead of a number, and building from it fails, with the
sentence in the error.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from pe_swap.assignment import FORMAT, checked_format, from_saved, saved_stacks, short
from pe_swap.attention.names import library_name, name_for
from pe_swap.errors import CheckpointError, SwapStateError
from pe_swap.families import FAMILIES, Stack, described, family_name
from pe_swap.families.native import Rotary
from pe_swap.families.native.rotary import NATIVE, UNTURNED
from pe_swap.patching.holder import SchemeHolder
from pe_swap.patching.install import attention_hooks
from pe_swap.saving.auto_classes import CLASS_PREFIX, LENGTH_SENTENCE, STUB, auto_map, stub_text, swapped_name
from pe_swap.saving.model_card import auto_class_of, update_model_card
from pe_swap.saving.peft import name_families
from pe_swap.schemes.base import ATTENTION_HOOKS
from pe_swap.schemes.options import LARGEST_LENGTH
from pe_swap.version import __version__


def set_class(config: Any, config_class: Any) -> None:
    """Make a configuration one of another class; one that was read from a folder has its `model_type` as a field too."""
    config.__class__ = config_class
    if "model_type" in vars(config):
        vars(config)["model_type"] = config_class.model_type


class SavedConfig:
    """What the configurations of swapped models and of swapped composites share: how they are written, and read back.

    A class that inherits from it has `plain`, `require_same_layers`, `said_in_card`, `from_dict` and `write_positions`.
    """

    @property
    def family(self: Any) -> Any:
        """The family or the composite that the configuration is of."""
        return described(type(self).model_type)

    @classmethod
    def from_pretrained(cls: Any, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Read a folder or a name on the Hub; see the family's class. An unswapped one gives the family's own configuration.

        Tools have the class of a model's configuration read the folder that the model came from: PEFT does, to save an adapter.
        """
        content, _ = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_unswapped(cls, content):
            return described(cls.model_type).config_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    def to_dict(self: Any) -> dict[str, Any]:
        """Return all fields; see the family's class. PEFT asks for them to learn the `model_type`."""
        name_families()
        content: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return content

    def to_diff_dict(self: Any) -> dict[str, Any]:
        """Return what is written to `config.json`: the library's own, where its class with other `rope_parameters` is this model."""
        plain = self.plain()
        if plain is not None:
            said: dict[str, Any] = plain.to_diff_dict()
            return said
        saved: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        if "pe_swap" in saved:
            self.write_positions(saved)
            saved["architectures"] = [swapped_name(name) for name in saved.get("architectures") or []] or None
            saved["auto_map"] = auto_map(self.family)
        return saved

    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json`, the model card, and the stub where a load needs pe_swap; see the family's class.

        Raises:
            SwapStateError: layers were taken out of the model or added to it since the swap, so that it could not be loaded.
        """
        if self.plain() is None:
            self.require_same_layers()
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        saved = self.to_diff_dict()
        if self.plain() is None:
            (folder / f"{STUB}.py").write_text(stub_text(self.family), encoding="utf-8")
            auto_class = auto_class_of(saved["architectures"], saved["auto_map"])
        else:
            auto_class = auto_class_of([], {})
        update_model_card(folder, self.said_in_card(), auto_class, {})
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]


class SwappedConfig(SavedConfig):
    """What a swapped model's configuration does beyond its family's; mixed in before the family's class."""

    def describe(self: Any, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what each swapped stack is swapped to, and the length that the model takes.

        Args:
            entries: what `entry_of` gave for each, by the stack's name.
        """
        alone = entries.get("")
        self.pe_swap = {
            "format": FORMAT,
            "version": __version__,
            "original_model_type": family_name(self.model_type),
            **(alone if alone is not None else {"stacks": dict(entries)}),
        }
        self._write_lengths()
        self._attn_implementation = self._attn_implementation

    def _write_lengths(self: Any) -> None:
        """Let length fields say what the swapped model takes; a field that a swapped and an unswapped stack share stays."""
        entries = saved_stacks(self.pe_swap)
        fields: dict[str, list[int]] = {}
        for stack in self.family.stacks_of(self):
            if stack.length_field is not None:
                entry = entries.get(stack.name)
                length = getattr(self, stack.length_field) if entry is None else entry["max_length"] or stack.no_limit
                fields.setdefault(stack.length_field, []).append(length)
        for field, lengths in fields.items():
            setattr(self, field, min(lengths))

    def unswapped(self: Any) -> Any:
        """Return a copy that is the family's own configuration again, with its own lengths."""
        config = copy.deepcopy(self)
        implementation = library_name(config._attn_implementation)
        for stack in self.family.stacks_of(self):
            entry = saved_stacks(self.pe_swap).get(stack.name)
            if entry is not None and stack.length_field is not None:
                setattr(config, stack.length_field, entry["length"])
        del config.pe_swap
        set_class(config, self.family.config_class)
        config._attn_implementation = implementation
        return config

    def plain(self: Any) -> Any:
        """Return the family's own configuration that is this model, or None where there is none; see `rope_parameters_of`."""
        entry = saved_stacks(self.pe_swap).get("") if "pe_swap" in self.__dict__ else None
        if entry is None or entry["rope_parameters"] is None:
            return None
        config = self.unswapped()
        config.rope_parameters = copy.deepcopy(entry["rope_parameters"])
        single = entry["rope_parameters"] if "rope_type" in entry["rope_parameters"] else {}
        trained = single.get("original_max_position_embeddings")
        if single.get("factor") is not None and single["rope_type"] != "proportional":
            length = int((trained or entry["trained_length"]) * single["factor"])
            config.max_position_embeddings = max(length, config.max_position_embeddings)
        config.architectures = [name.removeprefix(CLASS_PREFIX) for name in self.architectures or []] or None
        return config

    def said_in_card(self: Any) -> dict[str, Any]:
        """Return what the model card is written from."""
        said: dict[str, Any] = self.pe_swap
        return said

    def require_same_layers(self: Any) -> None:
        """Refuse a model whose layers are others than at the swap: nothing says which of them has which scheme.

        Raises:
            SwapStateError: layers were taken out of the model or added to it since the swap.
        """
        for stack in self.family.stacks_of(self):
            entry = saved_stacks(self.pe_swap).get(stack.name)
            now = len(stack.paths(self))
            if entry is not None and len(entry["layers"]) != now:
                raise SwapStateError(
                    f"This model was swapped with {len(entry['layers'])} layers and has {now} now, so nothing says which layer has which "
                    "scheme. Call swap_positional(model, ...) once more, for all layers."
                )

    @property
    def _attn_implementation_internal(self: Any) -> str | None:
        """The implementation's name, ours where a scheme acts inside attention; transformers writes its own names here."""
        name: str | None = self.__dict__.get("_attn_implementation_internal")
        return name

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self: Any, name: str | None) -> None:
        _require_swapped_class(sys._getframe(1))
        saved = self.__dict__.get("pe_swap")
        if saved is not None:
            hooks = (entry["attention_hooks"] for entry in saved_stacks(saved).values())
            by_library_name = BUILDING.get() and any(stack.attention_class for stack in self.family.stacks)
            # Such a family may choose the class of its attention modules by it (Falcon), until they are built. Not decided at a read:
            # a compiled call reads it, and the compiler knows no ContextVar.
            name = library_name(name) if by_library_name else name_for(name, frozenset[str]().union(*hooks))
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
        """Build from the content of `config.json`; see the family's class. An unswapped one gives the family's own configuration.

        Raises:
            CheckpointError: what it says of positions cannot be read, was written by a newer pe_swap, or does not fit the model or an
                argument.
        """
        family = FAMILIES[family_name(cls.model_type)]
        if is_unswapped(cls, config_dict):
            return family.config_class.from_dict(config_dict, **kwargs)
        if "pe_swap" not in config_dict:
            raise CheckpointError(
                f"config.json has the model_type '{cls.model_type}' but no 'pe_swap' object, which says what the positions were "
                "swapped to. Save the model again with save_pretrained."
            )
        saved = checked_format(config_dict["pe_swap"])
        lengths = {}
        for stack in family.stacks:
            entry = saved_stacks(saved).get(stack.name)
            if entry is not None:
                require_entry(entry)
                _require_argument_of_same_layers(cls, stack, entry, kwargs)
                if stack.length_field is not None:
                    lengths[_saved_field(cls, stack.length_field)] = entry["max_length"] or stack.no_limit
                guard = _saved_field(cls, stack.guard_field)
                lengths.setdefault(guard, entry["guarded"])
        result = super().from_dict({**config_dict, **lengths}, **kwargs)  # type: ignore[misc]
        built = result[0] if isinstance(result, tuple) else result
        for stack in family.stacks_of(built):
            entry = saved_stacks(saved).get(stack.name)
            if entry is not None:
                from_saved(entry, len(stack.paths(built)))
                if stack.length_field is not None:
                    _refuse_longer(stack.length_field, built, entry["max_length"])
        return result

    def write_positions(self: Any, saved: dict[str, Any]) -> None:
        """Write the sentence for the family's own class into what is saved."""
        for stack in self.family.stacks_of(self):
            if stack.name in saved_stacks(self.pe_swap):
                saved[_saved_field(type(self), stack.guard_field)] = LENGTH_SENTENCE


def entry_of(holder: SchemeHolder, stack: Stack, config: Any, length: Any, guarded: Any) -> dict[str, Any]:
    """Return what `config.json` says of a swapped stack.

    Args:
        holder: what holds its schemes.
        stack: the stack.
        config: the configuration.
        length: what its length field said before the swap.
        guarded: what the field said that the sentence for the family's own class is written into.
    """
    return {
        "trained_length": holder.trained_length,
        "max_length": holder.max_length,
        "length": length,
        "guarded": guarded,
        "is_causal": stack.is_causal(config),
        "attention_hooks": sorted(attention_hooks(holder)),
        "rope_parameters": rope_parameters_of(holder, config),
        **({} if holder.mean is None else {"keep_mean": True}),
        **holder.assignment.to_saved(),
    }


def rope_parameters_of(holder: SchemeHolder, config: Any) -> dict[str, Any] | None:
    """Return the `rope_parameters` with which the family's own class is this model, or None where no parameters say it.

    They do where every layer is handed a rotation of the family's own class, the same in all layers of a type.
    """
    native = holder.stack.native
    if not isinstance(native, Rotary) or None in holder.assignment.layers or UNTURNED in holder.handed:
        return None
    if any(scheme.hooks - {"transform_query_key"} for scheme in holder) or not isinstance(
        getattr(config, "rope_parameters", None), dict
    ):
        return None
    found: dict[str, Any] = {}
    layer_types = getattr(config, "layer_types", None) if "rope_type" not in (config.rope_parameters or {}) else None
    for layer, name in enumerate(holder.handed):
        assert name is not None
        options = holder.scheme_at(holder.assignment.layers[layer] or 0).options
        parameters = dict(native.parameters(config, layer)) if name == NATIVE else native.rope_parameters(options)
        if found.setdefault(layer_types[layer] if layer_types else "", parameters) != parameters:
            return None
    if set(found) == {""}:
        single: dict[str, Any] = found[""]
        return single
    needs_length = any(parameters["rope_type"] == "yarn" for parameters in found.values())
    # Before, transformers looks a yarn's trained length up beside the types of layers, where it is not, and reads no such folder.
    reads_it = bool(Version(transformers.__version__) >= Version("5.24"))
    return found if reads_it or not needs_length else None


def require_entry(entry: Mapping[str, Any]) -> None:
    """Refuse what `config.json` says of a stack where lengths, hooks or the mark of a kept mean are none.

    Raises:
        CheckpointError: they are not.
    """
    for name, may_be_null in (("trained_length", False), ("max_length", True), ("length", True)):
        value = entry.get(name)
        if not _is_length(value) and not (may_be_null and value is None and name in entry):
            rule = "null or an integer" if may_be_null else "an integer"
            raise CheckpointError(
                f"config.json: 'pe_swap.{name}' is {short(value)}; it must be {rule} from 1 to {LARGEST_LENGTH:,}. Save the model again "
                "with save_pretrained, or fix the file."
            )
    if not _is_integer(entry.get("guarded")):
        raise CheckpointError(
            f"config.json: 'pe_swap.guarded' is {short(entry.get('guarded'))}; it must be an integer. Save the model again with "
            "save_pretrained, or fix the file."
        )
    if entry.get("rope_parameters") is not None:  # such a model is saved as its family's own
        raise CheckpointError(
            f"config.json: 'pe_swap.rope_parameters' is {short(entry['rope_parameters'])}; it must be null. Save the model again with "
            "save_pretrained, or fix the file."
        )
    if entry.get("keep_mean", True) is not True:
        raise CheckpointError(
            f"config.json: 'pe_swap.keep_mean' is {short(entry['keep_mean'])}; it must be true or left out. Save the model again with "
            "save_pretrained, or fix the file."
        )
    hooks = entry.get("attention_hooks")
    if not isinstance(hooks, list) or not all(isinstance(hook, str) and hook in ATTENTION_HOOKS for hook in hooks):
        raise CheckpointError(
            f"config.json: 'pe_swap.attention_hooks' is {short(hooks)}; it must be a list of {', '.join(sorted(ATTENTION_HOOKS))}. Save "
            "the model again with save_pretrained, or fix the file."
        )


def is_unswapped(config_class: Any, content: Mapping[str, Any]) -> bool:
    """Tell whether the content of a `config.json` is that of a model which is not swapped."""
    return "pe_swap" not in content and content.get("model_type") != config_class.model_type


def _require_argument_of_same_layers(
    config_class: Any, stack: Stack, entry: Mapping[str, Any], arguments: Mapping[str, Any]
) -> None:
    """Refuse a number of layers, given beside a saved configuration, that is not the number it was swapped with.

    Raises:
        CheckpointError: it is another one.
    """
    layers = entry.get("layers")
    for name in (stack.num_layers, _saved_field(config_class, stack.num_layers)):
        if name in arguments and isinstance(layers, list) and arguments[name] != len(layers):
            raise CheckpointError(
                f"The argument {name}={short(arguments[name])} does not fit the saved model, whose {len(layers)} layers have schemes. "
                "Leave the argument out; for a model of fewer layers, load the unswapped model with them and swap that."
            )


BUILDING: ContextVar[bool] = ContextVar("BUILDING", default=False)
"""Whether a swapped model class is building its modules; the family's own classes may then use its configuration."""


def _require_swapped_class(caller: FrameType) -> None:
    """Refuse to let one of the family's own classes be built from a swapped configuration.

    `GPT2LMHeadModel(model.config)` would have a random table of as many rows as the length field says, and no scheme. All that
    transformers does with a configuration at that time is to write the attention implementation into it, so the code that writes it is
    looked at.

    There is no sounder place that is ours. The family's classes and `PreTrainedModel` belong to the library, and are not patched. The
    write alone does not tell: `set_attn_implementation` makes the same one on a model that is swapped, and nothing of the model is
    handed to the configuration. A swapped class (`SwappedModel`) says that it builds by `BUILDING`; the others say nothing, and they are
    what is to be refused. Where a later transformers writes the field elsewhere, this refuses nothing and the test of it fails.

    Raises:
        SwapStateError: `PreTrainedModel.__init__` writes it, outside of a swapped class.
    """
    while caller.f_code.co_name.endswith("setattr__") and caller.f_back is not None:
        caller = caller.f_back
    if caller.f_code is PreTrainedModel.__init__.__code__ and not BUILDING.get():
        name = type(caller.f_locals["self"]).__name__
        raise SwapStateError(
            f"{name}(config) was called with the configuration of a swapped model, which a {name} cannot be: it would get random or native "
            "positions and no scheme. Use an Auto class, for instance AutoModelForCausalLM.from_config(config)."
        )


def _refuse_longer(field: str, config: Any, limit: int | None) -> None:
    """Refuse a length field, given beside a saved configuration, beyond where its positions end.

    Raises:
        CheckpointError: tools would read it, and send the model what it cannot take.
    """
    length = getattr(config, field)
    if limit is not None and isinstance(length, int) and length > limit:
        raise CheckpointError(
            f"{field} is given as {length:,}, but the positions of this swapped model end at {limit:,}. Load it without the argument, and "
            f"swap it to a scheme that goes on (learned with max_length={length}, or one without a table)."
        )


def _saved_field(config_class: Any, field: str) -> str:
    """Return a field's name in `config.json`: families map the standard name to their own."""
    name: str = config_class.attribute_map.get(field, field)
    return name


def _is_integer(value: object) -> bool:
    """Tell whether a saved value is an integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_length(value: object) -> bool:
    """Tell whether a saved value is a number of positions."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_LENGTH
