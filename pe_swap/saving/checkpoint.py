"""How a swapped model is saved, and comes back through the Auto classes.

A swapped model is an ordinary folder: safetensors, and a `config.json` whose `model_type` is `pe_swap_<family>` and whose
`pe_swap` holds schemes and options. `import pe_swap` registers a configuration and model classes for every family. A folder also
holds a stub, so that `trust_remote_code=True` finds the same classes without the import.

What must never happen is a model with random positions. A family's own class (`GPT2LMHeadModel.from_pretrained`) would build a
fresh table and only report it; so the saved length field is a sentence instead of a number, and building from it fails, with the
sentence in the error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto import auto_factory, modeling_auto, tokenization_auto

from pe_swap.assignment import FORMAT, checked_format, from_saved, short
from pe_swap.attention.backends import library_name, name_for
from pe_swap.errors import CheckpointError
from pe_swap.families import FAMILIES, SWAPPED_PREFIX, Family, family_name, known_loss_type
from pe_swap.patching.holder import SchemeHolder
from pe_swap.patching.install import assemble, attach
from pe_swap.saving.model_card import auto_class_of, update_model_card
from pe_swap.saving.peft import name_families
from pe_swap.schemes.options import LARGEST_LENGTH
from pe_swap.version import __version__

NO_LIMIT = 2**20
"""Positions: what length fields say for a scheme that never ends. Tools truncate and allocate by it, so it is no larger."""

STUB = "modeling_pe_swap"
"""Module name of the stub in a saved folder."""

LENGTH_SENTENCE = (
    "The positions of this model were swapped by pe_swap. Run: pip install pe-swap; then import pe_swap and load it with an Auto "
    "class (AutoModelForCausalLM, ...), or with trust_remote_code=True."
)

MISSING_SENTENCE = "The positions of this model were swapped by pe_swap, which is not installed. Run: pip install pe-swap"
"""What the stub says where it finds no pe_swap."""


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
        _trained_length(saved)
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
        saved["architectures"] = [_swapped_name(name) for name in saved.get("architectures") or []] or None
        saved["auto_map"] = _auto_map(self.family)
        return saved

    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json`, the stub and the model card; see the family's class."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{STUB}.py").write_text(_stub(self.family), encoding="utf-8")
        saved = self.to_diff_dict()
        update_model_card(folder, self.pe_swap, auto_class_of(saved["architectures"], saved["auto_map"]), {})
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]


class SwappedModel:
    """What the classes of loaded swapped models do beyond their family's; mixed in before the family's class."""

    def __init__(self: Any, config: Any, *args: Any, beside_old_table: bool = False, **kwargs: Any) -> None:
        """Build the model around its schemes; the family's table is never built at its real size.

        Args:
            config: the swapped configuration.
            args: as the family's class.
            beside_old_table: the checkpoint still has the table's weight, so nothing may stand under its name; see
                `pe_swap.saving.relative_key_bert`.
            kwargs: as the family's class.
        """
        saved = getattr(config, "pe_swap", None)
        family = FAMILIES[family_name(type(config).model_type)]
        assignment = from_saved(saved, config.num_hidden_layers)
        geometry = family.geometry(config, _trained_length(saved))
        _refuse_other_causality(saved, geometry.is_causal)
        length = getattr(config, family.length_field)
        setattr(config, family.length_field, 1)
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            setattr(config, family.length_field, length)
        schemes = assignment.resolve(geometry, None).build(geometry)
        base_model = self.base_model
        holder = assemble(family, base_model, config, assignment, schemes, original=None)
        if beside_old_table:
            holder.weight = None
        attach(family, base_model, holder.to(holder.tokens.weight.dtype))
        self.loss_type = known_loss_type(self)

    @classmethod
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a saved swapped model; see the family's class.

        Raises:
            CheckpointError: positional weights are missing, superfluous or of another shape, or a file is damaged.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise CheckpointError(
                "use_safetensors is False, but swapped models are saved as safetensors only: pickled weights can run code. Leave the "
                "argument out."
            )
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                *args, output_loading_info=True, use_safetensors=True, **kwargs
            )
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights in '{args[0] if args else kwargs.get('pretrained_model_name_or_path')}' cannot be read: {error}. A file is "
                "damaged or was cut short; copy or download the folder again."
            ) from error
        except RuntimeError as error:
            # transformers reports the loading in a `finally`, and may raise there over the error that was on its way.
            if isinstance(error.__context__, CheckpointError):
                raise error.__context__ from None
            raise
        _refuse_wrong_weights(cls, "not in the checkpoint", info["missing_keys"])
        _refuse_wrong_weights(cls, "of another shape", [entry[0] for entry in info["mismatched_keys"]])
        _refuse_wrong_weights(cls, "not in the scheme", info["unexpected_keys"])
        return (model, info) if output_loading_info else model

    def _move_missing_keys_from_meta_to_device(self: Any, missing_keys: Iterable[str], *args: Any, **kwargs: Any) -> None:
        """Refuse missing positional weights before transformers allocates them at the size that `config.json` names.

        A method of transformers' own, called by its loading; without it the same refusal comes later, in `from_pretrained`.
        """
        _refuse_wrong_weights(type(self), "not in the checkpoint, or of another shape", missing_keys)
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)  # type: ignore[misc]


def _refuse_wrong_weights(model_class: Any, what: str, keys: Iterable[str]) -> None:
    """Refuse a checkpoint if any of `keys`, which are wrong in some way, is a positional weight.

    Raises:
        CheckpointError: one is.
    """
    path = FAMILIES[family_name(model_class.config_class.model_type)].position_embedding
    wrong = sorted(key for key in keys if f".{path}." in f".{key}.")
    if wrong:
        listed = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CheckpointError(
            f"The checkpoint's positional weights do not fit the scheme in its config.json ({what}: {listed}). Loading it would give a "
            "model with wrong positions. Save the model again with save_pretrained, or load the folder it was made from."
        )


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


def _refuse_other_causality(saved: Any, is_causal: bool) -> None:
    """Refuse a configuration whose attention looks where it did not at the swap: the same weights would mean other positions.

    Raises:
        CheckpointError: it does, or it is not said.
    """
    swapped_as = saved.get("is_causal")
    if not isinstance(swapped_as, bool):
        raise CheckpointError(f"config.json: 'pe_swap.is_causal' is {short(swapped_as)}; it must be true or false.")
    if swapped_as != is_causal:
        kinds = {True: "a decoder (causal attention)", False: "an encoder (two-sided attention)"}
        raise CheckpointError(
            f"This model was swapped as {kinds[swapped_as]} and is being built as {kinds[is_causal]}, where its positional weights would "
            "mean something else. Load it as it was saved; or build the other kind from the unswapped model, and swap that."
        )


CLASS_PREFIX = "PESwap"


def _swapped_name(name: str) -> str:
    """Return the name of the swapped form of a class."""
    return name if name.startswith(CLASS_PREFIX) else CLASS_PREFIX + name


def _saved_field(config_class: Any, family: Family) -> str:
    """Return the length field's name in `config.json`: families map the standard name to their own."""
    name: str = config_class.attribute_map.get(family.length_field, family.length_field)
    return name


