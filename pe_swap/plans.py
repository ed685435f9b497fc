"""Which layers get which scheme: as a caller says it, and in named plans, as published models mix them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pe_swap.assignment import options_from
from pe_swap.errors import LayerError, OptionError
from pe_swap.registry import did_you_mean
from pe_swap.schemes import SCHEMES, Scheme, SchemeOptions, build_options

LAYERS_BY_NAME = ("every:N", "not every:N", "first_half", "second_half")
"""What `layers` may say in words: layers N - 1, 2 N - 1, ..., all others, and the halves, of which the first is the shorter one."""


@dataclass(frozen=True)
class Plan:
    """Schemes for groups of layers.

    Attributes:
        parts: a scheme's name and its layers, as `layers` says them in words; layers in no part keep what they have.
        windowed: the scheme whose option `sliding_window` the plan needs, or None.
        source: which models are built so, or which paper says it.
    """

    parts: tuple[tuple[str, str], ...]
    windowed: str | None
    source: str


PLANS: dict[str, Plan] = {
    "nope_every_4": Plan(
        (("none", "every:4"),), None, "SmolLM3; the layers of Llama 4. The other layers keep the model's own positions."
    ),
    "rope_local_nope_global": Plan(
        (("rope", "not every:4"), ("none", "every:4")),
        "rope",
        "Cohere 2, EXAONE 4; RNoPE (Yang et al., arXiv:2501.18795), SWAN (Puvvada et al., arXiv:2504.08719).",
    ),
}
"""By name."""


Part = tuple[SchemeOptions, Iterable[int] | str | None]
"""A scheme, and the layers that get it."""


def wanted_parts(
    scheme: str | SchemeOptions | Scheme | None, plan: str | None, layers: Any, options: Mapping[str, Any]
) -> list[Part]:
    """Return what a swap is asked for: one scheme, or those of a plan.

    Raises:
        OptionError: neither scheme nor plan, or both; layers beside a plan, which names them itself.
    """
    if plan is None:
        return [(options_from(scheme, options), layers)]
    if scheme is not None:
        raise OptionError(f"A swap takes a scheme or a plan, and got {scheme!r} and the plan '{plan}'. Leave one of them out.")
    if layers is not None:
        raise OptionError(f"layers is {layers!r} beside the plan '{plan}', which names the layers itself. Leave one of them out.")
    return [*parts_of(plan, options)]


def parts_of(plan: str, options: Mapping[str, Any]) -> list[tuple[SchemeOptions, str]]:
    """Return the options of each scheme of a plan, with its layers.

    Args:
        plan: a name in `PLANS`.
        options: what was given beside it: `sliding_window` for a plan with a window.

    Raises:
        OptionError: no such plan, or other options than it needs.
    """
    if plan not in PLANS:
        raise OptionError(f"plan is {plan!r}; it must be one of {', '.join(PLANS)}.{did_you_mean(plan, PLANS)}")
    found = PLANS[plan]
    wanted = {"sliding_window"} if found.windowed else set()
    if set(options) != wanted:
        needs = "needs sliding_window=, in tokens, and takes no other option" if wanted else "takes no options"
        given = f"it was given {', '.join(sorted(options))}" if options else "it was given none"
        raise OptionError(
            f"The plan '{plan}' {needs}; {given}. For anything else swap the groups of layers one by one (layers=...)."
        )
    return [
        (build_options(SCHEMES[scheme].Options, options if scheme == found.windowed else {}), layers)
        for scheme, layers in found.parts
    ]


def layers_from(layers: Iterable[int] | str, num_layers: int) -> Iterable[int]:
    """Return the layers that a caller named in words; integers are returned as they came.

    Raises:
        LayerError: other words than `LAYERS_BY_NAME`, or words that name no layer of the model.
    """
    if not isinstance(layers, str):
        return layers
    words, _, number = layers.partition(":")
    every = int(number) if number.isdecimal() else 0
    chosen: list[int] | None = None
    if words in ("every", "not every") and every > 0:
        chosen = [layer for layer in range(num_layers) if ((layer + 1) % every == 0) == (words == "every")]
    elif layers in ("first_half", "second_half"):
        half = num_layers // 2
        chosen = list(range(half) if layers == "first_half" else range(half, num_layers))
    if not chosen:
        rule = "it must name layers" if chosen is not None else f"in words it must be one of {', '.join(LAYERS_BY_NAME)}"
        raise LayerError(
            f"layers is {layers!r}, and the model has {num_layers} layers; {rule}. Give other words, or a list of indices."
        )
    return chosen
