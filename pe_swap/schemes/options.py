"""Options of schemes: frozen dataclasses, checked when built.

Options as given may leave values to the model; `resolve` writes those out and returns another class, `Resolved...`, in which they are
plain values. A check names the scheme, the option, the value and the rule. Upper bounds exist so that a hostile `config.json` fails here
and not in an allocation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from pe_swap.errors import OptionError
from pe_swap.registry import did_you_mean
from pe_swap.schemes.geometry import Geometry, Native

LARGEST_LENGTH = 2**24
"""Positions. Above it a table or an index of positions is refused: float32 cannot hold larger integers exactly."""

LARGEST_TABLE = 2**16
"""Rows or columns of a table of numbers that a scheme trains."""

LARGEST_BASE = 1e12
"""Base of rotations and sinusoids."""

MATCH = "match"
"""The value of an option that a swap works out from the model."""

SPELT_BY_TRANSFORMERS = {"rope_theta": "base", "partial_rotary_factor": "fraction", "type": "rope_type"}
"""Names in transformers' `rope_parameters` to those of the same options here: both are taken."""

MEANT = {"theta": "base", "rotary_dim": "fraction", "rotary_pct": "fraction", "scaling_factor": "factor"}
"""Names that others use for an option, to that option: it is proposed, as values may differ in meaning."""

OptionsType = TypeVar("OptionsType", bound="SchemeOptions")


def native_or(otherwise: Any) -> dict[str, Any]:
    """Return the metadata of an option that takes the model's own value where it is left out (None), or `otherwise` if there is none."""
    return {"native_or": otherwise}


def none_is(meaning: str) -> dict[str, Any]:
    """Return the metadata of an option that may be None, with what None means."""
    return {"none_is": meaning}


def is_integer(value: object) -> bool:
    """Tell whether a value is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number; True and False are not."""
    if isinstance(value, float):
        return math.isfinite(value)
    return is_integer(value)


