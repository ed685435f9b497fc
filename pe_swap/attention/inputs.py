"""The prologue of every attention function: from the arguments of a call to what is attended with.

What a family does to its scores beside positions is dealt with here, so that neither schemes nor kernels know of it: fewer key heads
than query heads, queries that come scaled, soft caps, sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from pe_swap.attention.call import AttentionCall
from pe_swap.attention.fused import per_head
from pe_swap.attention.masks import keys_allowed
from pe_swap.attention.names import BARE_HOOKS, RELATIVE_HOOKS
from pe_swap.errors import UnsupportedBackendError
from pe_swap.schemes.base import FoldedBias
from pe_swap.schemes.positions import Positions

SCORE_KEYWORDS = frozenset({"is_causal", "softcap", "s_aux"})
"""Keywords of the attention call that change scores, and that are honoured here."""

HARMLESS_KEYWORDS = frozenset(
    {
        # Positions and caches: the layer's hook has read them, and the mask contains the rest.
        *("position_ids", "position_embeddings", "cache_position", "cache", "past_key_values", "layer_past", "use_cache"),
        # The window: in the mask.
        "sliding_window",
        # Packed rows: for flash kernels; the mask contains them elsewhere.
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
        # What a model returns, and how it is trained.
        *(
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "return_dict",
            "num_items_in_batch",
            "labels",
            "shift_labels",
        ),
        "logits_to_keep",
        # What a model is called with, handed down by families that hand everything down.
        *("input_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids", "encoder_hidden_states", "encoder_attention_mask"),
        # How a kernel runs, not what it computes.
        *("deterministic", "kernel_options", "implementation", "target_dtype"),
    }
)
"""Keywords of the attention call that change no score, gathered from the modeling files of transformers 5.24."""

KNOWN_KEYWORDS = HARMLESS_KEYWORDS | SCORE_KEYWORDS


@dataclass(frozen=True)
class AttentionInputs:
    """One attention call of a layer with a scheme, after the prologue.

    The scores are `cap(scaling * query . key + score_bias) + relative_bias + mask`, with `cap(x) = softcap * tanh(x / softcap)` where
    there is a cap: a relative bias is a property of the pair, as the mask is, and `score_bias` may correct the product.

    Attributes:
        call: the scheme and the positions of the call.
        query: `[batch, heads, q_len, width]`, transformed and scaled by the scheme.
        key: `[batch, key_heads, kv_len, width]`, transformed.
        value: `[batch, key_heads, kv_len, value_width]`.
        carried: the scheme's extra channels of every key, `[batch, heads, kv_len, channels]`, or None.
        attention_mask: as the attention function was given it.
        is_causal: the call relies on causality without a mask.
        scaling: the factor on `query . key`.
        dropout: probability, on the attention probabilities.
        softcap: the cap on scores, in logits, or None.
        sinks: logits of a key without a value, `[heads]`, or None.
        keywords: what else the attention function was called with, `is_causal`, `softcap` and `s_aux` included.
    """

    call: AttentionCall
    query: Tensor
    key: Tensor
    value: Tensor
    carried: Tensor | None
    attention_mask: Any
    is_causal: bool
    scaling: float
    dropout: float
    softcap: float | None
    sinks: Tensor | None
    keywords: Mapping[str, Any]

    @property
    def is_bare(self) -> bool:
        """The scores are the products alone, so that transformers' own function will do."""
        return self.call.hooks <= BARE_HOOKS and self.softcap is None and self.sinks is None

    @property
    def is_relative(self) -> bool:
        """The scores are the products and a bias of the distance."""
        return self.call.hooks <= RELATIVE_HOOKS and self.softcap is None and self.sinks is None

    @property
    def positions(self) -> Positions:
        """Where queries and keys stand."""
        return self.call.positions(self.key.shape[2], self.query.device, self.carried)

    @property
    def bias_by_distance(self) -> Tensor:
        """The relative bias, `[heads, q_len + kv_len - 1]`; see `AttentionCall.bias_by_distance`."""
        return self.call.bias_by_distance(self.query.shape[2], self.key.shape[2], self.query.device)

    @property
    def repeated(self) -> tuple[Tensor, Tensor]:
        """Keys and values per query head: each head has those of its group."""
        return per_head(self.key, self.query.shape[1]), per_head(self.value, self.query.shape[1])

    @property
    def score_bias(self) -> Callable[[Tensor, Tensor, Positions], Tensor] | None:
        """From a block's queries, keys and positions to what is added to its products; None where nothing is."""
        if "score_bias" not in self.call.hooks:
            return None
        return partial(self.call.scheme.score_bias, scaling=self.scaling, layer=self.call.layer)

    @property
    def relative_bias(self) -> Callable[[Positions], Tensor] | None:
        """From a block's positions to its relative bias, `[1, heads, q_len, kv_len]`; None where there is none."""
        if "relative_bias" not in self.call.hooks:
            return None
        scheme, layer = self.call.scheme, self.call.layer

        def relative_bias(positions: Positions) -> Tensor:
            distance = positions.distance
            return scheme.windowed_bias(distance.reshape(-1), layer=layer).reshape(1, -1, *distance.shape)

        return relative_bias

    @property
    def value_bias(self) -> Callable[[Tensor, Positions], Tensor] | None:
        """From a block's probabilities and positions to what is added to its output; None where nothing is."""
        if "value_bias" not in self.call.hooks:
            return None
        return partial(self.call.scheme.value_bias, layer=self.call.layer)

    @property
    def fold_bias(self) -> Callable[[Tensor, Tensor, Positions], FoldedBias | None] | None:
        """From a block's queries, keys and positions to others with its bias in them; None where no scheme may do that."""
        if self.call.hooks & {"relative_bias", "value_bias"} or self.softcap is not None or self.sinks is not None:
            return None
        return partial(self.call.scheme.fold_bias_into_query_key, scaling=self.scaling, layer=self.call.layer)

    @property
    def first_visible(self) -> Callable[[int], int] | None:
        """From the index of a query to that of the first key within the scheme's reach; None where that is all keys."""
        reach = self.call.scheme.windowed_reach(self.call.layer) if "relative_bias" in self.call.hooks else None
        first_query = self.call.call.first_query
        if reach is None or first_query is None:
            return None
        return lambda query: max(0, first_query + query - reach)


