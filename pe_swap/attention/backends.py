"""The attention functions, registered with transformers under names of our own.

A name of ours stands for one of transformers' implementations with the scheme applied around it or inside it. Modules without
a scheme (cross-attention shares the configuration) get exactly the implementation the name stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pe_swap.attention.blockwise import blockwise_attention
from pe_swap.attention.call import AttentionCall
from pe_swap.attention.flex import flex_bias_attention, flex_mask
from pe_swap.attention.plain import plain_attention
from pe_swap.attention.relative import relative_bias_attention
from pe_swap.errors import UnsupportedBackendError
from pe_swap.schemes.base import ATTENTION_HOOKS, FoldedBias
from pe_swap.schemes.positions import Positions

BINDING_ATTRIBUTE = "pe_swap_binding"
"""Where an attention module with a scheme keeps what ties it to the scheme."""

AttentionOutput = tuple[Tensor, Tensor | None]

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


BARE_HOOKS = frozenset({"transform_query_key", "query_scale"})
"""Hooks that leave scores as queries and keys make them."""

RELATIVE_HOOKS = BARE_HOOKS | {"relative_bias"}
"""Hooks that add what depends on a distance alone."""


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
        biases = sorted(lacking - {"transform_query_key", "extra_key_channels", "query_scale"})
        if biases:
            what = f"adds to the scores inside attention ({', '.join(biases)})"
        elif "query_scale" in lacking:
            what = "scales each query by how many keys it sees, which it reads from the mask"
        else:
            what = "rotates queries and keys inside attention"
        supported = [name for name, honoured in HOOKS_OF.items() if hooks <= honoured]
        listed = ", ".join(f"'{name}'" for name in supported)
        raise UnsupportedBackendError(
            f"The attention implementation is '{requested}', but the scheme {what}; it must be one of {listed}. "
            'Call model.set_attn_implementation("sdpa").'
        )
    return OUR_NAMES[requested]


def rotated(attention_call: AttentionCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys with their positions turned into them, where the scheme does that.

    Keys that were not rotated on their way into a cache are rotated here, all of them.
    """
    if "transform_query_key" not in attention_call.hooks:
        return query, key
    query = attention_call.rotated(query, "query")
    if not attention_call.has_cache:
        key = attention_call.rotated(key, "key")
    elif not attention_call.keys_are_rotated:
        key = attention_call.rotated_cache(key)
    return query, key


