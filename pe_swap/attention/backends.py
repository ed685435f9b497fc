"""The attention functions, registered with transformers under names of our own.

Modules without a scheme (cross-attention shares the configuration) get exactly the implementation that the name stands for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pe_swap.attention.blockwise import blockwise_attention
from pe_swap.attention.call import AttentionCall
from pe_swap.attention.flex import flex_bias_attention, flex_mask
from pe_swap.attention.fused import of_one_width, per_head
from pe_swap.attention.inputs import AttentionInputs, is_causal_call, resolve_call
from pe_swap.attention.names import BINDING_ATTRIBUTE, OUR_NAMES
from pe_swap.attention.one_query import one_query_attention
from pe_swap.attention.plain import plain_attention
from pe_swap.attention.relative import relative_bias_attention
from pe_swap.errors import UnsupportedBackendError

AttentionOutput = tuple[Tensor, Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]
"""As transformers calls it: module, queries, keys, values, mask, and keywords."""

Backend = Callable[[nn.Module, AttentionInputs], AttentionOutput]
"""From an attention module and its inputs to the output, `[batch, q_len, heads, value_width]`, and probabilities where it has them."""


def eager(module: nn.Module, inputs: AttentionInputs) -> AttentionOutput:
    """Attention step by step, with the probabilities returned, `[batch, heads, q_len, kv_len]`; `output_attentions` needs them."""
    key, value = inputs.repeated
    score_bias = relative_bias = None
    positions = None if inputs.is_bare else inputs.positions
    if positions is not None:
        score_bias = None if inputs.score_bias is None else inputs.score_bias(inputs.query, key, positions)
        relative_bias = None if inputs.relative_bias is None else inputs.relative_bias(positions)
    output, probabilities = plain_attention(
        inputs.query,
        key,
        value,
        score_bias,
        attention_mask=inputs.attention_mask,
        is_causal=inputs.is_causal,
        scaling=inputs.scaling,
        dropout=inputs.dropout,
        upcast=upcasts(module),
        relative_bias=relative_bias,
        softcap=inputs.softcap,
        sinks=inputs.sinks,
    )
    if inputs.value_bias is not None and positions is not None:
        output = output + inputs.value_bias(probabilities, positions).to(output.dtype)
    return output.transpose(1, 2).contiguous(), probabilities


def sdpa(module: nn.Module, inputs: AttentionInputs) -> AttentionOutput:
    """Attention through PyTorch's fused kernels; a bias never becomes a `[heads, q_len, kv_len]` tensor."""
    if inputs.is_bare:
        return call_library("sdpa", module, inputs)
    if inputs.is_relative:
        output = relative_bias_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.bias_by_distance,
            attention_mask=inputs.attention_mask,
            is_causal=inputs.is_causal,
            scaling=inputs.scaling,
            dropout=inputs.dropout,
            first_visible=inputs.first_visible,
        )
    else:
        output = blockwise_attention(
            inputs.query,
            *inputs.repeated,
            inputs.positions,
            inputs.score_bias,
            inputs.value_bias,
            attention_mask=inputs.attention_mask,
            is_causal=inputs.is_causal,
            scaling=inputs.scaling,
            dropout=inputs.dropout,
            relative_bias=inputs.relative_bias,
            fold_bias=inputs.fold_bias,
            softcap=inputs.softcap,
            sinks=inputs.sinks,
            first_visible=inputs.first_visible,
        )
    return output.transpose(1, 2).contiguous(), None


def flex(module: nn.Module, inputs: AttentionInputs) -> AttentionOutput:
    """Attention through PyTorch's FlexAttention, for schemes that transform queries and keys or have a relative bias.

    Raises:
        UnsupportedBackendError: dropout or sinks, which FlexAttention does not have here; or a bias that needs a gradient, on a CPU.
    """
    layer = inputs.call.layer
    if inputs.dropout > 0:
        raise UnsupportedBackendError(
            f"Layer {layer} carries the scheme '{inputs.call.scheme.name}' and drops attention probabilities with "
            f"p = {inputs.dropout}, but the attention implementation is 'flex_attention', which has no dropout. Set the configuration's "
            'attention dropout to 0 before the model is built, or call model.set_attn_implementation("sdpa").'
        )
    if inputs.sinks is not None:
        raise UnsupportedBackendError(
            f"Layer {layer} carries the scheme '{inputs.call.scheme.name}' and has attention sinks (the keyword 's_aux'), but the "
            "attention implementation is 'flex_attention', which has none for a layer with a scheme. Call "
            'model.set_attn_implementation("eager").'
        )
    output = flex_bias_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.bias_by_distance if "relative_bias" in inputs.call.hooks else None,
        attention_mask=inputs.attention_mask,
        is_causal=inputs.is_causal,
        scaling=inputs.scaling,
        training=module.training,
        softcap=inputs.softcap,
    )
    return output.transpose(1, 2).contiguous(), None


