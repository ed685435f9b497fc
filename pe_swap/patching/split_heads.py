"""Tensor parallelism: the heads of a layer are split over processes, and each process has all of a scheme's weights."""

from __future__ import annotations

from torch import nn

from pe_swap.attention.names import BINDING_ATTRIBUTE
from pe_swap.errors import UnsupportedModelError
from pe_swap.patching.binding import LayerBinding
from pe_swap.schemes.base import Scheme


def require_whole_heads(attention: nn.Module, layer: int, scheme: Scheme, hooks: frozenset[str]) -> None:
    """Refuse a layer whose heads are split, where the scheme has numbers for each of them: it knows nothing of which are at hand.

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
    """Tell whether transformers has split an attention module over processes; FSDP, which gathers weights for a call, does not count."""
    if any("_hf_tp_plan" in vars(module) for module in attention.modules()):  # older versions of transformers
        return True
    meshes = (getattr(parameter, "device_mesh", None) for parameter in attention.parameters())
    return any("tp" in (mesh.mesh_dim_names or ()) for mesh in meshes if mesh is not None)
