"""The pre-hook of the module that turns token ids into vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pe_swap.errors import UnsupportedModelError
from pe_swap.patching.devices import bring_back_offloaded, on_device
from pe_swap.patching.holder import HolderRef
from pe_swap.patching.layer_cache import CACHE_ARGUMENTS, CACHE_LENGTH_ARGUMENTS, parameters_of, self_attention_cache
from pe_swap.schemes.positions import slots_from

INPUT_ATTRIBUTE = "pe_swap_input"


class InputBinding:
    """What the input module's pre-hook needs; a plain object, as `LayerBinding`.

    Attributes:
        holder_ref: where the model's schemes are.
        fills_token_type_ids: see `Family`.
        parameters: names of the input module's parameters, in order; read here, once, and not in a compiled graph.
    """

    def __init__(self, holder_ref: HolderRef, module: nn.Module, fills_token_type_ids: bool) -> None:
        self.holder_ref = holder_ref
        self.fills_token_type_ids = fills_token_type_ids
        self.parameters = parameters_of(module)


def embed_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Fill in what the module would look up in buffers of a fixed length, and let a scheme's `embed` replace the embeddings."""
    binding: InputBinding = getattr(module, INPUT_ATTRIBUTE)
    holder = binding.holder_ref.holder
    bring_back_offloaded(holder)
    scheme = holder.input_hook("embed")
    if scheme is None and not binding.fills_token_type_ids:
        return args, kwargs
    kwargs = {**dict(zip(binding.parameters, args, strict=False)), **kwargs}
    tokens: Tensor | None = kwargs.get("input_ids")
    embeddings: Tensor | None = kwargs.get("inputs_embeds")
    source = embeddings if tokens is None else tokens
    if source is None or (tokens is not None and embeddings is not None):
        return (), kwargs  # the module raises the error its users know
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = slots_from(_first_position(kwargs), source.shape[1], source.device)[None, :]
    if binding.fills_token_type_ids and kwargs.get("token_type_ids") is None:
        kwargs["token_type_ids"] = torch.zeros(source.shape[:2], dtype=torch.long, device=source.device)
    if scheme is not None:
        if embeddings is None:
            assert tokens is not None
            if tokens.dim() != 2:
                raise UnsupportedModelError(
                    f"The scheme '{scheme.name}' replaces token embeddings and needs input_ids of shape [batch, length], got "
                    f"{list(tokens.shape)}. Flatten the choices into the batch, or use a scheme that adds a vector."
                )
            embeddings = holder.tokens.module(tokens)
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = on_device(scheme, embeddings.device).embed(embeddings, kwargs["position_ids"])
    return (), kwargs


def _first_position(kwargs: dict[str, Any]) -> int | Tensor:
    """Return the position id of the first new token: the number of cached ones."""
    for name in CACHE_LENGTH_ARGUMENTS:
        if kwargs.get(name) is not None:
            length: int | Tensor = kwargs[name]
            return length
    for name in CACHE_ARGUMENTS:
        if kwargs.get(name) is not None:
            cached: int | Tensor = self_attention_cache(kwargs[name]).get_seq_length()
            return cached
    return 0
