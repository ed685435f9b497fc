"""What ties one self-attention module to its scheme."""

from __future__ import annotations

from dataclasses import dataclass, field

from pe_swap.patching.holder import HolderRef
from pe_swap.schemes.base import ATTENTION_HOOKS, Scheme


@dataclass(frozen=True)
class LayerBinding:
    """The scheme of one layer.

    A plain object, not a module: the scheme is registered once on the model and must not appear again under every layer. A
    deep copy of a model copies it together with the reference it holds.

    Attributes:
        holder_ref: where the model's schemes are.
        index: which of them serves the layer.
        layer: index of the layer.
        parameters: names of the parameters of the attention module's `forward`, in order; read here, once, and not in every call.
        cache_argument: which of them is the cache.
        hooks: the attention hooks the scheme overrides.
    """

    holder_ref: HolderRef
    index: int
    layer: int
    parameters: tuple[str, ...]
    cache_argument: str
    hooks: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Read the hooks once: a compiled graph should find a constant."""
        object.__setattr__(self, "hooks", self.scheme.hooks & ATTENTION_HOOKS)

    @property
    def scheme(self) -> Scheme:
        """The scheme that serves the layer."""
        return self.holder_ref.holder.scheme_at(self.index)
