"""Native positions as a rotation by row and column, which a model works out from its image and hands to every layer (DINOv3)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pe_swap.families.native.base import Holder
from pe_swap.families.native.grid import two_sides
from pe_swap.families.native.rotary import NATIVE, UNTURNED, Rotary


class NoPatchTurned(nn.Module):
    """A rotation for no patch: the family turns the last tokens, as many as a rotation has rows.

    Attributes:
        head_dim: width of a head.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of no rows, `[0, head_dim]` each."""
        empty = pixel_values.new_empty(0, self.head_dim)
        return empty, empty


@dataclass(frozen=True)
class GridRotary(Rotary):
    """A rotation by the coordinates of patches, from -1 to 1 along each axis.

    In training it moves and stretches the coordinates at random, where the configuration says so; a rope that the family turns itself
    does too.
    """

    path: str = "rope_embeddings"

    def trained_length(self, config: Any, native: nn.Module | None) -> int | None:
        """Return None: the stack's patches say it."""
        return None

    def options(self, config: Any, layer: int, native: nn.Module | None) -> Mapping[str, Any]:
        """Return base, layout, fraction, rope type and coordinates, by the names of `rope`'s options."""
        own = {"layout": self.layout, "fraction": 1.0, "rope_type": "default", "coordinates": "centered"}
        return {"base": float(config.rope_theta), **own}

    def handed_in(
        self, options: Any, native_options: Mapping[str, Any], native: nn.Module | None, config: Any, layer: int
    ) -> str | None:
        """Return `NATIVE`, `"rope"` where only the base is another, or None; see `Rotary.handed_in`."""
        if options.scheme != "rope" or options.logit_scale is not None:
            return None
        other = {name for name, value in options.to_dict().items() if value is not None and value != native_options.get(name)}
        return None if other - {"base"} else "rope" if other else NATIVE

    def rotation_of(self, native: nn.Module, config: Any, options: Any, layers: tuple[int, ...]) -> nn.Module:
        """Return a module of the family's own class that gives the rotation with a rope scheme's base."""
        ours, build = copy.deepcopy(config), type(native)
        ours.rope_theta = options.base
        with torch.device(next(native.buffers()).device):
            return build(ours)

    def unturned(self, native: nn.Module, config: Any) -> nn.Module:
        """Return a module that turns no token."""
        return NoPatchTurned(config.hidden_size // config.num_attention_heads)

    def stand_in(self, holder: Holder, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what all layers are handed for a batch of images."""
        return holder.kept[holder.handed_to_all](x)

    def handed(
        self, holder: Holder, name: str, x: Tensor, position_ids: Tensor, layer_type: str | None, sides: tuple[int, ...]
    ) -> Any:
        """Return what one layer is handed instead: the modules read the size of an image, and no pixel."""
        if name == UNTURNED:
            return holder.kept[name](x)
        native: Any = holder.kept[name]
        patch = two_sides(native.config.patch_size)
        image = x.new_empty(()).expand(1, 1, *(side * pixels for side, pixels in zip(sides, patch, strict=True)))
        return native(image)