def _trained_length(saved: Any) -> int:
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


@cache
def swapped_config_class(family: Family) -> Any:
    """Return the configuration class of a swapped family."""
    return type(
        _swapped_name(family.config_class.__name__),
        (SwappedConfig, family.config_class),
        {
            "__module__": __name__,
            "__doc__": f"Configuration of a swapped {family.model_type} model.",
            "model_type": SWAPPED_PREFIX + family.model_type,
        },
    )


@cache
def swapped_model_class(family: Family, head: Any) -> Any:
    """Return the class that a saved swapped model with this head is loaded into."""
    return type(
        _swapped_name(head.__name__),
        (SwappedModel, head),
        {
            "__module__": __name__,
            "__doc__": f"{head.__name__} with swapped positions.",
            "config_class": swapped_config_class(family),
        },
    )


def _auto_classes() -> dict[str, Any]:
    """Return transformers' Auto model classes by name."""
    everything: dict[str, Any] = vars(modeling_auto)
    return {
        name: found
        for name, found in everything.items()
        if isinstance(found, type)
        and issubclass(found, auto_factory._BaseAutoModelClass)
        and getattr(found, "_model_mapping", None) is not None
    }


def _heads_by_auto_class(family: Family) -> dict[str, Any]:
    """Return, for every Auto class that knows the family, the head it builds."""
    heads = {}
    for name, auto_class in _auto_classes().items():
        if family.config_class in auto_class._model_mapping:
            found = auto_class._model_mapping[family.config_class]
            heads[name] = found[0] if isinstance(found, tuple) else found
    return heads


def _auto_map(family: Family) -> dict[str, str]:
    """Return what tells `trust_remote_code=True` which class of the stub to use."""
    names = {name: _swapped_name(head.__name__) for name, head in _heads_by_auto_class(family).items()}
    return {
        auto_class: f"{STUB}.{name}"
        for auto_class, name in {"AutoConfig": _swapped_name(family.config_class.__name__), **names}.items()
    }


def _stub(family: Family) -> str:
    """Return the text of the stub: an import of pe_swap's own classes, and what to install."""
    names = sorted({reference.partition(".")[2] for reference in _auto_map(family).values()})
    imported = "".join(f"        {name},\n" for name in names)
    return f'''"""{LENGTH_SENTENCE}"""

try:
    from pe_swap.saving.checkpoint import (  # noqa: F401
{imported}    )
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "pe_swap":
        raise
    raise ImportError("{MISSING_SENTENCE}") from error
'''


def __getattr__(name: str) -> Any:
    """Return a generated class by name: pickles and stubs refer to classes as attributes of this module."""
    for family in map(FAMILIES.__getitem__, FAMILIES.names()):
        if name == _swapped_name(family.config_class.__name__):
            return swapped_config_class(family)
        heads: list[Any] = list(family.head_classes())
        for head in heads:
            if name == _swapped_name(head.__name__):
                return swapped_model_class(family, head)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def register_auto_classes() -> None:
    """Tell transformers' Auto classes of every swapped family, as their documentation has custom models do."""
    auto_classes = _auto_classes()
    for family in map(FAMILIES.__getitem__, FAMILIES.names()):
        heads = _heads_by_auto_class(family)
        config_class = swapped_config_class(family)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        tokenizer = tokenization_auto.TOKENIZER_MAPPING.get(family.config_class, None)
        if tokenizer is not None:
            slow, fast = tokenizer if isinstance(tokenizer, tuple) else (None, tokenizer)
            AutoTokenizer.register(config_class, slow_tokenizer_class=slow, fast_tokenizer_class=fast, exist_ok=True)
        for name, head in heads.items():
            auto_classes[name].register(config_class, swapped_model_class(family, head), exist_ok=True)


register_auto_classes()
