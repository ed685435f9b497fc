"""The module that stands where the model's position table stood, and holds every scheme of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pe_swap.errors import SwapStateError
from pe_swap.schemes.base import Scheme


@dataclass(frozen=True)
class TokenTable:
    """Where the token embeddings are looked up. A plain object, so that the table is not registered twice.

    Attributes:
        owner: the module that holds the table.
        attribute: its name there; looked up at each call, as resizing the vocabulary replaces the table.
    """

    owner: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        """The table."""
        module: nn.Module = getattr(self.owner, self.attribute)
        return module

    @property
    def weight(self) -> Tensor:
        """Its weight, whose dtype and device the added vectors take."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenTable:
        """Follow the owner into its copy where it is being copied too; a copy of `SchemeHolder` alone keeps the same tokens."""
        return TokenTable(memo.get(id(self.owner), self.owner), self.attribute)


@dataclass(frozen=True)
class HolderRef:
    """Where a model's `SchemeHolder` stands. A plain object, as `TokenTable`.

    Looked up at each call: tools put copies and wrappers there (PEFT's `modules_to_save`), and those are what has to act.

    Attributes:
        owner: the module that holds it.
        attribute: its name there.
    """

    owner: nn.Module
    attribute: str

    @property
    def holder(self) -> SchemeHolder:
        """What stands there: a `SchemeHolder`, or a wrapper that passes its methods on.

        Raises:
            SwapStateError: it is something else, so that a call would run without its positions.
        """
        found: Any = getattr(self.owner, self.attribute)
        if not hasattr(found, "scheme_at"):
            raise SwapStateError(
                f"{type(self.owner).__name__}.{self.attribute} is a {type(found).__name__}, where the schemes of this swapped model "
                "were: something else has replaced them. Undo that patch, or load the model again."
            )
        holder: SchemeHolder = found
        return holder


@dataclass
class Original:
    """What a swap replaced, kept to be put back bit for bit. Not part of the state dict.

    Attributes:
        table: the model's own position embedding.
        dtype: the token table's dtype at the swap.
        length: the configuration's length field at the swap.
        loss_type: the model's own name of its loss.
    """

    table: nn.Embedding
    dtype: torch.dtype
    length: int
    loss_type: str | None

    def current(self, like: Tensor) -> nn.Embedding:
        """Return the table as the model would hold it now, had it never been swapped: moved and cast with the rest."""
        self.table.to(device=like.device)
        return self.table if like.dtype == self.dtype else self.table.to(dtype=like.dtype)


def stand_in_weight() -> Tensor:
    """Return what a swapped model saves under the name of the table's weight: no table, and of no table's shape.

    An unswapped class that reads such a state, alone or as a part of another model, raises for the shape; without it, it would build a
    random table and only report that.
    """
    return torch.zeros(1)


class SchemeHolder(nn.Module):
    """Every scheme of one model, under one state-dict prefix.

    Called with position ids in the place of the model's position table, it returns the vectors that the input scheme adds, or a
    zero that broadcasts where none does.

    Attributes:
        schemes: one entry a scheme, however many layers it serves.
        scheme_of_layer: index into `schemes` for each layer, or None where the layer has no scheme.
        input_scheme: index of the scheme that acts on the input, or None.
        tokens: where the token embeddings are.
        original: what was replaced, or None in a model that was loaded already swapped.
        weight: see `stand_in_weight`.
    """

    def __init__(
        self,
        schemes: Iterable[Scheme],
        scheme_of_layer: tuple[int | None, ...],
        input_scheme: int | None,
        tokens: TokenTable,
        original: Original | None,
    ) -> None:
        super().__init__()
        self.schemes = nn.ModuleList(schemes)
        self.weight: Tensor | None
        self.register_buffer("weight", stand_in_weight())
        self.scheme_of_layer = scheme_of_layer
        self.input_scheme = input_scheme
        self.tokens = tokens
        self.original = original

    def scheme_at(self, index: int) -> Scheme:
        """Return the scheme at `index`."""
        scheme = self.schemes[index]
        assert isinstance(scheme, Scheme)
        return scheme

    def input_hook(self, hook: str) -> Scheme | None:
        """Return the input scheme where it overrides `hook`, else None."""
        if self.input_scheme is None:
            return None
        scheme = self.scheme_at(self.input_scheme)
        return scheme if hook in scheme.hooks else None

    @property
    def max_length(self) -> int | None:
        """The shortest limit of any scheme, in positions, or None where there is none."""
        limits = [limit for index in range(len(self.schemes)) if (limit := self.scheme_at(index).max_length) is not None]
        return min(limits, default=None)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the vectors for `position_ids`, `[batch or 1, length, hidden_size]`, in the token embeddings' dtype."""
        weight = self.tokens.weight
        scheme = self.input_hook("encode")
        if scheme is None:
            # A zero without dimensions: it broadcasts, and takes part in no type promotion.
            return torch.zeros((), dtype=weight.dtype, device=position_ids.device)
        vectors = scheme.encode(position_ids)
        return vectors.to(weight.dtype)

    def assignment(self) -> dict[str, Any]:
        """Return schemes, options and assignment as plain values: all a reload needs besides the weights."""
        return {
            "schemes": [
                {"name": scheme.name, "options": scheme.options.to_dict()}
                for scheme in map(self.scheme_at, range(len(self.schemes)))
            ],
            "layers": list(self.scheme_of_layer),
            "input": self.input_scheme,
        }
