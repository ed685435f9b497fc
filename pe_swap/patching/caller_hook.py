"""The pre-hook of the module that is called with ids, mask and cache: position ids are worked out here, once per forward pass.

They are counted from 0, as the family counts, and travel to every layer in one keyword argument, beside what layers share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pe_swap.attention.shared_in_call import ARGUMENT, SharedInCall
from pe_swap.errors import UnsupportedModelError
from pe_swap.families import Stack
from pe_swap.families.attention_modules.interface import CACHE_ARGUMENTS
from pe_swap.families.native import GridBias
from pe_swap.families.native.base import as_rows, count
from pe_swap.families.native.grid import METHOD, PatchLayout
from pe_swap.patching.devices import bring_back_offloaded, gather_own_shards, on_device
from pe_swap.patching.holder import HolderRef, SchemeHolder
from pe_swap.patching.layer_cache import self_attention_cache
from pe_swap.schemes.positions import slots_from

CALLER_ATTRIBUTE = "pe_swap_caller"


@dataclass(frozen=True)
class CallerBinding:
    """What the pre-hook needs; a plain object, as `LayerBinding`.

    Attributes:
        holder_ref: where the stack's schemes are.
        stack: the stack's description.
        first_id: the position id of a row's first token, as the family counts.
        pad_token_id: the id of padding, where the family counts tokens that are not padding.
        token_scale: factor on the token embeddings outside their module.
        parameters: names of the parameters of the module's `forward`, in order; read here, once, and not in a compiled graph.
    """

    holder_ref: HolderRef
    stack: Stack
    first_id: int
    pad_token_id: int | None
    token_scale: float
    parameters: tuple[str, ...]


def prepare_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Work out position ids, let the scheme on the input act, and start what the layers of the call share."""
    binding: CallerBinding = getattr(module, CALLER_ATTRIBUTE)
    holder = binding.holder_ref.holder
    bring_back_offloaded(holder)
    gather_own_shards(holder)
    kwargs = {**dict(zip(binding.parameters, args, strict=False)), **kwargs}
    if holder.patches is not None:
        return (), with_patches(binding, holder.patches, kwargs)
    tokens: Tensor | None = kwargs.get("input_ids")
    embeddings: Tensor | None = kwargs.get("inputs_embeds")
    if (tokens is None) == (embeddings is None):
        return (), kwargs  # the module raises the error its users know
    position_ids = zero_based_ids(binding, holder, kwargs)
    if "position_ids" in binding.parameters:
        given = kwargs.get("position_ids")
        kwargs["position_ids"] = as_rows(given) if given is not None else position_ids + binding.first_id
    if binding.stack.fills_token_type_ids and kwargs.get("token_type_ids") is None:
        shape = tokens.shape if tokens is not None else embeddings.shape[:-1]  # type: ignore[union-attr]  # one of them is given
        kwargs["token_type_ids"] = torch.zeros(shape, dtype=torch.long, device=position_ids.device)
    add_to_input(binding, holder, position_ids, kwargs)
    kwargs.setdefault(ARGUMENT, SharedInCall(position_ids))
    return (), kwargs


def with_patches(binding: CallerBinding, patches: PatchLayout, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call on images, with row and column of every token for the layers to share."""
    pixels: Tensor | None = kwargs.get("pixel_values")
    if pixels is None:
        return kwargs  # the module raises the error its users know
    if isinstance(binding.stack.native, GridBias) and kwargs.get("attention_mask") is not None:
        raise UnsupportedModelError(
            "attention_mask is given, but this family hands its own positions to its layers in the mask, and layers with a scheme are "
            "handed none. Leave attention_mask out."
        )
    if binding.stack.native.kind == "grid" and METHOD in binding.parameters:
        kwargs[METHOD] = True  # that method is the holder's, and takes images of any size
    sides = patches.sides(*pixels.shape[-2:])
    if patches.kept is not None and kwargs.get("noise") is None:  # drawn here as the model would draw it next
        kwargs["noise"] = torch.rand(len(pixels), sides[0] * sides[1], device=pixels.device)
    kwargs.setdefault(ARGUMENT, SharedInCall(patches.position_ids(sides, pixels.device, kwargs.get("noise")), sides=sides))
    return kwargs


def zero_based_ids(binding: CallerBinding, holder: SchemeHolder, kwargs: dict[str, Any]) -> Tensor:
    """Return the position ids of a call, `[batch or 1, length]`, int64: those given, or what the family counts.

    Raises:
        UnsupportedModelError: ids for a family that hands none on, whose layers would count others.
    """
    given: Tensor | None = kwargs.get("position_ids")
    if given is not None:
        if binding.stack.ids_from_mask:
            raise UnsupportedModelError(
                "This family takes no position_ids, and unswapped it would ignore these; its layers count what the mask lets through. "
                "Leave position_ids out, and give an attention_mask where rows are padded."
            )
        return holder.zero_based(as_rows(given))
    tokens, embeddings, mask = kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    source: Tensor = embeddings[..., 0] if tokens is None else tokens  # type: ignore[index]  # one of them is given
    length, device = source.shape[-1], source.device
    first = cached_length(kwargs)
    if binding.stack.counts == "tokens" and tokens is not None and binding.pad_token_id is not None:
        real = (tokens != binding.pad_token_id).long()
        numbered: Tensor = (real.cumsum(-1) + first) * real - 1
        return numbered.clamp(min=0)
    if binding.stack.counts == "mask" and isinstance(mask, Tensor) and mask.dim() == 2:
        counted: Tensor = (mask.long().cumsum(-1) - 1).clamp(min=0)
        # A mask as long as the buffer of a static cache goes on behind these tokens.
        return counted if counted.shape[-1] == length else counted.index_select(-1, slots_from(first, length, counted.device))
    return count(first, length, device)


def cached_length(kwargs: dict[str, Any]) -> int | Tensor:
    """Return the number of cached tokens of a call."""
    for name in CACHE_ARGUMENTS:
        if kwargs.get(name) is not None:
            cached: int | Tensor = self_attention_cache(kwargs[name]).get_seq_length()
            return cached
    return 0


def add_to_input(binding: CallerBinding, holder: SchemeHolder, position_ids: Tensor, kwargs: dict[str, Any]) -> None:
    """Replace the token embeddings of a call by what the scheme on the input makes of them; tables add their vectors themselves."""
    if not holder.acts_on_input:
        return
    embeds = holder.input_hook("embed")
    adds = None if binding.stack.native.kind == "table" else holder.input_hook("encode")
    scheme = embeds or adds
    if scheme is None:
        return
    tokens, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if embeddings is None:
        assert tokens is not None
        if tokens.dim() != 2:
            raise UnsupportedModelError(
                f"The scheme '{scheme.name}' replaces token embeddings and needs input_ids of shape [batch, length], got "
                f"{list(tokens.shape)}. Flatten the choices into the batch, or use a scheme that adds a vector."
            )
        embeddings = holder.tokens.module(tokens) * binding.token_scale
    there = on_device(scheme, embeddings.device)
    kwargs["input_ids"] = None
    if embeds is not None:
        kwargs["inputs_embeds"] = there.embed(embeddings, position_ids)
    else:
        kwargs["inputs_embeds"] = embeddings + there.encode(position_ids).to(embeddings.dtype)
