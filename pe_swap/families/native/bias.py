"""Native positions as a bias that all layers add to their scores: the first layer works it out (T5), or the model does (BLOOM, MPT)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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

    def neutral(self, hidden_states: Tensor, num_keys: Callable[[], int]) -> Tensor | None:
        """Return a bias of zero for every pair, of as few elements as the family's own addition takes; None where it takes that.

        Args:
            hidden_states: `[batch, q_len, hidden_size]`.
            num_keys: returns the number of keys, those of a cache included.
        """
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

    def neutral(self, hidden_states: Tensor, num_keys: Callable[[], int]) -> Tensor:
        """Return a bias of zero for every pair, `[1, 1, 1, num_keys]`, so that the first layer works none out.

        One number for all keys would do on a CPU. Kernels for GPUs refuse a mask whose keys are one number in memory.
        """
        return hidden_states.new_zeros(1, 1, 1, num_keys())


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

    def neutral(self, hidden_states: Tensor, num_keys: Callable[[], int]) -> Tensor:
        """Return a bias of zero for every pair, `[1, 1, 1]`."""
        return hidden_states.new_zeros(1, 1, 1)


@dataclass(frozen=True)
class GridBias(AddedBias):
    """A bias for every pair of rows and columns, one table per layer or one for all, which layers are handed in their mask (BEiT).

    A layer with a scheme is handed no mask, so a swapped model takes none from its caller.

    Attributes:
        stack: see `AddedBias`.
        places: from the configuration to the paths of the modules that work biases out, a list for each bias that a layer adds: one path
            per layer, or one for all.
    """

    places: Callable[[Any], list[list[str]]]

    own_scheme = "t5"
    argument = "attention_mask"
    each_layer = True

    def trained_length(self, config: Any, native: nn.Module | None) -> int | None:
        """Return None: the stack's patches say it."""
        return None

    def require_native(self, base_model: nn.Module) -> nn.Module:
        """Return the modules that work biases out, lists in a list as in `places`; all stay where they are.

        Raises:
            FamilyError: one is not there.
        """
        lists = self.places(base_model.config)
        return nn.ModuleList(nn.ModuleList(find(base_model, path) for path in paths) for paths in lists)

    def bias_table(self, native: nn.Module | None) -> Tensor | None:
        """Return the biases of pairs of distances, `[layers or 1, entries, heads]`, float32, as `schemes/joint.py` orders them."""
        if native is None:
            return None
        biases = [torch.stack([table_of_pairs(module) for module in modules.children()]) for modules in native.children()]
        return sum(biases[1:], biases[0])

    def options(self, config: Any, layer: int, native: nn.Module | None) -> Mapping[str, Any]:
        """Return what its tables are, by the name of `t5`'s option."""
        return {"table": "joint"}

    def length_to_build(self, config: Any) -> None:
        """Return None: nothing is as long as the input."""
        return None

    def neutral(self, hidden_states: Tensor, num_keys: Callable[[], int]) -> None:
        """Return None: no mask."""
        return None


@torch.no_grad()
def table_of_pairs(module: Any) -> Tensor:
    """Return the table that a bias module of BEiT reads at its trained size, `[entries, heads]`, float32.

    The module keeps rows and columns of a trained grid that is no square in each other's place and resamples them at every call; what comes
    of that at the trained size is what the model does there.
    """
    weight: Tensor = module.relative_position_bias_table.detach().float()
    rows, columns = (2 * side - 1 for side in module.window_size)
    of_pairs, rest = weight[: rows * columns], weight[rows * columns :]
    as_kept = of_pairs.reshape(1, columns, rows, -1).permute(0, 3, 1, 2)
    read = F.interpolate(as_kept, size=(rows, columns), mode="bilinear", align_corners=False)
    return torch.cat((read[0].flatten(1).T, rest))
