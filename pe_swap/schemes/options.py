"""Options of schemes: frozen dataclasses, checked when built.

A check names the scheme, the option, the value, the rule and the way out. Upper bounds exist so that a hostile
`config.json` fails here and not in an allocation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pe_swap.errors import OptionError
from pe_swap.registry import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from pe_swap.schemes.base import Geometry

LARGEST_LENGTH = 2**24
"""Positions. Above it a table or an index of positions is refused: float32 stops telling integers apart here."""

NAMES_ELSEWHERE = {"rope_theta": "base", "partial_rotary_factor": "fraction", "type": "rope_type"}
"""Names in transformers' `rope_parameters` to those of options here: no spelling would lead from one to the other."""

OptionsType = TypeVar("OptionsType", bound="SchemeOptions")


@dataclass(frozen=True)
class SchemeOptions:
    """Base of every scheme's options. A field is an option; its default is the scheme's default.

    A subclass that checks its values calls `super().__post_init__()` first.

    Attributes:
        logit_scale: `"log_n"` multiplies each query by `max(1, log(n) / log(trained_length))`, `n` being how many keys it may look
            at, so that attention over more keys than in training stays as sharp; None leaves queries alone. Every scheme takes it.
    """

    scheme: ClassVar[str] = ""

    logit_scale: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the values that every scheme has."""
        self.require_choice("logit_scale", (None, "log_n"))

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> Self:
        """Return the options with every value that depends on the model written out.

        `None` or `"match"` become numbers here, so that a saved model needs nothing but its options to be rebuilt.

        Args:
            geometry: sizes of the model.
            position_table: the table being replaced, `[trained_length, hidden_size]`, or None where it is no longer at hand.

        Raises:
            OptionError: a value depends on a table that is no longer at hand, or does not fit the model.
        """
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values that JSON can hold; without `logit_scale` where there is none."""
        values = dataclasses.asdict(self)
        if self.logit_scale is None:
            del values["logit_scale"]
        return values

    def refuse(self, option: str, rule: str) -> OptionError:
        """Build the error for `option`, whose value breaks `rule`."""
        return OptionError(f"{self.scheme}: option '{option}' is {getattr(self, option)!r}; it must be {rule}.")

    def require_choice(self, option: str, choices: tuple[Any, ...]) -> None:
        """Refuse a value that is not one of `choices`."""
        value = getattr(self, option)
        if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
            listed = ", ".join(repr(choice) for choice in choices)
            near = did_you_mean(value, [choice for choice in choices if isinstance(choice, str)])
            raise OptionError(f"{self.scheme}: option '{option}' is {value!r}; it must be one of {listed}.{near}")

    def require_bool(self, option: str) -> None:
        """Refuse anything but True or False."""
        if not isinstance(getattr(self, option), bool):
            raise self.refuse(option, "True or False")

    def require_int(self, option: str, least: int, most: int, *, none_is: str | None = None) -> None:
        """Refuse what is not an integer from `least` to `most`; `none_is` says what None means where it is allowed."""
        value = getattr(self, option)
        if value is None and none_is is not None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refuse(option, f"an integer from {least:,} to {most:,}" + (f", or None ({none_is})" if none_is else ""))

    def require_number(self, option: str, above: float, most: float, *, or_text: tuple[str, ...] = ()) -> None:
        """Refuse what is not a finite number above `above` and at most `most`, or one of the words `or_text`."""
        value = getattr(self, option)
        if isinstance(value, str) and value in or_text:
            return
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not above < value <= most:  # which NaN is not, either
            words = "".join(f", or {word!r}" for word in or_text)
            raise self.refuse(option, f"a number above {above:g} and at most {most:g}{words}")


def build_options(options_class: type[OptionsType], values: Mapping[str, Any]) -> OptionsType:
    """Build `options_class` from plain values.

    Raises:
        OptionError: a name that is not an option (the text proposes the nearest), or a value that breaks its rule.
    """
    known = [option.name for option in sorted(dataclasses.fields(options_class), key=lambda option: option.kw_only is True)]
    for name in values:
        if name not in known:
            ours = NAMES_ELSEWHERE.get(name)
            hint = f" transformers' {name!r} is '{ours}' here." if ours in known else did_you_mean(name, known)
            raise OptionError(
                f"{options_class.scheme}: unknown option {name!r}.{hint} Options: {', '.join(known) if known else 'none'}."
            )
    return options_class(**values)
