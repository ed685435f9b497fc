"""The contract of a positional scheme.

A scheme is an `nn.Module` that imports nothing of transformers. It overrides only the hooks it needs; the attention code
decides how each is computed. Shapes in this folder: `batch`, `heads`, `q_len` queries, `kv_len` keys, `head_dim`,
`hidden_size`. Positions and distances are int64; angles (radians), vectors and biases (logits) are computed in float32 and
cast once, by whoever adds them.

A scheme's file reads in this order: the source; formulas as functions; options; the class, which is the paper as it is written; and below
a ruler, for a scheme that has them, faster forms of the same numbers, in a subclass `Fast...` that is then the one registered.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pe_swap.errors import OptionError
from pe_swap.registry import Registry
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.positions import Positions

SCHEMES: Registry[type[Scheme]] = Registry("positional scheme")

INPUT_HOOKS = frozenset({"encode", "embed"})
"""Hooks that act on the input embeddings, which all layers share."""

ATTENTION_HOOKS = frozenset(
    {"transform_query_key", "relative_bias", "score_bias", "value_bias", "extra_key_channels", "query_scale"}
)
"""Hooks that act inside attention; a scheme with none of them leaves the attention function to transformers."""


FoldedBias = tuple[Tensor, Tensor, Tensor | None]
"""What `Scheme.fold_bias_into_query_key` gives: queries, keys, and what is still to be added to their scaled products."""


class Scheme(nn.Module):
    """One way of giving tokens their positions.

    The class attributes describe the default options; a scheme may override them per instance.

    Attributes:
        Options: the frozen dataclass of the scheme's options.
        summary: one line for lists.
        shift_invariant: the logits do not change when every position id moves by the same amount.
        causal_only: not defined for encoders.
        tells_direction: in an encoder, a key before the query and one after it at the same distance get different scores. False for a
            symmetric bias: with it, an encoder cannot tell a text, or an image, from its mirror image.
        caches_rotated_keys: keys enter the cache already rotated; False where a rotation depends on the length so far.
        cached_equals_uncached: False only where the paper's own definition makes a cached pass differ.
        bias_is_shared: `relative_bias` is the same in every layer the scheme serves, so that one layer's serves all.
        starts_from_table: starts from the model's own position table, where there is one.
        keeps_mean: in a decoder whose positions are a table, the table's mean row stays beside the scheme unless a swap says otherwise. For
            schemes that it was measured to help: `configs/README.md`, "Keep the mean".
        at_model_rate: names of parameters that are trained at the model's own learning rate, where the scheme's others may have a higher
            one: weights of projections, of which many make one number of a vector.
        keeps_function: as built, the scheme leaves the function of the model unchanged, as it replaces the model's own positions by the
            same ones; `start_from` finds out.
        on_a_grid: how the scheme acts where a position is a row and a column (images): by methods of its own, `"itself"`; by one copy per
            axis whose biases are added, `"summed"`, or whose vectors share the width, `"joined"` (see `per_axis`); None, not at all.
        options: the resolved options.
        geometry: the sizes of the model.
        layers: indices of the layers it serves; a hook's `layer` is one of them. Parameters that each layer has of its own live in an
            `nn.ParameterDict` under `str(layer)` (see `layer_parameters`), so that a scheme that loses layers keeps the others'.
    """

    Options: ClassVar[type[SchemeOptions]]
    summary: ClassVar[str]
    shift_invariant: bool = False
    causal_only: ClassVar[bool] = False
    tells_direction: bool = True
    caches_rotated_keys: bool = True
    cached_equals_uncached: bool = True
    bias_is_shared: bool = False
    starts_from_table: ClassVar[bool] = False
    keeps_mean: ClassVar[bool] = False
    at_model_rate: ClassVar[frozenset[str]] = frozenset()
    keeps_function: bool = False
    on_a_grid: ClassVar[Literal["itself", "summed", "joined"] | None] = None

    def __init__(self, options: SchemeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the scheme. A subclass creates its parameters, then calls `reset_parameters`.

        Args:
            options: resolved options, of the class that the scheme's `Options.resolve` returns.
            geometry: sizes of the model.
            layers: indices of the layers it serves.

        Raises:
            OptionError: the options do not fit the geometry.
        """
        super().__init__()
        by_length = options.logit_scale is not None or getattr(options, "temperature", None) is not None
        if options.sliding_window is not None and geometry.sides:
            raise OptionError(
                f"{options.scheme}: option 'sliding_window' is {options.sliding_window}, but a window counts the tokens of a row, and this "
                "model's positions are rows and columns of patches. Leave it out."
            )
        if options.sliding_window is not None and by_length and not geometry.is_causal:
            raise OptionError(
                f"{options.scheme}: option 'sliding_window' is {options.sliding_window} in an encoder, beside an option that scales by how "
                "many keys a query may look at, which pe_swap counts for windows that look back only. Leave one of them out."
            )
        self.options = options
        self._hooks = self.hooks_for(options)  # read once: a compiled graph should find a constant
        self._has_relative_bias = "relative_bias" in hooks_of(type(self)) - options.unused_hooks  # and not by a window alone
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
    def original_length(self) -> int:
        """The length beyond which the scheme may do what it did not do in training, in positions."""
        return self.geometry.trained_length

    @property
    def key_width(self) -> int:
        """Width of the queries and keys that `transform_query_key` returns; `head_dim` unless the scheme widens them."""
        return self.geometry.head_dim

    def reach(self, layer: int) -> int | None:
        """Return how many positions a query may look back in a layer, or None where there is no limit.

        Optional. A scheme whose `relative_bias` is `-inf` at every distance below `-reach` may say so: attention then skips keys that
        lie further back. It changes no result.
        """
        return None

    @property
    def hooks(self) -> frozenset[str]:
        """The hooks this scheme uses."""
        return self._hooks

    @classmethod
    def hooks_for(cls, options: SchemeOptions) -> frozenset[str]:
        """Return the hooks that the scheme uses under `options`: those its class overrides, less any that they turn off."""
        scales = {"query_scale"} if options.logit_scale is not None else set()
        window = {"relative_bias"} if options.sliding_window is not None else set()
        return ((hooks_of(cls) | scales) - options.unused_hooks) | window

    @property
    def tells_order(self) -> bool:
        """Whether the scheme itself tells the order of tokens; if False, an encoder cannot tell word order."""
        return bool(self.hooks - {"query_scale"})

    @property
    def reads_position_ids(self) -> bool:
        """Whether position ids move tokens: False for a scheme that tells positions by counting keys."""
        return bool(self.hooks & (INPUT_HOOKS | {"transform_query_key"}))

    @property
    def counts_slots(self) -> bool:
        """Whether distances are counted in slots, whatever the position ids say."""
        return bool(self.hooks & {"relative_bias", "score_bias", "value_bias"})

    def reset_parameters(self) -> None:
        """Set every parameter to its start on a pretrained model: the one that disturbs the model least."""

    def start_from(self, native: Native) -> None:
        """Take what the scheme needs from the positions it replaces, and set `keeps_function` where they are the same.

        Called by the swap, after `reset_parameters`, and never on a reload.
        """

    def encode(self, position_ids: Tensor) -> Tensor:
        """Return the vectors added to the token embeddings, at the place of the model's own table.

        Args:
            position_ids: `[batch or 1, length]`.

        Returns:
            `[batch or 1, length, input_size]`, float32 (a parameter's own dtype where it is a table).
        """
        raise NotImplementedError

    def encode_grid(self, sides: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the vectors added to the patches of an image: what `encode` is for a row of tokens.

        Args:
            sides: rows and columns of the image's patches.
            device: where the vectors are computed.

        Returns:
            `[1, rows * columns, input_size]`, row by row, float32 (a parameter's own dtype where it is a table).
        """
        raise NotImplementedError

    def embed(self, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Return the token embeddings with positions in them, for a scheme that does more than add a vector.

        Args:
            token_embeddings: `[batch, length, input_size]`.
            position_ids: `[batch or 1, length]`.

        Returns:
            `[batch, length, input_size]`, in the dtype of `token_embeddings`.
        """
        raise NotImplementedError

    def prepare_positions(self, position_ids: Tensor) -> Any:
        """Return what `transform_query_key` needs of positions; worked out once for the queries, the keys and the layers of a call.

        Args:
            position_ids: `[batch or 1, length]`.

        Returns:
            Whatever `transform_query_key` takes: here the position ids themselves.
        """
        return position_ids

    def prepare_grid(self, position_ids: Tensor, sides: tuple[int, ...]) -> Any:
        """Return what `transform_query_key` needs of positions on a grid: what `prepare_positions` is for a row of tokens.

        Args:
            position_ids: `[batch or 1, length, axes]`, int64; -1 on every axis for a token that stands nowhere.
            sides: rows and columns of the grid.

        Returns:
            Whatever `transform_query_key` takes.
        """
        return self.prepare_positions(position_ids)

    def transform_query_key(self, x: Tensor, prepared: Any, *, role: Literal["query", "key"], layer: int) -> Tensor:
        """Return queries or keys with their positions in them; keys before they are cached.

        Args:
            x: `[batch, heads, length, head_dim]`. Keys have the key heads of the model, which may be fewer than its query heads.
            prepared: what `prepare_positions` gave for their position ids.
            role: what `x` is.
            layer: index of the layer.

        Returns:
            The shape and dtype of `x`, or `key_width` in place of `head_dim`.
        """
        raise NotImplementedError

    def query_scale(self, num_keys: Tensor, *, layer: int) -> Tensor:
        """Return the factor on each query, after `transform_query_key` and before any product.

        This one is log-length scaling, `logit_scale="log_n"` of every scheme: `max(1, log(n) / log(trained_length))` (Su Jianlin,
        "Rectified Rotary Position Embeddings", 2023, its code). Differs from the source: `n` is how many keys a query may look at,
        which in a decoder is its position plus one, as there, and which an encoder has too. A bias that does not come from the
        query is not scaled.

        Args:
            num_keys: `[batch or 1, q_len]`, int64, how many keys each query may look at.
            layer: index of the layer.

        Returns:
            The shape of `num_keys`, float32.
        """
        if self.options.logit_scale is None:
            return torch.ones_like(num_keys, dtype=torch.float32)
        return (num_keys.clamp(min=1).float().log() / math.log(max(2, self.geometry.trained_length))).clamp(min=1.0)

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        """Return what is added to the scaled scores, where it depends on `key - query` alone.

        Args:
            distance: `[n]`, int64, key position minus query position: negative looks back.
            layer: index of the layer.

        Returns:
            `[heads, n]`, float32, logits; one bias per query head. `-inf` forbids a distance (a window); distance 0 stays finite, so
            that every query may look somewhere. See `reach`.
        """
        raise NotImplementedError

    def windowed_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        """Return `relative_bias`, or 0 for a scheme without one, and `-inf` outside the option `sliding_window`; attention calls this.

        Args:
            distance: see `relative_bias`.
            layer: index of the layer.

        Returns:
            `[heads, n]`, float32, logits.
        """
        if self._has_relative_bias:
            bias = self.relative_bias(distance, layer=layer)
        else:
            bias = torch.zeros(self.geometry.num_heads, len(distance), device=distance.device)
        window = self.options.sliding_window
        if window is None:
            return bias
        back = -distance if self.geometry.is_causal else distance.abs()
        return bias.masked_fill(back >= window, -torch.inf)

    def windowed_reach(self, layer: int) -> int | None:
        """Return `reach`, or the shorter one of the option `sliding_window`."""
        reach, window = self.reach(layer), self.options.sliding_window
        if window is None:
            return reach
        return window - 1 if reach is None else min(reach, window - 1)

    def extra_key_channels(self, hidden_states: Tensor, *, layer: int) -> Tensor:
        """Return a few numbers for every token that `score_bias` will need of it later; they are cached beside its key.

        A running sum over tokens is taken in `score_bias`, from what is carried, and never carried itself: a cache that is
        cropped or reordered stays right.

        Args:
            hidden_states: `[batch, length, hidden_size]`, what the attention module is called with.
            layer: index of the layer.

        Returns:
            `[batch, heads, length, channels]`, in the dtype of `hidden_states`; `score_bias` finds those of all keys in
            `positions.carried`.
        """
        raise NotImplementedError

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return what is added to the scaled scores, for any block of queries, where it depends on more than a distance.

        Where a model has fewer key heads than query heads, each query head has the keys of its group: keys come repeated, and what a
        scheme makes of the key of a query head (`cope`'s gates, terms of `deberta`, `shaw` and `transformer_xl` that multiply keys) it
        makes of its group's key with the parameters of that query head.

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

    # --- Faster forms of the same numbers ---

    def prepare(self, positions: Positions, *, layer: int) -> Any:
        """Return what `score_bias` needs that depends on no query and no key: all blocks of a call find it in `positions.prepared`.

        Optional. Work that is the same for every block of queries.

        Args:
            positions: where all the call's queries and keys stand.
            layer: index of the layer.

        Returns:
            Whatever `score_bias` takes; None where there is nothing.
        """
        return None

    def fold_bias_into_query_key(
        self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int
    ) -> FoldedBias | None:
        """Return queries and keys whose products, scaled, are a block's scores with what `score_bias` adds, or with a part of it.

        Optional. With it, attention needs no second product.

        Args:
            query: as in `score_bias`.
            key: as in `score_bias`.
            positions: as in `score_bias`.
            scaling: as in `score_bias`.
            layer: index of the layer.

        Returns:
            Both in the shapes and the dtype they came in, and the part of `score_bias` that is not in their products, or None where
            there is no such part; None alone where only `score_bias` will do.
        """
        return None


def two_sided() -> list[str]:
    """Return the schemes that give an encoder the order of tokens from inside attention; those that tell direction come first."""
    found = [
        name
        for name in SCHEMES.names()
        if not (scheme := SCHEMES[name]).causal_only and hooks_of(scheme) & ATTENTION_HOOKS and scheme.hooks_for(scheme.Options())
    ]
    return sorted(found, key=lambda name: not SCHEMES[name].tells_direction)


def inside_attention() -> list[str]:
    """Return the schemes that do not act on the input, so that layers may differ in them."""
    return [name for name in SCHEMES.names() if not hooks_of(SCHEMES[name]) & INPUT_HOOKS]


def on_a_grid() -> list[str]:
    """Return the schemes that act where a position is a row and a column; those that can tell a grid from its mirror image come first."""
    found = [name for name in SCHEMES.names() if SCHEMES[name].on_a_grid is not None]
    return sorted(found, key=lambda name: not SCHEMES[name].tells_direction)


def hooks_of(scheme_class: type[Scheme]) -> frozenset[str]:
    """Return the hooks that a class overrides."""
    return frozenset(hook for hook in INPUT_HOOKS | ATTENTION_HOOKS if getattr(scheme_class, hook) is not getattr(Scheme, hook))