def keys_seen(
    attention_call: AttentionCall, query: Tensor, kv_len: int, attention_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Return how many keys each query may look at, `[batch or 1, q_len]`, int64.

    Counted on the mask, so that padding, caches, packed sequences and both kinds of model need no rule of their own.
    """
    if attention_mask is None:
        every = torch.full((1, query.shape[2]), kv_len, device=query.device)
        return attention_call.call.query_slots.to(query.device)[None] + 1 if is_causal else every
    allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return allowed[:, 0].sum(-1)


def scaled(attention_call: AttentionCall, query: Tensor, kv_len: int, attention_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return queries times the scheme's factor, where it has one; computed in at least float32, in the dtype of `query`."""
    if "query_scale" not in attention_call.hooks:
        return query
    num_keys = keys_seen(attention_call, query, kv_len, attention_mask, is_causal)
    factor = attention_call.scheme.query_scale(num_keys, layer=attention_call.layer)
    return (query * factor[:, None, :, None]).to(query.dtype)


def block_score_bias(attention_call: AttentionCall, scaling: float) -> Callable[[Tensor, Tensor, Positions], Tensor] | None:
    """Return the function from a block of queries to all that is added to its scores, or None where nothing is."""
    scheme, layer, hooks = attention_call.scheme, attention_call.layer, attention_call.hooks
    if not hooks & {"relative_bias", "score_bias"}:
        return None

    def score_bias(query: Tensor, key: Tensor, positions: Positions) -> Tensor:
        total: Tensor | None = None
        if "score_bias" in hooks:
            total = scheme.score_bias(query, key, positions, scaling=scaling, layer=layer)
        if "relative_bias" in hooks:
            distance = positions.distance
            relative = scheme.relative_bias(distance.reshape(-1), layer=layer).reshape(1, -1, *distance.shape)
            total = relative if total is None else total + relative
        assert total is not None
        return total

    return score_bias


def is_causal_call(module: nn.Module, query: Tensor, attention_mask: object, is_causal: bool | None) -> bool:
    """Tell whether the call relies on causality without a mask, as transformers' sdpa decides it."""
    declared = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    return attention_mask is None and query.shape[2] > 1 and declared


def refuse_unbound(module: nn.Module) -> None:
    """Refuse a call of a swapped layer that arrives without its positions.

    Raises:
        UnsupportedBackendError: the layer has a scheme, and something between its hook and here dropped it.
    """
    binding = getattr(module, BINDING_ATTRIBUTE, None)
    if binding is not None:
        raise UnsupportedBackendError(
            f"Layer {binding.layer} carries the scheme '{binding.scheme.name}', but its attention was called without the keyword "
            "argument 'attention_call'. Call the attention module, not its forward, so that its hooks run."
        )


def refuse_unseen_cache(attention_call: AttentionCall, q_len: int, kv_len: int) -> None:
    """Refuse more keys than queries in a call whose hook saw no cache.

    Raises:
        UnsupportedBackendError: the cache reached the module by a way the hook does not know, so that new tokens were given the
            positions of the first ones.
    """
    if not attention_call.has_cache and kv_len != q_len:
        raise UnsupportedBackendError(
            f"Layer {attention_call.layer} carries the scheme '{attention_call.scheme.name}' and meets {kv_len} keys with {q_len} "
            f"queries, but its hook was handed no cache as '{attention_call.cache_argument}': the positions would be wrong. This "
            "transformers version may hand caches on in another way: use a version that pe_swap was tested with, or use_cache=False."
        )


def autocasts(x: Tensor) -> bool:
    """Tell whether operations on a tensor's device run under autocast."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def guarded(function: Callable[..., AttentionOutput]) -> Callable[..., AttentionOutput]:
    """Return an attention function that refuses a call whose positions, or whose cache, got lost on the way to it.

    It runs outside autocast: queries, keys and values come in the dtype that autocast chose, and what schemes compute in float32 (counts,
    decays, biases) has to stay so.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, *args: Any, attention_call: AttentionCall | None = None, **kwargs: Any
    ) -> AttentionOutput:
        """Check, then attend; arguments and result as those of `function`."""
        if attention_call is None:
            refuse_unbound(module)
        else:
            refuse_unseen_cache(attention_call, query.shape[2], key.shape[2])
        if autocasts(query):
            with torch.autocast(query.device.type, enabled=False):
                return function(module, query, key, *args, attention_call=attention_call, **kwargs)
        return function(module, query, key, *args, attention_call=attention_call, **kwargs)

    return attention


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_call: AttentionCall | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """Attention step by step, with the probabilities returned; `output_attentions` needs it.

    Args:
        module: the attention module.
        query: `[batch, heads, q_len, head_dim]`.
        key: `[batch, heads, kv_len, head_dim]`.
        value: `[batch, heads, kv_len, head_dim]`.
        attention_mask: additive, `[batch, 1, q_len, kv_len]`, or None.
        scaling: factor on `query . key`.
        dropout: probability, on the attention probabilities.
        attention_call: what the pre-hook handed on; None for cross-attention.
        is_causal: transformers' override of the module's own flag.
        kwargs: what transformers passes along and no backend here reads.

    Returns:
        The output, `[batch, q_len, heads, head_dim]`, and the probabilities, `[batch, heads, q_len, kv_len]`.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # GPT-2's own eager path scores in float32 under this option; it looks for the name 'eager', which ours is not.
    upcast = bool(getattr(module, "reorder_and_upcast_attn", False))
    causal = is_causal_call(module, query, attention_mask, is_causal)
    score_bias: Tensor | None = None
    value_bias: Callable[[Tensor], Tensor] | None = None
    if attention_call is not None:
        key, carried = attention_call.split(key, query.shape[-1])
        query, key = rotated(attention_call, query, key)
        query = scaled(attention_call, query, key.shape[2], attention_mask, causal)
        positions = attention_call.positions(key.shape[2], query.device, carried)
        bias_of_block = block_score_bias(attention_call, scaling)
        score_bias = None if bias_of_block is None else bias_of_block(query, key, positions)
        value_bias = _value_bias(attention_call, positions)
    output, probabilities = plain_attention(
        query,
        key,
        value,
        score_bias,
        attention_mask=attention_mask,
        is_causal=causal,
        scaling=scaling,
        dropout=dropout,
        upcast=upcast,
    )
    if value_bias is not None:
        output = output + value_bias(probabilities).to(output.dtype)
    return output.transpose(1, 2).contiguous(), probabilities


def _value_bias(attention_call: AttentionCall, positions: Positions) -> Callable[[Tensor], Tensor] | None:
    """Return the scheme's value bias at fixed positions, or None where it has none."""
    if "value_bias" not in attention_call.hooks:
        return None
    return lambda probabilities: attention_call.scheme.value_bias(probabilities, positions, layer=attention_call.layer)


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_call: AttentionCall | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """Attention through PyTorch's fused kernels; a bias never becomes a `[heads, q_len, kv_len]` tensor.

    Arguments and result as `eager`; the probabilities are None, and `attention_mask` may be boolean, True where a query may look.
    """
    if attention_call is None:
        return _library("sdpa")(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
        )
    hooks = attention_call.hooks
    key, carried = attention_call.split(key, query.shape[-1])
    query, key = rotated(attention_call, query, key)
    causal = is_causal_call(module, query, attention_mask, is_causal)
    query = scaled(attention_call, query, key.shape[2], attention_mask, causal)
    if hooks <= BARE_HOOKS:
        return _library("sdpa")(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if hooks <= RELATIVE_HOOKS:
        output = relative_bias_attention(
            query,
            key,
            value,
            attention_call.bias_by_distance(query.shape[2], key.shape[2], query.device),
            attention_mask=attention_mask,
            is_causal=causal,
            scaling=scaling,
            dropout=dropout,
        )
    else:
        scheme, layer = attention_call.scheme, attention_call.layer

        def value_bias(probabilities: Tensor, positions: Positions) -> Tensor:
            return scheme.value_bias(probabilities, positions, layer=layer)

        def paired(query: Tensor, key: Tensor, positions: Positions) -> FoldedBias | None:
            return scheme.fold_bias_into_query_key(query, key, positions, scaling=scaling, layer=layer)

        output = blockwise_attention(
            query,
            key,
            value,
            attention_call.positions(key.shape[2], query.device, carried),
            block_score_bias(attention_call, scaling),
            value_bias if "value_bias" in hooks else None,
            attention_mask=attention_mask,
            is_causal=causal,
            scaling=scaling,
            dropout=dropout,
            paired=None if hooks & {"relative_bias", "value_bias"} else paired,
        )
    return output.transpose(1, 2).contiguous(), None


def flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_call: AttentionCall | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """Attention through PyTorch's FlexAttention, for schemes that rotate or have a relative bias.

    Arguments and result as `sdpa`, and `attention_mask` is a block mask where transformers made it.

    Raises:
        UnsupportedBackendError: dropout, which FlexAttention does not have; or a bias that needs a gradient, on a CPU.
    """
    if attention_call is None:
        return _library("flex_attention")(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
        )
    if dropout > 0:
        raise UnsupportedBackendError(
            f"Layer {attention_call.layer} carries the scheme '{attention_call.scheme.name}' and drops attention probabilities with "
            f"p = {dropout}, but the attention implementation is 'flex_attention', which has none. Set the configuration's dropout to "
            '0 before the model is built, or call model.set_attn_implementation("sdpa").'
        )
    query, key = rotated(attention_call, query, key)
    has_bias = "relative_bias" in attention_call.hooks
    output = flex_bias_attention(
        query,
        key,
        value,
        attention_call.bias_by_distance(query.shape[2], key.shape[2], query.device) if has_bias else None,
        attention_mask=attention_mask,
        is_causal=is_causal_call(module, query, attention_mask, is_causal),
        scaling=scaling,
        training=module.training,
    )
    return output.transpose(1, 2).contiguous(), None


def _library(name: str) -> Callable[..., AttentionOutput]:
    """Return transformers' attention function of that name."""
    function: Callable[..., AttentionOutput] = ALL_ATTENTION_FUNCTIONS[name]
    return function


def rotating(name: str) -> Callable[..., AttentionOutput]:
    """Return transformers' attention function `name` with the scheme's rotation before it, for backends that take no bias."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attention_call: AttentionCall | None = None,
        **kwargs: Any,
    ) -> AttentionOutput:
        """Rotate, then call transformers' function; arguments and result as there."""
        if attention_call is not None:
            query, key = rotated(attention_call, query, key)
        return _library(name)(module, query, key, value, attention_mask, **kwargs)

    return attention


def register_backends() -> None:
    """File every function, with the mask function it needs, in transformers' interfaces."""
    functions = {"eager": eager, "sdpa": sdpa, "flex_attention": flex}
    masks = {**ALL_MASK_ATTENTION_FUNCTIONS, "flex_attention": flex_mask}
    for library, ours in OUR_NAMES.items():
        if library != "eager" and library not in ALL_ATTENTION_FUNCTIONS:
            continue  # a kernel that this transformers version does not have yet
        AttentionInterface.register(ours, guarded(functions.get(library) or rotating(library)))
        AttentionMaskInterface.register(ours, masks[library])


register_backends()
