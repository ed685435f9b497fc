"""What every kind of native positions answers.

A kind is a frozen dataclass: data about where positions are, and the verbs that patching needs. What a scheme does is no part of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pe_swap.errors import FamilyError


class Holder(nn.Module):
    """What a kind needs of the module that holds the schemes; `pe_swap.patching.holder` has the whole of it.

    Attributes:
        kept: modules of the model's own that the holder calls, under names that the kind chooses.
        handed_to_all: name in `kept` of what every layer is handed where nothing else is said.
        fade: factor on the model's own positions where they act beside the schemes, in a transition; else 0.
    """

    kept: nn.ModuleDict
    handed_to_all: str
    fade: float

    @property
    def device(self) -> torch.device:
        """The device of the token embeddings."""
        raise NotImplementedError

    @property
    def replaced(self) -> nn.Module:
        """The model's own positions, that a swap in this process has replaced."""
        raise NotImplementedError

    def zero_based(self, position_ids: Tensor) -> Tensor:
        """Return position ids counted from 0, where the family counts from elsewhere; padding gets 0."""
        raise NotImplementedError

    def vectors(self, position_ids: Tensor) -> Tensor:
        """Return what the input scheme adds at these ids, or a zero without dimensions where none adds anything."""
        raise NotImplementedError

    def grid_vectors(self, height: int, width: int) -> Tensor:
        """Return what is added to the tokens of an image of this size in pixels."""
        raise NotImplementedError


@dataclass(frozen=True)
class NativePositions(ABC):
    """Native positions of one kind.

    Attributes:
        kind: the kind's name, in errors and lists.
        own_scheme: the scheme of ours that these positions are; None where no scheme is.
        keeps_layers: layers that get no scheme keep the model's own positions. False where all layers share them through the input.
        argument: name under which an attention module is handed the model's own positions, or None where it is handed none.
    """

    kind: ClassVar[str]
    own_scheme: ClassVar[str | None]
    keeps_layers: ClassVar[bool]
    argument: ClassVar[str | None] = None

    @property
    def is_embedding(self) -> bool:
        """Whether the positions are an `nn.Embedding`, for whose weight the holder saves a stand-in under its name."""
        return False

    @property
    @abstractmethod
    def holder_path(self) -> str:
        """Path of the module that holds the schemes, relative to the base model."""

    @abstractmethod
    def trained_length(self, config: Any, native: nn.Module | None) -> int | None:
        """Return how many positions the model was trained with, or None where nothing says so.

        Args:
            config: the unswapped configuration.
            native: the module of the model's own positions, or None in a model that was loaded already swapped.
        """

    @abstractmethod
    def require_native(self, base_model: nn.Module) -> nn.Module:
        """Return the module of the model's own positions, which a swap silences or takes out; nothing is changed.

        Raises:
            FamilyError: another module is there, so that something else has patched the model.
        """

    def acts_in(self, config: Any, layer: int) -> bool:
        """Tell whether the model's own positions act in a layer: in some models only in some."""
        return True

    def table(self, config: Any, native: nn.Module | None) -> Tensor | None:
        """Return the vectors of the trained positions, `[trained_length, width]`, float32, where a table holds them."""
        return None

    def length_to_build(self, config: Any) -> int | None:
        """Return what the length field says while a saved swapped model is built; None leaves it.

        Args:
            config: the unswapped configuration.
        """
        return getattr(config, "max_position_embeddings", None)

    def prefix(self, native: nn.Module | None) -> Tensor | None:
        """Return the vectors of tokens that stand nowhere, `[rows, width]`, float32, where a table has such rows before the others."""
        return None

    def empty_prefix(self, width: int) -> Tensor | None:
        """Return room for what `prefix` returns, or None."""
        return None

    def bias_table(self, native: nn.Module | None) -> Tensor | None:
        """Return the biases per bucket and head, `[buckets, heads]`, float32, where the model has such."""
        return None

    def options(self, config: Any, layer: int, native: nn.Module | None) -> Mapping[str, Any]:
        """Return the values that the model's own positions have for options of schemes, in one layer."""
        return {}

    def stand_in(self, holder: Holder, *args: Any, **kwargs: Any) -> Any:
        """Return what the model gets where it called its own positions."""
        raise NotImplementedError


def find(base_model: nn.Module, path: str) -> nn.Module:
    """Return the module at `path`.

    Raises:
        FamilyError: it is not there.
    """
    try:
        return base_model.get_submodule(path)
    except AttributeError as error:
        raise FamilyError(
            f"{type(base_model).__name__} has no module '{path}', where its family expects one; nothing was patched. Use a transformers "
            "version that pe_swap was tested with, or update pe_swap."
        ) from error


def as_rows(position_ids: Tensor) -> Tensor:
    """Return position ids as `[batch or 1, length]`: transformers takes `[length]` too."""
    return position_ids if position_ids.dim() > 1 else position_ids[None]


def count(first: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Return `first + [0, ..., length - 1]` as `[1, length]`, int64."""
    return (torch.arange(length, device=device) + first)[None]
