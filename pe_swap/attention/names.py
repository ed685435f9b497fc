"""The names that attention functions are registered under, and which hooks of a scheme each can honour.

A name of ours stands for one of transformers' implementations with the scheme applied around it or inside it.
"""

from __future__ import annotations

from collections.abc import Iterable

from pe_swap.errors import UnsupportedBackendError
from pe_swap.schemes.base import ATTENTION_HOOKS

OUR_NAMES = {
    "eager": "pe_swap_eager",
    "sdpa": "pe_swap_sdpa",
    "flex_attention": "pe_swap_flex",
    "flash_attention_2": "pe_swap_fa2",
    "flash_attention_3": "pe_swap_fa3",
    "flash_attention_4": "pe_swap_fa4",
}
"""transformers' name to ours. Ours must not contain 'flash' or 'flex_attention': transformers would try to import a kernel by it."""

LIBRARY_NAMES = {ours: library for library, ours in OUR_NAMES.items()}

HOOKS_OF: dict[str, frozenset[str]] = {
    **dict.fromkeys(OUR_NAMES, frozenset({"transform_query_key"})),
    "eager": ATTENTION_HOOKS,
    "sdpa": ATTENTION_HOOKS,
    "flex_attention": frozenset({"transform_query_key", "relative_bias"}),
}
"""The hooks that each implementation can honour."""

BINDING_ATTRIBUTE = "pe_swap_binding"
"""Where an attention module with a scheme keeps what ties it to the scheme."""

BARE_HOOKS = frozenset({"transform_query_key", "query_scale"})
"""Hooks after which the scores are the products of queries and keys and nothing else."""

RELATIVE_HOOKS = BARE_HOOKS | {"relative_bias"}
"""Hooks that add only what depends on a distance."""


def is_ours(implementation: str | None) -> bool:
    """Tell whether an attention implementation is one of ours."""
    return implementation in LIBRARY_NAMES


def library_name(implementation: str | None) -> str | None:
    """Return transformers' name of an implementation, ours or not."""
    return LIBRARY_NAMES.get(implementation, implementation) if implementation is not None else None


def name_for(implementation: str | None, hooks: Iterable[str]) -> str | None:
    """Return the name to run `implementation` under, given the attention hooks of every layer's scheme together.

    A model whose schemes act on the input alone keeps transformers' own implementation.

    Raises:
        UnsupportedBackendError: the implementation cannot honour a hook.
    """
    requested = library_name(implementation)
    hooks = frozenset(hooks)
    if not hooks or requested is None:
        return requested
    lacking = hooks - HOOKS_OF.get(requested, frozenset())
    if lacking:
        supported = ", ".join(f"'{name}'" for name, honoured in HOOKS_OF.items() if hooks <= honoured)
        raise UnsupportedBackendError(
            f"The attention implementation is '{requested}', but the scheme {what_needs(lacking)}; it must be one of {supported}. "
            'Call model.set_attn_implementation("sdpa").'
        )
    return OUR_NAMES[requested]


def require_honoured(implementation: str | None, hooks: Iterable[str]) -> None:
    """Refuse an implementation that cannot honour a hook; see `name_for`."""
    name_for(implementation, hooks)


def what_needs(hooks: frozenset[str]) -> str:
    """Return in words what a scheme does through hooks that an implementation lacks."""
    biases = sorted(hooks - {"transform_query_key", "extra_key_channels", "query_scale"})
    if biases:
        return f"adds to the scores inside attention ({', '.join(biases)})"
    if "query_scale" in hooks:
        return "scales each query by the number of its keys, which it reads from the mask"
    return "transforms queries and keys inside attention"
