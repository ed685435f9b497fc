"""Tensor parallelism: the heads of a layer are split over processes, and each process has all of a scheme's weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from pe_swap.attention.names import BINDING_ATTRIBUTE
from pe_swap.errors import UnsupportedModelError
from pe_swap.patching.binding import LayerBinding
from pe_swap.schemes.base import Scheme


def require_whole_heads(attention: nn.Module, layer: int, scheme: Scheme, hooks: frozenset[str]) -> None:
    """Refuse a layer whose heads are split, where the scheme has numbers for each of them and cannot say which are at hand.

    What is refused is a bias per head, and every scheme with parameters in attention: they would get the gradient of the heads at hand
    alone, and the processes would train different schemes. The others (rotations) do the same to every head.

    Args:
        attention: the self-attention module.
        layer: its index.
        scheme: its scheme.
        hooks: the hooks of the scheme that act in the attention function.

    Raises:
        UnsupportedModelError: the layer is split, and the scheme has numbers for each head, or parameters.
    """
    is_per_head = "relative_bias" in hooks or (bool(hooks) and next(scheme.parameters(), None) is not None)
    if is_per_head and has_split_heads(attention):
        raise UnsupportedModelError(
            f"The heads of layer {layer} are split over processes (tensor parallelism), and the scheme '{scheme.name}' has a bias or "
            "parameters for all of them, on every process. Load the model without tensor parallelism (device_map spreads whole layers over "
            "devices), or use a scheme that only turns queries and keys ('rope', 'xpos', 'hope') or only acts on the input."
        )


def require_whole_heads_in(model: nn.Module) -> None:
    """Refuse a loaded swapped model some of whose layers are split; see `require_whole_heads`."""
    for module in model.modules():
        binding: LayerBinding | None = vars(module).get(BINDING_ATTRIBUTE)
        if binding is not None:
            require_whole_heads(module, binding.layer, binding.scheme, binding.hooks)


def has_split_heads(attention: nn.Module) -> bool:
    """Tell whether an attention module is split over processes for their calls; FSDP, which gathers weights for a call, does not count.

    A mesh may have no names (transformers before 5.24). FSDP splits the first dimension of every weight; of heads that are split, the
    projection of the output is split in another one.
    """
    if any("_hf_tp_plan" in vars(module) for module in attention.modules()):
        return True
    split: list[Any] = [parameter for parameter in attention.parameters() if hasattr(parameter, "device_mesh")]
    return any(
        "tp" in (parameter.device_mesh.mesh_dim_names or ())
        or any(placement.is_shard() and not placement.is_shard(0) for placement in parameter.placements)
        for parameter in split
    )
