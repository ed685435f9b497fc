"""Native positions as a bias that the first layer works out and all layers add to their scores (T5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pe_swap.families.native.base import NativePositions, find

NAME = "positional_schemes"
"""Name of the holder: such a model has no module in whose place it could stand."""


@dataclass(frozen=True)
class Bias(NativePositions):
    """A relative bias in buckets, handed from layer to layer as `position_bias`.

    Attributes:
        stack: path of the stack, relative to the base model; the holder of the schemes becomes a module of it.
        first_layer: path of the attention module that holds the table and works the bias out.
        length: the length that such models were trained at, in positions: no configuration says it.
        table_name: name of the table in it.
    """

    stack: str
    first_layer: str
    length: int
    table_name: str = "relative_attention_bias"

    kind = "bias"
    own_scheme = "t5"
    keeps_layers = True
    argument = "position_bias"

    @property
    def holder_path(self) -> str:
        """A place of its own in the stack."""
        return f"{self.stack}.{NAME}" if self.stack else NAME

    def trained_length(self, config: Any, native: nn.Module | None) -> int | None:
        """Return `length`."""
        return self.length

    def require_native(self, base_model: nn.Module) -> nn.Module:
        """Return the table of biases, which stays where it is.

        Raises:
            FamilyError: it is not there.
        """
        return find(base_model, f"{self.first_layer}.{self.table_name}")

    def length_to_build(self, config: Any) -> None:
        """Return None: nothing is as long as the input."""
        return None

    def bias_table(self, native: nn.Module | None) -> Tensor | None:
        """Return the biases, `[buckets, heads]`, float32."""
        weight = None if native is None else native.weight
        return weight.detach().float() if isinstance(weight, Tensor) else None

    def options(self, config: Any, layer: int, native: nn.Module | None) -> Mapping[str, Any]:
        """Return number of buckets and largest distance, by the names of `t5`'s options."""
        return {"num_buckets": config.relative_attention_num_buckets, "max_distance": config.relative_attention_max_distance}

    def neutral(self, hidden_states: Tensor) -> Tensor:
        """Return a bias of zero for every pair, `[1, 1, 1, 1]`, so that the first layer works none out."""
        return hidden_states.new_zeros(1, 1, 1, 1)
