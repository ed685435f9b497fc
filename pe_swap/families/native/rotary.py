"""Native positions as a rotation that every attention module is handed (`position_embeddings`).

A rotary model has one module that turns position ids into sines and cosines. The same class, built with other numbers, gives every
rotation that the family itself can turn, in the family's own form (one tensor or two, which first, width, dtype), bit for bit. So:

* what a family can turn itself is handed to its layers: `type(native)(config)` with the scheme's numbers in `rope_parameters`;
* what it cannot is turned in the attention function, and the layers are handed the rotation of position 0 by transformers' default
  frequencies, whose cosine is 1 and whose sine is 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pe_swap.errors import FamilyError
from pe_swap.families.native.base import Holder, NativePositions, find

NATIVE, UNTURNED = "native", "unturned"
"""Names in `Holder.kept` of the model's own rotation and of the one that turns nothing; a scheme's index names what it hands in."""

HANDED_IN = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
"""Rope types of ours whose frequencies are transformers' own and depend on no length."""


def every_layer(config: Any, layer: int) -> bool:
    """Every layer turns queries and keys."""
    return True


@dataclass(frozen=True)
class Rotary(NativePositions):
    """A rotation, worked out once per call and handed to each layer.

    Attributes:
        path: the module that gives it, relative to the base model. The holder of the schemes takes its place.
        layout: which dimensions share a plane, `"half"` or `"interleaved"`; see `rope`.
        before_norm: queries and keys are turned before the layer normalises them, so that a rotation in the attention function would
            stand in another place. Schemes that turn and cannot be handed in are refused.
        turns: from the configuration and a layer's index to whether the layer is turned at all.
    """

    path: str = "rotary_emb"
    layout: str = "half"
    before_norm: bool = False
    turns: Callable[[Any, int], bool] = every_layer

    kind = "rotary"
    own_scheme = "rope"
    keeps_layers = True
    argument = "position_embeddings"

    @property
    def holder_path(self) -> str:
        """The rotary module's own place."""
        return self.path

    def trained_length(self, config: Any, native: nn.Module | None) -> int | None:
        """Return `max_position_embeddings`: what the configuration says the model takes."""
        length = getattr(config, "max_position_embeddings", None)
        return length if isinstance(length, int) else None

    def require_native(self, base_model: nn.Module) -> nn.Module:
        """Return the rotary module.

        Raises:
            FamilyError: what is there has no frequencies.
        """
        found = find(base_model, self.path)
        if not any(name.endswith(("inv_freq", "embed_positions")) for name, _ in found.named_buffers()):
            raise FamilyError(
                f"{type(base_model).__name__}.{self.path} is a {type(found).__name__} without frequencies (inv_freq), where the model's "
                "rotation was expected: something else has patched this model. Undo that patch before the swap."
            )
        return found

    def acts_in(self, config: Any, layer: int) -> bool:
        """Tell whether the model turns a layer at all."""
        return self.turns(config, layer)

    def parameters(self, config: Any, layer: int) -> Mapping[str, Any]:
        """Return the `rope_parameters` of one layer, as transformers spells them."""
        found = getattr(config, "rope_parameters", None) or {}
        layer_types = getattr(config, "layer_types", None)
        if layer_types and "rope_type" not in found and layer < len(layer_types):
            found = found.get(layer_types[layer]) or {}
        return dict(found)

    def options(self, config: Any, layer: int, native: nn.Module | None) -> Mapping[str, Any]:
        """Return base, layout, fraction, rope type and what belongs to it, by the names of `rope`'s options."""
        given = dict(self.parameters(config, layer))
        options: dict[str, Any] = {"layout": self.layout}
        names = {"rope_theta": "base", "partial_rotary_factor": "fraction"}
        for name, value in given.items():
            if value is not None and name != "type":
                options[names.get(name, name)] = tuple(value) if isinstance(value, list) else value
        options["base"] = float(options.get("base") or getattr(config, "rope_theta", None) or 10000.0)
        if "fraction" not in options:
            options["fraction"] = float(getattr(config, "partial_rotary_factor", None) or 1.0)
        return options

    def handed_in(
        self, options: Any, native_options: Mapping[str, Any], native: nn.Module | None, config: Any, layer: int
    ) -> str | None:
        """Return how the family itself can turn a scheme: as its own rotation, as one of its class, or not at all.

        Args:
            options: the scheme's resolved options.
            native_options: what `options` gave for the layer.
            native: the model's own rotary module.
            config: the unswapped configuration.
            layer: index of the layer.

        Returns:
            `NATIVE` where every number is the model's own, `"rope"` where the family's class can be built with the scheme's numbers, or
            None.
        """
        if not _is_whole_rope(options) or not self.turns(config, layer):
            return None
        said = {name: value for name, value in options.to_dict().items() if value is not None}
        if said == {name: value for name, value in native_options.items() if name in said} and set(native_options) <= set(said):
            return NATIVE
        same_form = all(said[name] == native_options[name] for name in ("layout", "fraction"))
        if same_form and said["rope_type"] in HANDED_IN and isinstance(getattr(config, "rope_parameters", None), dict):
            return "rope"
        return None

    def rope_parameters(self, options: Any) -> dict[str, Any]:
        """Return a rope scheme's options as transformers' `rope_parameters`."""
        names = {"base": "rope_theta", "fraction": "partial_rotary_factor"}
        said = {
            names.get(name, name): value for name, value in options.to_dict().items() if value is not None and name != "layout"
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}

    def with_parameters(self, config: Any, options: Any, layers: tuple[int, ...]) -> Any:
        """Return a copy of a configuration whose `rope_parameters` are a rope scheme's, in the layer types of `layers`."""
        ours = copy.deepcopy(config)
        parameters, layer_types = self.rope_parameters(options), getattr(config, "layer_types", None)
        if layer_types and "rope_type" not in config.rope_parameters:
            for layer_type in {layer_types[layer] for layer in layers}:
                ours.rope_parameters[layer_type] = dict(parameters)
        else:
            ours.rope_parameters = parameters
        return ours

    def rotation_of(self, native: nn.Module, config: Any, options: Any, layers: tuple[int, ...]) -> nn.Module:
        """Return a module of the family's own class that gives a rope scheme's rotation."""
        build: Any = type(native)
        with torch.device(next(native.buffers()).device):
            module: nn.Module = build(self.with_parameters(config, options, layers))
        return module

    def unturned(self, native: nn.Module, config: Any) -> nn.Module:
        """Return a module whose rotation of position 0 is cosine 1 and sine 0: of the family's class, without a scaling factor."""
        plain = copy.deepcopy(config)
        parameters = getattr(plain, "rope_parameters", None)
        if parameters:
            keep = ("rope_theta", "partial_rotary_factor")
            entries = {"": parameters} if "rope_type" in parameters else parameters
            cleaned = {
                layer_type: {"rope_type": "default", **{name: entry[name] for name in keep if name in entry}}
                for layer_type, entry in entries.items()
                if entry is not None
            }
            plain.rope_parameters = cleaned.get("", cleaned)
        build: Any = type(native)
        with torch.device(next(native.buffers()).device):
            module: nn.Module = build(plain)
        return module

    def stand_in(self, holder: Holder, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what all layers are handed: the model's own rotation where one keeps it, else that of the scheme they share."""
        name = holder.handed_to_all
        return self._rotation(holder, name, x, position_ids, *args, **kwargs)

    def handed(
        self, holder: Holder, name: str, x: Tensor, position_ids: Tensor, layer_type: str | None, sides: tuple[int, ...]
    ) -> Any:
        """Return what one layer is handed instead: `name` is an entry of `Holder.kept`, `sides` those of a grid of patches."""
        return self._rotation(holder, name, x, position_ids, *(() if layer_type is None else (layer_type,)))

    def _rotation(self, holder: Holder, name: str, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call one of the kept modules; the one that turns nothing is called at position 0, for one row that serves all.

        While the model's own rotation fades, it turns in place of that one, by its angles times the factor.
        """
        if name == UNTURNED and holder.fade:
            return holder.replaced(x, position_ids * holder.fade, *args, **kwargs)
        if name == UNTURNED:
            position_ids = torch.zeros_like(position_ids[:1, :1])
        return holder.kept[name](x, position_ids, *args, **kwargs)


class Sines(nn.Module):
    """A rotation in GPT-J's form, for any position: sines, then cosines, each `[batch or 1, length, planes]`.

    The same numbers as GPT-J's table has, row for row.

    Attributes:
        inv_freq: radians per position, one per plane; plain numbers, so that no load leaves them undefined.
        is_float32: stay in float32 whatever the dtype of the model, as CodeGen does.
    """

    def __init__(self, inv_freq: list[float], is_float32: bool) -> None:
        super().__init__()
        self.inv_freq = inv_freq
        self.is_float32 = is_float32

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return sines and cosines for position ids."""
        inv_freq = torch.tensor(self.inv_freq, dtype=torch.float32, device=position_ids.device)
        angles = position_ids[..., None].float() * inv_freq
        dtype = torch.float32 if self.is_float32 else x.dtype
        return angles.sin().to(dtype), angles.cos().to(dtype)


@dataclass(frozen=True)
class SineTable(Rotary):
    """A rotation from a table of sines and cosines that ends (GPT-J, CodeGen); ours goes on, with the same numbers.

    The table has base 10,000, and its configuration no `rope_parameters`.
    """

    layout: str = "interleaved"

    def options(self, config: Any, layer: int, native: nn.Module | None) -> Mapping[str, Any]:
        """Return what the table is of, by the names of `rope`'s options."""
        head_dim = config.hidden_size // config.num_attention_heads
        fraction = (config.rotary_dim or config.hidden_size) / head_dim
        return {"base": 10000.0, "layout": self.layout, "fraction": fraction, "rope_type": "default"}

    def handed_in(
        self, options: Any, native_options: Mapping[str, Any], native: nn.Module | None, config: Any, layer: int
    ) -> str | None:
        """Return `"rope"` where the layout and the width are the family's, or None: the table itself is used by layers without a scheme."""
        if not _is_whole_rope(options) or options.rope_type not in ("default", "linear"):
            return None
        same_form = all(getattr(options, name) == native_options[name] for name in ("layout", "fraction"))
        return "rope" if same_form else None

    def rotation_of(self, native: nn.Module, config: Any, options: Any, layers: tuple[int, ...]) -> nn.Module:
        """Return a rope scheme's rotation in the family's form, by the float32 formula that the table is made with."""
        width = _width(native)
        inv_freq = 1.0 / (options.base ** (torch.arange(0, width, 2, dtype=torch.int64, device="cpu") / width))
        return Sines((inv_freq / (options.factor or 1.0)).tolist(), config.model_type == "codegen")

    def unturned(self, native: nn.Module, config: Any) -> nn.Module:
        """Return a rotation by no angle in the family's form."""
        return Sines([0.0] * (_width(native) // 2), config.model_type == "codegen")


def _is_whole_rope(options: Any) -> bool:
    """Tell whether a scheme is `rope` and nothing beside it, in every plane: what a family's own class can be built for."""
    return options.scheme == "rope" and options.logit_scale is None and options.planes is None


def _width(native: Any) -> int:
    """Return how many dimensions of a head a table of sines turns."""
    return int(native.embed_positions.shape[-1])
