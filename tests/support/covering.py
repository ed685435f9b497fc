"""A small set of the cases that has everything any case has, chosen by what the schemes say of themselves.

All cases run where a property is first shown. Where it is shown again, in another mode of the same code, these stand for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from pe_swap.schemes import SCHEMES, Native, Scheme, build_options
from pe_swap.schemes.base import INPUT_HOOKS
from tests.support.families import VARIANTS, is_causal
from tests.support.models import CASES, MATRIX_FAMILIES, pairs
from tests.support.schemes import geometry

CLAIMS = (
    "shift_invariant", "causal_only", "tells_direction", "caches_rotated_keys", "cached_equals_uncached", "bias_is_shared",
    "starts_from_table", "reads_position_ids", "counts_slots",
)  # fmt: skip
"""What a scheme says of itself, beside its hooks."""

FASTER = ("prepare", "fold_bias_into_query_key", "reach")
"""Optional methods that attention takes another way for."""


@functools.cache
def scheme_of(case: str) -> Scheme:
    """Return a case's scheme without a model around it."""
    name, options = CASES[case]
    sizes, native = geometry(hidden_size=96, head_dim=8), Native(table=torch.ones(32, 96))
    return SCHEMES[name](build_options(SCHEMES[name].Options, options).resolve(sizes, native), sizes, (0, 1, 2))


@functools.cache
def traits(case: str) -> frozenset[Hashable]:
    """Return everything by which the code around a scheme may treat a case in a way of its own."""
    scheme = scheme_of(case)
    return frozenset(
        [
            ("hooks", scheme.hooks, scheme.caches_rotated_keys),
            *((claim, getattr(scheme, claim)) for claim in CLAIMS),
            *((method, getattr(type(scheme), method) is not getattr(Scheme, method)) for method in FASTER),
            ("ends", scheme.max_length is not None),
            ("wider keys", scheme.key_width != scheme.geometry.head_dim),
            ("weights", next(scheme.parameters(), None) is not None),
        ]
    )


def ways_in(case: str) -> frozenset[Hashable]:
    """Return each hook by itself, and whether keys enter the cache as they are: all that the code of a family may treat in its own way."""
    scheme = scheme_of(case)
    return frozenset([*scheme.hooks, ("caches_rotated_keys", scheme.caches_rotated_keys)])


def differentiated(case: str) -> frozenset[Hashable]:
    """Return each hook with whether the scheme has weights, and its faster forms: what a gradient goes through."""
    scheme, faster = scheme_of(case), {method for method in FASTER if (method, True) in traits(case)}
    return frozenset([*((hook, ("weights", True) in traits(case)) for hook in scheme.hooks), *faster])


def read(case: str) -> frozenset[Hashable]:
    """Return which parts of a model a case acts on or reads, whatever it does there."""
    hooks = scheme_of(case).hooks
    parts = {
        "input": INPUT_HOOKS,
        "queries and keys": {"transform_query_key"},
        "scores": {"relative_bias", "score_bias"},
        "states before attention": {"extra_key_channels"},
    }
    return frozenset(part for part, of_part in parts.items() if hooks & of_part)


def covering(cases: Iterable[str] = CASES, of: Callable[[str], frozenset[Hashable]] = traits) -> list[str]:
    """Return cases, few, with every trait that any of `cases` has; the one with the most new traits comes first."""
    candidates, chosen = list(cases), []
    missing = set().union(*map(of, candidates))
    while missing:
        chosen.append(max(candidates, key=lambda case: len(of(case) & missing)))
        missing -= of(chosen[-1])
    return chosen


TWO_SIDED = [case for case in CASES if not SCHEMES[CASES[case][0]].causal_only]
"""The cases of an encoder."""


COVERING = covering()
"""The covering cases of a decoder."""

COVERING_TWO_SIDED = covering(TWO_SIDED)
"""The covering cases of an encoder."""


def covering_pairs(families: Iterable[str]) -> list[tuple[str, str]]:
    """Return the covering cases in every family, as `(case, family)`."""
    return [(case, family) for family in families for case in (COVERING if is_causal(family) else COVERING_TWO_SIDED)]


def first_pairs(families: Iterable[str]) -> list[tuple[str, str]]:
    """Return every case in every family, and the covering cases in a variant of one."""
    given = list(families)
    full, variants = [name for name in given if name not in VARIANTS], [name for name in given if name in VARIANTS]
    return [*pairs(full), *covering_pairs(variants)]


PAIRS = first_pairs(MATRIX_FAMILIES)


def in_modes(families: Iterable[str], modes: Iterable[Any]) -> list[tuple[str, str, Any]]:
    """Return `first_pairs` in the first mode and the covering cases in the others, in every family, as `(case, family, mode)`."""
    first, *others = modes
    families = list(families)
    return [
        *((case, family, first) for case, family in first_pairs(families)),
        *((case, family, mode) for mode in others for case, family in covering_pairs(families)),
    ]