def resolve_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    attention_call: AttentionCall,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> AttentionInputs:
    """Return what a call attends with.

    Args:
        module: the attention module.
        query: `[batch, heads, q_len, head_dim]`.
        key: `[batch, key_heads, kv_len, head_dim]`; from a cache it may be transformed, and have carried channels after its own.
        value: `[batch, key_heads, kv_len, value_width]`.
        attention_mask: additive, boolean (True: may look), a block mask, or None.
        attention_call: what the layer's hook handed on.
        scaling: factor on `query . key`; None for `head_dim ** -0.5`.
        dropout: probability, on the attention probabilities.
        keywords: everything else that the attention function was called with.

    Raises:
        UnsupportedBackendError: the keys are not those that the hook knew of, or a keyword may change scores and is not known here.
    """
    require_known_cache(attention_call, query.shape[2], key.shape[2])
    if not keywords.keys() <= KNOWN_KEYWORDS:
        if attention_call.native_bias_is_zero:
            keywords.pop("position_bias", None)
        require_known_keywords(attention_call, keywords)
    scale_of_width = query.shape[-1] ** -0.5
    scaling = scale_of_width if scaling is None else scaling
    if attention_call.query_is_scaled:
        query, scaling = query / scale_of_width, scaling * scale_of_width
    carried = None
    if attention_call.carried is not None:
        key, carried = attention_call.split(key, query.shape[1])
    if "transform_query_key" in attention_call.hooks:
        query, key = transformed(attention_call, query, key)
    causal = is_causal_call(module, query, attention_mask, keywords.get("is_causal"))
    if "query_scale" in attention_call.hooks:
        query = scaled(attention_call, query, key.shape[2], attention_mask, causal)
    return AttentionInputs(
        attention_call,
        query,
        key,
        value,
        carried,
        attention_mask,
        causal,
        scaling,
        dropout,
        softcap=keywords.get("softcap"),
        sinks=keywords.get("s_aux"),
        keywords=keywords,
    )


def require_known_cache(attention_call: AttentionCall, q_len: int, kv_len: int) -> None:
    """Refuse another number of keys than the hook of the layer could know of.

    Raises:
        UnsupportedBackendError: a cache reached the module by a way the hook does not know, so that new tokens have the positions of
            the first ones; or a cache returned other keys than it said it would.
    """
    call = attention_call
    if not call.has_cache and kv_len != q_len:
        raise UnsupportedBackendError(
            f"Layer {call.layer} carries the scheme '{call.scheme.name}' and has {kv_len} keys with {q_len} queries, but its hook was "
            f"handed no cache as '{call.cache_argument}': the positions would be wrong. This transformers version may hand caches on "
            "in another way: use a version that pe_swap was tested with, or use_cache=False."
        )
    if call.num_keys is not None and kv_len != call.num_keys:
        raise UnsupportedBackendError(
            f"The cache of layer {call.layer}, which has the scheme '{call.scheme.name}', returned {kv_len} keys, but its "
            f"get_mask_sizes said {call.num_keys}: the positions would be wrong. Use a cache of transformers, or use_cache=False."
        )


def require_known_keywords(attention_call: AttentionCall, keywords: Mapping[str, Any]) -> None:
    """Refuse a keyword that may change scores and would be dropped.

    Raises:
        UnsupportedBackendError: there is one, and it is neither None nor False.
    """
    for name in keywords.keys() - KNOWN_KEYWORDS:
        if keywords[name] is not None and keywords[name] is not False:
            raise UnsupportedBackendError(
                f"The attention of layer {attention_call.layer}, which has the scheme '{attention_call.scheme.name}', was called with "
                f"the keyword '{name}', which pe_swap does not know and which may change scores. Call the model without it, or leave "
                "this layer as it was (layers=[...])."
            )


def transformed(attention_call: AttentionCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys through the scheme's `transform_query_key`; keys that were cached without it all at once."""
    query = attention_call.transformed(query, "query")
    if not attention_call.has_cache:
        key = attention_call.transformed(key, "key")
    elif not attention_call.keys_are_transformed:
        key = attention_call.transformed_cache(key)
    return query, key


def scaled(attention_call: AttentionCall, query: Tensor, kv_len: int, attention_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return queries times the scheme's factor; computed in at least float32, in the dtype of `query`."""
    call = attention_call.call
    query_index = call.query_slots.to(query.device) - call.first_key_slot
    num_keys = keys_allowed(query_index, kv_len, attention_mask, is_causal)
    if attention_call.scheme.options.sliding_window is not None:
        num_keys = num_keys.clamp(max=attention_call.scheme.options.sliding_window)
    factor = attention_call.scheme.query_scale(num_keys, layer=attention_call.layer)
    return (query * factor[:, None, :, None]).to(query.dtype)


def is_causal_call(module: nn.Module, query: Tensor, attention_mask: object, is_causal: bool | None) -> bool:
    """Tell whether the call relies on causality without a mask, as transformers' sdpa decides it."""
    declared = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    return attention_mask is None and query.shape[2] > 1 and declared
