"""Native positions in a table that is added to the token embeddings (an `nn.Embedding`, or a class made from it)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pe_swap.errors import FamilyError
from pe_swap.families.native.base import Holder, NativePositions, as_rows, count, find

CACHED_LENGTH = ("cache_length", "past_key_values_length")
"""What transformers calls the number of cached tokens in a call of a table: from 5.24 on, and before."""


def zero(config: Any) -> int:
    """Rows and position ids begin at 0."""
    return 0


def after_padding(config: Any) -> int:
    """Rows and position ids begin after the id of the padding token (RoBERTa and its relatives)."""
    return int(config.pad_token_id) + 1


def two(config: Any) -> int:
    """Rows begin at 2 (fairseq's tables: OPT, BART); the model adds the 2 itself, so its position ids begin at 0."""
    return 2


@dataclass(frozen=True)
class Table(NativePositions):
    """A table of vectors, one per position.

    Attributes:
        path: the table, relative to the base model. The holder of the schemes takes its place.
        first_row: from the configuration to the row of position 0; rows before it belong to padding.
    """

    path: str
    first_row: Callable[[Any], int] = zero

    kind = "table"
    own_scheme = "learned"
    keeps_layers = False

    @property
    def is_embedding(self) -> bool:
        """True."""
        return True

    @property
    def holder_path(self) -> str:
        """The table's own place."""
        return self.path

    def trained_length(self, config: Any, native: nn.Module | None) -> int | None:
        """Return the rows of the table that positions have."""
        table = self.table(config, native)
        return None if table is None else len(table)

    def require_native(self, base_model: nn.Module) -> nn.Module:
        """Return the table.

        Raises:
            FamilyError: another module is there.
        """
        found = find(base_model, self.path)
        if not isinstance(found, nn.Embedding):
            raise FamilyError(
                f"{type(base_model).__name__}.{self.path} is a {type(found).__name__}, where a table of positions (nn.Embedding) was "
                "expected: something else has patched this model. Undo that patch before the swap."
            )
        return found

    def table(self, config: Any, native: nn.Module | None) -> Tensor | None:
        """Return the rows from `first_row` on, `[trained_length, width]`, float32."""
        if native is None:
            return None
        weight: Tensor = native.weight  # type: ignore[assignment]
        return weight.detach()[self.first_row(config) :].float()

    def length_to_build(self, config: Any) -> int:
        """Return the fewest rows: the table is replaced at once."""
        return self.first_row(config) + 1

    def stand_in(self, holder: Holder, *args: Any, **kwargs: Any) -> Tensor:
        """Return the vectors for the position ids that the table is called with, or that its call implies.

        Families call their tables with ids alone, with ids as `position_ids`, or with a tensor or a shape that says how many tokens
        there are, and with how many are cached.
        """
        position_ids = kwargs.get("position_ids")
        if (
            position_ids is None
            and len(args) == 1
            and not kwargs
            and isinstance(args[0], Tensor)
            and not args[0].is_floating_point()
        ):
            position_ids = args[0]
        if position_ids is not None:
            return holder.vectors(holder.zero_based(as_rows(position_ids)))
        shape = args[0].shape if isinstance(args[0], Tensor) else args[0]
        cached = next((kwargs[name] for name in CACHED_LENGTH if name in kwargs), args[1] if len(args) > 1 else 0)
        return holder.vectors(count(cached, shape[1], holder.device))
