"""Native positions as a bias that all layers add to their scores: the first layer works it out (T5), or the model does (BLOOM, MPT)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pe_swap.families.native.base import NativePositions, find

NAME = "positional_schemes"
"""Name of the holder: such a model has no module in whose place it could stand."""


@dataclass(frozen=True)
class AddedBias(NativePositions):
    """A bias that every layer is handed, and adds to its scores.

    Attributes:
        stack: path of the stack, relative to the base model; the holder of the schemes becomes a module of it.
        each_layer: every layer is handed the bias by the model; False where the first works it out and hands it on.
    """

    stack: str
    each_layer: ClassVar[bool]

    kind = "bias"
    keeps_layers = True

    @property
    def holder_path(self) -> str:
        """A place of its own in the stack."""
        return f"{self.stack}.{NAME}" if self.stack else NAME

    def neutral(self, hidden_states: Tensor) -> Tensor | None:
        """Return a bias of zero for every pair, of as few elements as the family's own addition takes; None where it takes that."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bias(AddedBias):
    """A relative bias in buckets, handed from layer to layer as `position_bias`.

    Attributes:
        stack: see `AddedBias`.
        first_layer: path of the attention module that holds the table and works the bias out.
        length: the length that such models were trained at, in positions: no configuration says it.
        table_name: name of the table in it.
    """

    first_layer: str
    length: int
    table_name: str = "relative_attention_bias"

    own_scheme = "t5"
    argument = "position_bias"
    each_layer = False

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


@dataclass(frozen=True)
class Alibi(AddedBias):
    """ALiBi's bias, which the model works out from its mask and hands to every layer; with the slopes of `alibi`.

    Attributes:
        stack: see `AddedBias`.
        bias_argument: the name under which a layer is handed the bias, of three dimensions.
        first_layer: path of the first attention module.
        length: the length that such models were trained at, in positions; None where the configuration says it.
        length_field: the configuration's field that says it.
    """

    bias_argument: str
    first_layer: str
    length: int | None = None
    length_field: str = ""

    own_scheme = "alibi"
    each_layer = True

    @property
    def argument(self) -> str:  # type: ignore[override]  # a class attribute of other kinds
        """The name under which a layer is handed the bias."""
        return self.bias_argument

    def trained_length(self, config: Any, native: nn.Module | None) -> int | None:
        """Return what the configuration says, or `length`."""
        return self.length if self.length is not None else getattr(config, self.length_field)

    def require_native(self, base_model: nn.Module) -> nn.Module:
        """Return the first attention module, which adds the bias: no module works it out.

        Raises:
            FamilyError: it is not there.
        """
        return find(base_model, self.first_layer)

    def length_to_build(self, config: Any) -> int | None:
        """Return the length that the model was trained at: the model works its bias out at that length."""
        return getattr(config, self.length_field) if self.length_field else None

    def neutral(self, hidden_states: Tensor) -> Tensor:
        """Return a bias of zero for every pair, `[1, 1, 1]`."""
        return hidden_states.new_zeros(1, 1, 1)


@dataclass(frozen=True)
class GridBias(AddedBias):
    """A bias for every pair of rows and columns, one table per layer or one for all, which layers are handed in their mask (BEiT).

    A layer with a scheme is handed no mask, so a swapped model takes none from its caller.

    Attributes:
        stack: see `AddedBias`.
        place: from the configuration to the path of the first module that works the bias out.
    """

    place: Callable[[Any], str]

    own_scheme = None
    argument = "attention_mask"
    each_layer = True

    def trained_length(self, config: Any, native: nn.Module | None) -> int | None:
        """Return None: the stack's patches say it."""
        return None

    def require_native(self, base_model: nn.Module) -> nn.Module:
        """Return the first module that works the bias out; all stay where they are.

        Raises:
            FamilyError: it is not there.
        """
        return find(base_model, self.place(base_model.config))

    def length_to_build(self, config: Any) -> None:
        """Return None: nothing is as long as the input."""
        return None

    def neutral(self, hidden_states: Tensor) -> None:
        """Return None: no mask."""
        return None
