"""The contract of a positional scheme.

A scheme is an `nn.Module` that knows nothing of transformers. It overrides only the hooks it needs; the attention code
decides how each is computed. Shapes in this folder: `batch`, `heads`, `q_len` queries, `kv_len` keys, `head_dim`,
`hidden_size`. Positions and distances are int64; angles (radians), vectors and biases (logits) are computed in float32 and
cast once, by whoever adds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from pe_swap.positions import Positions
from pe_swap.registry import Registry
from pe_swap.schemes.options import SchemeOptions

SCHEMES: Registry[type[Scheme]] = Registry("positional scheme")

INPUT_HOOKS = frozenset({"encode", "embed"})
"""Hooks that act on the input embeddings, which all layers share."""

ATTENTION_HOOKS = frozenset({"rotate", "relative_bias", "score_bias", "value_bias"})
"""Hooks that act inside attention; a scheme with none of them leaves the attention function to transformers."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that a scheme may depend on.

    Attributes:
        hidden_size: width of the token embeddings.
        num_heads: attention heads per layer.
        head_dim: width of one head.
        num_layers: self-attention layers.
        is_causal: True for decoders; an encoder needs a scheme's symmetric or two-sided form.
        trained_length: rows of the position table the model was trained with, in positions.
    """

    hidden_size: int
    num_heads: int
    head_dim: int
    num_layers: int
    is_causal: bool
    trained_length: int


class Scheme(nn.Module):
    """One way of telling a model where its tokens stand.

    Attributes:
        Options: the frozen dataclass of the scheme's options.
        summary: one line for lists.
        shift_invariant: the logits do not change when every position id moves by the same amount.
        causal_only: not defined for encoders.
        caches_rotated_keys: keys enter the cache already rotated; False where a rotation depends on the length so far.
        cached_equals_uncached: False only where the paper's own definition makes a cached pass differ.
        needs_table: starts from the model's own position table, and cannot be put into a model that no longer has one.
        options: the resolved options.
        geometry: the sizes of the model.
        layers: indices of the layers it serves; a hook's `layer` is one of them. Parameters of a layer's own live in an
            `nn.ParameterDict` under `str(layer)`, so that a scheme that loses layers keeps the others'.
    """

    Options: ClassVar[type[SchemeOptions]]
    summary: ClassVar[str]
    shift_invariant: ClassVar[bool] = False
    causal_only: ClassVar[bool] = False
    caches_rotated_keys: ClassVar[bool] = True
    cached_equals_uncached: ClassVar[bool] = True
    needs_table: ClassVar[bool] = False

    def __init__(self, options: SchemeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the scheme. A subclass creates its parameters, then calls `reset_parameters`.

        Raises:
            OptionError: the options do not fit the geometry.
        """
        super().__init__()
        self.options = options
        self.geometry = geometry
        self.layers = layers

    @property
    def name(self) -> str:
        """The name the scheme is registered under."""
        return self.options.scheme

    @property
    def max_length(self) -> int | None:
        """How many positions the scheme can tell apart before it has none left, or None where it never ends."""
        return None

    @property
    def hooks(self) -> frozenset[str]:
        """The hooks this scheme uses: those its class overrides, less any that its options turn off."""
        return hooks_of(type(self))

    def reset_parameters(self) -> None:
        """Set every parameter to its start on a pretrained model: the one that disturbs the model least."""

    def start_from(self, position_table: Tensor) -> None:
        """Take what the scheme needs from the table it replaces, `[trained_length, hidden_size]`, float32.

        Called by the swap, after `reset_parameters`, and never on a reload.
        """

    def encode(self, position_ids: Tensor) -> Tensor:
        """Return the vectors added to the token embeddings, at the place of the model's own table.

        Args:
            position_ids: `[batch or 1, length]`.

        Returns:
            `[batch or 1, length, hidden_size]`, float32 (a parameter's own dtype where it is a table).
        """
        raise NotImplementedError

    def embed(self, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Return the token embeddings with positions in them, for a scheme that does more than add a vector.

        Args:
            token_embeddings: `[batch, length, hidden_size]`.
            position_ids: `[batch or 1, length]`.

        Returns:
            `[batch, length, hidden_size]`, in the dtype of `token_embeddings`.
        """
        raise NotImplementedError

    def rotate(self, x: Tensor, position_ids: Tensor, *, role: Literal["query", "key"], layer: int) -> Tensor:
        """Return queries or keys with their positions turned into them; keys before they are cached.

        Args:
            x: `[batch, heads, length, head_dim]`.
            position_ids: `[batch or 1, length]`.
            role: what `x` is.
            layer: index of the layer.

        Returns:
            The shape and dtype of `x`.
        """
        raise NotImplementedError

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        """Return what is added to the scaled scores, where it depends on `key - query` alone.

        Args:
            distance: `[n]`, int64, key position minus query position: negative looks back.
            layer: index of the layer.

        Returns:
            `[heads, n]`, float32, logits.
        """
        raise NotImplementedError

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return what is added to the scaled scores, for any block of queries, where it depends on more than a distance.

        Args:
            query: `[batch, heads, q_len, head_dim]`, a block of the queries.
            key: `[batch, heads, kv_len, head_dim]`.
            positions: where the block's queries and the keys stand.
            scaling: the factor on `query . key`, usually `head_dim ** -0.5`.
            layer: index of the layer.

        Returns:
            `[batch or 1, heads, q_len, kv_len]`, logits.
        """
        raise NotImplementedError

    def value_bias(self, probabilities: Tensor, positions: Positions, *, layer: int) -> Tensor:
        """Return what is added to the attention output, for a block of queries.

        Args:
            probabilities: `[batch, heads, q_len, kv_len]`, after softmax and dropout.
            positions: where the block's queries and the keys stand.
            layer: index of the layer.

        Returns:
            `[batch, heads, q_len, head_dim]`.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Show the options in `print(model)`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.to_dict().items())


def hooks_of(scheme_class: type[Scheme]) -> frozenset[str]:
    """Return the hooks that a class overrides."""
    return frozenset(hook for hook in INPUT_HOOKS | ATTENTION_HOOKS if getattr(scheme_class, hook) is not getattr(Scheme, hook))


def root_mean_square(vectors: Tensor) -> float:
    """Return the root mean square of all entries: the size that a replacement of a table should have."""
    return float(vectors.detach().double().square().mean().sqrt())
