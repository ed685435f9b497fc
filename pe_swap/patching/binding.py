"""What ties one self-attention module to its scheme."""

from __future__ import annotations

from dataclasses import dataclass

from pe_swap.patching.holder import HolderRef
from pe_swap.schemes.base import Scheme


@dataclass(frozen=True)
class LayerBinding:
    """The scheme of one layer.

    A plain object, not a module: the scheme is registered once on the model and must not appear again under every layer. A
    deep copy of a model copies it together with the reference it holds.

    Attributes:
        holder_ref: where the model's schemes are.
        index: which of them serves the layer.
        layer: index of the layer among those with attention.
        cache_layer: index of the layer in a cache, which counts layers without attention too.
        hooks: the hooks of the scheme that act in the attention function.
        parameters: names of the parameters of the attention module's `forward`, in order; read here, once, and not in every call.
        cache_argument: which of them is the cache, or None where the module takes none (encoders).
        ids_from_mask: the module is handed no position ids; see `Stack.ids_from_mask`.
        query_is_scaled: the module multiplies its queries by `head_dim ** -0.5` itself, and hands on a scaling of 1 (OPT, Whisper, ESM).
        native_bias_is_zero: the bias that the module is handed as `position_bias` is a hook's zeros, as no layer is to add the model's own.
    """

    holder_ref: HolderRef
    index: int
    layer: int
    cache_layer: int
    hooks: frozenset[str]
    parameters: tuple[str, ...]
    cache_argument: str | None
    query_is_scaled: bool = False
    ids_from_mask: bool = False
    native_bias_is_zero: bool = False

    @property
    def scheme(self) -> Scheme:
        """The scheme that serves the layer."""
        return self.holder_ref.holder.scheme_at(self.index)
