"""Small things that several schemes are built from: parameters per layer, and the precision of their mathematics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pe_swap.errors import SwapStateError

SHARED = "shared"
"""The value of options, and the name of parameters, that all layers share."""


def layer_parameters(layers: tuple[int, ...], *shape: int, shared: bool = False) -> nn.ParameterDict:
    """Return one parameter of `shape` per layer under `str(layer)`, or a single one for all; not yet set."""
    names = [SHARED] if shared else [str(layer) for layer in layers]
    return nn.ParameterDict({name: torch.empty(shape) for name in names})


def of_layer(parameters: nn.ParameterDict, layer: int) -> Tensor:
    """Return a layer's parameter out of `layer_parameters`."""
    parameter: Tensor = parameters[SHARED] if SHARED in parameters else parameters[str(layer)]
    return parameter


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which scores of `dtype` are worked out: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_numbers(vectors: Tensor) -> None:
    """Refuse to start from vectors of the model that are shapes without numbers.

    Raises:
        SwapStateError: they are on the device `meta`.
    """
    if vectors.is_meta:
        raise SwapStateError(
            "This scheme starts from the numbers of the model's own positions, which are on the device 'meta' and have none yet. "
            "Swap after the weights are loaded."
        )


def root_mean_square(vectors: Tensor) -> float:
    """Return the root mean square of all entries: the size that a replacement of a table should have."""
    require_numbers(vectors)
    return float(vectors.detach().double().square().mean().sqrt())
