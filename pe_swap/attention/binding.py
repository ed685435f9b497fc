"""What ties one self-attention module to its scheme, and what one call of it is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pe_swap.positional import Place
from pe_swap.positions import Positions, slots_from
from pe_swap.schemes.base import ATTENTION_HOOKS, Scheme


@dataclass(frozen=True)
class LayerBinding:
    """The scheme of one layer.

    A plain object, not a module: the scheme is registered once on the model and must not appear again under every layer. A
    deep copy of a model copies it together with the place it names.

    Attributes:
        place: where the model's schemes are.
        index: which of them serves the layer.
        layer: index of the layer.
        hooks: the attention hooks the scheme overrides.
    """

    place: Place
    index: int
    layer: int
    hooks: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Read the hooks once: a compiled graph should find a constant."""
        object.__setattr__(self, "hooks", self.scheme.hooks & ATTENTION_HOOKS)

    @property
    def scheme(self) -> Scheme:
        """The scheme that serves the layer."""
        return self.place.positional.scheme_at(self.index)


@dataclass(frozen=True)
class PositionalContext:
    """What travels with one attention call, as its keyword argument `positional`.

    Attributes:
        binding: the layer's scheme.
        query_slots: `[q_len]`, int64, the queries' indices in the key buffer.
        query_ids: `[batch or 1, q_len]`, int64.
        keys_are_rotated: the keys were rotated before they were cached.
    """

    binding: LayerBinding
    query_slots: Tensor
    query_ids: Tensor
    keys_are_rotated: bool

    def positions(self, kv_len: int, device: object) -> Positions:
        """Return where the queries and all `kv_len` keys stand, on the device of the scores."""
        query_slots = self.query_slots.to(device)  # type: ignore[call-overload]  # a model spread over devices
        return Positions(query_slots, slots_from(0, kv_len, query_slots.device), self.query_ids.to(device))  # type: ignore[call-overload]
