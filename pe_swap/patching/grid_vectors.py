"""How vectors reach the patches of an image: in the place of the method that adds the model's own, or behind its embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pe_swap.patching.holder import HolderRef

EMBEDDINGS = "embeddings"
"""Path of the module that makes tokens of an image, in every family whose own positions are elsewhere."""

VECTORS_ATTRIBUTE = "pe_swap_vectors"


@dataclass(frozen=True)
class GridVectors:
    """Called in place of `interpolate_pos_encoding` of the embeddings; a plain object, as `LayerBinding`.

    Attributes:
        holder_ref: where the stack's schemes are.
    """

    holder_ref: HolderRef

    def __call__(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Return the vectors of all tokens of an image, `[1, tokens, input_size]`; height and width are in pixels."""
        vectors: Tensor = self.holder_ref.holder(embeddings, height, width)
        return vectors


def add_to_patches(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Add the vectors of the scheme on the input to the patches, which follow the tokens that stand nowhere: a forward hook."""
    ref: HolderRef = getattr(module, VECTORS_ATTRIBUTE)
    pixels: Tensor = args[0] if args else kwargs["pixel_values"]
    vectors = ref.holder.grid_vectors(*pixels.shape[-2:])
    first = tokens.shape[1] - vectors.shape[1]
    return torch.cat((tokens[:, :first], tokens[:, first:] + vectors), dim=1)


def hook_embeddings(module: nn.Module, holder_ref: HolderRef) -> None:
    """Let a module that makes tokens add the vectors of a holder's scheme."""
    setattr(module, VECTORS_ATTRIBUTE, holder_ref)
    module.register_forward_hook(add_to_patches, with_kwargs=True)


def unhook_embeddings(module: nn.Module) -> None:
    """Undo `hook_embeddings`, by the function's identity; see `remove_pre_hook`."""
    for key, registered in list(module._forward_hooks.items()):
        if registered is add_to_patches:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            delattr(module, VECTORS_ATTRIBUTE)