def call_library(name: str, module: nn.Module, inputs: AttentionInputs) -> AttentionOutput:
    """Call transformers' attention function with queries and keys as the scheme made them; key heads stay grouped."""
    output, probabilities = library_function(name)(
        module,
        *of_one_width(inputs.query, inputs.key, inputs.value),
        inputs.attention_mask,
        scaling=inputs.scaling,
        dropout=inputs.dropout,
        **inputs.keywords,
    )
    return output[..., : inputs.value.shape[-1]], probabilities


BACKENDS: dict[str, Backend] = {"eager": eager, "sdpa": sdpa, "flex_attention": flex}
"""By transformers' name. The others take no bias, and get their queries and keys from `call_library`."""


def attention_function(name: str) -> AttentionFunction:
    """Return the function to register for transformers' implementation `name`.

    It runs outside autocast: queries, keys and values are cast as autocast would cast them here (a rotation in float32 has widened queries
    and keys, and not values), and what schemes compute in float32 (counts, decays, biases) has to stay so.
    """
    backend = BACKENDS.get(name) or partial(call_library, name)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        attention_call: AttentionCall | None = None,
        **kwargs: Any,
    ) -> AttentionOutput:
        """Attend, with the scheme that `attention_call` hands on; other arguments and the result as transformers' function `name`."""
        if attention_call is None:  # a layer without a scheme does what it did before the swap, under autocast too
            require_no_binding(module)
            return library_function(name, module)(module, query, key, value, attention_mask, *args, **kwargs)
        if not autocasts(query):
            if name == "sdpa" and attention_call.call.bias_of_one_query is not None:
                output = one_query_attention(query, key, value, attention_mask, attention_call, *args, **kwargs)
                if output is not None:
                    return output, None
            return backend(module, resolve_call(module, query, key, value, attention_mask, attention_call, *args, **kwargs))
        query, key, value = (as_autocast(x) for x in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            return backend(module, resolve_call(module, query, key, value, attention_mask, attention_call, *args, **kwargs))

    return attention


def library_function(name: str, module: nn.Module | None = None) -> AttentionFunction:
    """Return transformers' attention function of that name; for `eager`, that of the family of `module`."""
    if name == "eager":
        family_function = None if module is None or upcasts(module) else eager_function_of(module)
        return plain_function if family_function is None else family_function
    function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[name]
    return function


def eager_function_of(module: nn.Module) -> AttentionFunction | None:
    """Return the eager attention function in the modeling file of a module's class, by the name that all of them have; or None."""
    for parent in type(module).__mro__:
        function = getattr(sys.modules.get(parent.__module__), "eager_attention_forward", None)
        if function is not None:
            found: AttentionFunction = function
            return found
    return None


def plain_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """Attend without a scheme, where the family has no eager function to do it; arguments and result as there."""
    output, probabilities = plain_attention(
        query,
        per_head(key, query.shape[1]),
        per_head(value, query.shape[1]),
        None,
        attention_mask=attention_mask,
        is_causal=is_causal_call(module, query, attention_mask, is_causal),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        upcast=upcasts(module),
    )
    return output.transpose(1, 2).contiguous(), probabilities


def upcasts(module: nn.Module) -> bool:
    """Tell whether GPT-2 scores in float32 (`reorder_and_upcast_attn`): its own code for it looks for the name 'eager', ours is another."""
    return bool(getattr(module, "reorder_and_upcast_attn", False))


def require_no_binding(module: nn.Module) -> None:
    """Refuse a call of a layer with a scheme that arrives without its positions.

    Raises:
        UnsupportedBackendError: the layer has a scheme, and something between its hook and here dropped it.
    """
    binding = getattr(module, BINDING_ATTRIBUTE, None)
    if binding is not None:
        raise UnsupportedBackendError(
            f"Layer {binding.layer} carries the scheme '{binding.scheme.name}', but its attention was called without the keyword "
            "argument 'attention_call'. Call the attention module, not its forward, so that its hooks run."
        )


def autocasts(x: Tensor) -> bool:
    """Tell whether operations on a tensor's device run under autocast."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def as_autocast(x: Tensor) -> Tensor:
    """Return a tensor as autocast hands it to a matrix product: in its own dtype, unless that is no float or float64."""
    is_cast = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if is_cast else x


def register_backends() -> None:
    """File every function, with the mask function it needs, in transformers' interfaces."""
    masks = {**ALL_MASK_ATTENTION_FUNCTIONS, "flex_attention": flex_mask}
    for library, ours in OUR_NAMES.items():
        if library != "eager" and library not in ALL_ATTENTION_FUNCTIONS:
            continue  # a kernel that this transformers version does not have yet
        AttentionInterface.register(ours, attention_function(library))
        AttentionMaskInterface.register(ours, masks[library])


register_backends()
