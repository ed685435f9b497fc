"""What a scheme may know of the model that it is put into: its sizes, and its own positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that a scheme may depend on.

    Attributes:
        hidden_size: width of the hidden states.
        num_heads: query heads per layer; where heads of keys are shared by groups, there are fewer of those.
        head_dim: width of one head.
        num_layers: self-attention layers.
        is_causal: True for decoders; an encoder needs a scheme's symmetric or two-sided form.
        trained_length: length that the model was trained with, in positions: for a table, its rows.
        input_size: width of the token embeddings, to which positions are added; left out, `hidden_size`.
        sides: rows and columns of the patches that the model was trained with; empty where tokens stand in one row.
    """

    hidden_size: int
    num_heads: int
    head_dim: int
    num_layers: int
    is_causal: bool
    trained_length: int
    input_size: int = 0
    sides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Write out the width of the token embeddings."""
        if not self.input_size:
            object.__setattr__(self, "input_size", self.hidden_size)

    @property
    def axes(self) -> int:
        """How many numbers a position is: 1 in a text, 2 in an image."""
        return len(self.sides) or 1

    @property
    def longest_side(self) -> int:
        """The trained length along one axis, in positions."""
        return max(self.sides, default=self.trained_length)


@dataclass(frozen=True, eq=False)
class Native:
    """The positions that a model has of its own, as far as a scheme's options and its start may follow them.

    Attributes:
        table: the position table, `[trained_length, input_size]`, float32; None for a model without one, or without it any more.
        token_rms: root mean square of the token embeddings: the size of an input vector where there is no table.
        options: the model's own values by the name of the option that has them, such as `base`, `fraction`, `layout`, `rope_type`, or
            `num_buckets`.
        bias_table: the model's own bias per bucket and head, `[num_buckets, num_heads]`, float32; of pairs of row and column distances,
            `[num_layers or 1, entries, num_heads]`, as `joint` orders them; or None.
    """

    table: Tensor | None = None
    token_rms: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    bias_table: Tensor | None = None