@dataclass(frozen=True)
class SchemeOptions:
    """Base of every scheme's options. A field is an option; its default is the scheme's default.

    A subclass that checks its values calls `super().__post_init__()` first.

    Attributes:
        logit_scale: `"log_n"` multiplies each query by `max(1, log(n) / log(trained_length))`, `n` being how many keys it may look
            at, so that attention over more keys than in training stays as sharp; None leaves queries alone. Every scheme takes it.
        sliding_window: how many tokens a query may look at: itself and the `sliding_window - 1` before it (in an encoder, as many after it
            too); None is no limit. Counted in slots, as transformers counts it. Every scheme takes it.
    """

    scheme: ClassVar[str] = ""

    logit_scale: str | None = field(default=None, kw_only=True)
    sliding_window: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the values that every scheme has."""
        self.require_choice("logit_scale", (None, "log_n"))
        if self.sliding_window is not None:
            self.require_int("sliding_window", 1, LARGEST_LENGTH)

    @property
    def unused_hooks(self) -> frozenset[str]:
        """Hooks of the scheme's class that these options turn off."""
        return frozenset()

    def resolve(self, geometry: Geometry, native: Native) -> SchemeOptions:
        """Return the options with every value that depends on the model written out, so that they rebuild the scheme alone.

        A scheme with such values has a second class for them: see `written_out`. Resolved options resolve to themselves.

        Args:
            geometry: sizes of the model.
            native: the model's own positions, which are the default of some options.

        Raises:
            OptionError: a value depends on what the model does not have, or does not fit the model.
        """
        return self

    def written_out(self, resolved: type[OptionsType], native: Native, **values: Any) -> OptionsType:
        """Return these options as `resolved`, a subclass whose fields are no longer None or `"match"`.

        Args:
            resolved: the class.
            native: the model's own positions: options with `native_or` take their values.
            values: what the other options get where they are None or `"match"`, and those with `native_or` where the model has no value.
        """
        out = {}
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value is None and "native_or" in option.metadata:
                value = native.options.get(option.name, values.get(option.name, option.metadata["native_or"]))
            elif option.name in values and (value is None or value == MATCH):
                value = values[option.name]
            out[option.name] = value
        return resolved(**out)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values that JSON can hold; without `logit_scale` and `sliding_window` where there is none."""
        values = dataclasses.asdict(self)
        for option in ("logit_scale", "sliding_window"):
            if values[option] is None:
                del values[option]
        return values

    def refuse(self, option: str, rule: str) -> OptionError:
        """Build the error for `option`, whose value breaks `rule`."""
        return OptionError(f"{self.scheme}: option '{option}' is {getattr(self, option)!r}; it must be {rule}.")

    def require_choice(self, option: str, choices: tuple[Any, ...]) -> None:
        """Refuse a value that is not one of `choices`."""
        value = getattr(self, option)
        if self._is_left_out(option) or any(
            value is choice or (type(value) is type(choice) and value == choice) for choice in choices
        ):
            return
        listed = ", ".join(repr(choice) for choice in choices)
        near = did_you_mean(value, [choice for choice in choices if isinstance(choice, str)])
        raise OptionError(f"{self.scheme}: option '{option}' is {value!r}; it must be one of {listed}.{near}")

    def require_bool(self, option: str) -> None:
        """Refuse anything but True or False."""
        if not isinstance(getattr(self, option), bool):
            raise self.refuse(option, "True or False")

    def require_int(self, option: str, least: int, most: int, *, or_text: tuple[str, ...] = ()) -> None:
        """Refuse what is not an integer from `least` to `most`, or one of the words `or_text`."""
        value = getattr(self, option)
        if self._is_left_out(option) or (isinstance(value, str) and value in or_text):
            return
        if not is_integer(value) or not least <= value <= most:
            raise self.refuse(option, f"an integer from {least:,} to {most:,}{self._or_else(option, or_text)}")

    def require_number(self, option: str, above: float, most: float, *, or_text: tuple[str, ...] = ()) -> None:
        """Refuse what is not a finite number above `above` and at most `most`, or one of the words `or_text`."""
        value = getattr(self, option)
        if self._is_left_out(option) or (isinstance(value, str) and value in or_text):
            return
        if not is_number(value) or not above < value <= most:
            raise self.refuse(option, f"a number above {above:g} and at most {most:g}{self._or_else(option, or_text)}")

    def _is_left_out(self, option: str) -> bool:
        """Tell whether an option is None and may be."""
        metadata = type(self).__dataclass_fields__[option].metadata
        return getattr(self, option) is None and ("native_or" in metadata or "none_is" in metadata)

    def _or_else(self, option: str, words: tuple[str, ...]) -> str:
        """Return the end of a rule that names the words, or the None, that are taken beside numbers."""
        meaning = type(self).__dataclass_fields__[option].metadata.get("none_is")
        return "".join(f", or {word!r}" for word in words) + (f", or None ({meaning})" if meaning else "")


def build_options(options_class: type[OptionsType], values: Mapping[str, Any]) -> OptionsType:
    """Build `options_class` from plain values.

    Names that transformers has in `rope_parameters` are taken too, so that `**config.rope_parameters` is.

    Raises:
        OptionError: a name that is not an option, an option in two spellings, or a value that breaks its rule.
    """
    known = [option.name for option in sorted(dataclasses.fields(options_class), key=lambda option: option.kw_only is True)]
    given: dict[str, Any] = {}
    for spelt, value in values.items():
        theirs = SPELT_BY_TRANSFORMERS.get(spelt)
        name = theirs if theirs in known else spelt
        if name not in known:
            meant = MEANT.get(name)
            hint = f" Did you mean '{meant}'?" if meant in known else did_you_mean(name, known)
            raise OptionError(f"{options_class.scheme}: unknown option {name!r}.{hint or ' Options: ' + ', '.join(known) + '.'}")
        if name in given:
            other = next(option for option, ours in SPELT_BY_TRANSFORMERS.items() if ours == name and option in values)
            raise OptionError(
                f"{options_class.scheme}: options '{name}' and '{other}' are both given, and they are one option. Leave one of them out."
            )
        given[name] = value
    return options_class(**given)
