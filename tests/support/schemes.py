"""Sizes of a model with 12 heads of 64, and schemes built for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pe_swap.schemes import SCHEMES, Geometry, Native, Scheme, build_options
from pe_swap.schemes.positions import Positions, slots_from


def geometry(**changes: Any) -> Geometry:
    """Return the sizes of GPT-2 small or BERT base at a trained length of 32, with `changes`."""
    sizes = {"hidden_size": 768, "num_heads": 12, "head_dim": 64, "num_layers": 3, "is_causal": True, "trained_length": 32}
    return Geometry(**{**sizes, **changes})


def build(
    name: str, table: Tensor | None = None, sizes: Geometry | None = None, native: Native | None = None, **options: Any
) -> Scheme:
    """Return a scheme as a swap builds it in a model with this table, or with these positions of its own."""
    sizes, native = sizes or geometry(), native or Native(table=table)
    resolved = build_options(SCHEMES[name].Options, options).resolve(sizes, native)
    scheme = SCHEMES[name](resolved, sizes, tuple(range(sizes.num_layers)))
    scheme.start_from(native)
    return scheme


def positions(first_query: int, q_len: int, kv_len: int) -> Positions:
    """Return the positions of `q_len` queries from slot `first_query` on, against `kv_len` keys."""
    slots = slots_from(first_query, q_len, torch.device("cpu"))
    key_slots = slots_from(0, kv_len, torch.device("cpu"))
    return Positions(slots, key_slots, slots[None], key_slots[None])


def at_positions(scheme: Scheme, x: Tensor, position_ids: Tensor, *, role: str = "query", layer: int = 0) -> Tensor:
    """Return `x` as a model would have it rotated at `position_ids`."""
    return scheme.transform_query_key(x, scheme.prepare_positions(position_ids), role=role, layer=layer)  # type: ignore[arg-type]
