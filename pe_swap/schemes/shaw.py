"""Relative position vectors in keys, and in values.

Shaw, Uszkoreit and Vaswani, "Self-Attention with Relative Position Representations" (NAACL 2018, arXiv:1803.02155), equations 3
to 5: `e_ij = q_i . (k_j + a_K[clip(j - i)]) / sqrt(d)`, `z_i = sum_j alpha_ij (v_j + a_V[clip(j - i)])`, distances clipped to
`max_distance`; one table a layer, shared by its heads. `variant="key_query"` adds `k_j . a_K[clip(j - i)] / sqrt(d)`: Huang et al.,
"Improve Transformer Models with Better Relative Position Embeddings" (Findings of EMNLP 2020, arXiv:2009.13658), method 4.

Differs from the papers: none. transformers 4's `relative_key` indexes its table by `i - j + max_position_embeddings - 1` and does
not clip: this scheme with `max_distance = max_position_embeddings - 1` and that table upside down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.positions import Positions


@dataclass(frozen=True)
class ShawOptions(SchemeOptions):
    """Options of `shaw`.

    Attributes:
        max_distance: distances beyond share the vector at it, in positions. The paper's 16 is for sentences.
        variant: `"key"`, vectors meet the query, or `"key_query"`, they meet the key as well.
        value: add vectors to the values too.
    """

    scheme: ClassVar[str] = "shaw"

    max_distance: int = 64
    variant: str = "key"
    value: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_int("max_distance", 1, 65536)
        self.require_choice("variant", ("key", "key_query"))
        self.require_bool("value")


@SCHEMES.register("shaw")
class Shaw(Scheme):
    """`bias_ij = scaling * q_i . a[clip(j - i)]`, in logits, and where asked `+ scaling * k_j . a[clip(j - i)]`.

    Start on a pretrained model: zeros, which is the model without its table.
    """

    Options = ShawOptions
    summary = "trained vectors for clipped distances, met by queries (and keys, and in values)"
    shift_invariant = True

    options: ShawOptions

    def __init__(self, options: ShawOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the tables, `[2 max_distance + 1, head_dim]` each; row `max_distance` is distance 0."""
        super().__init__(options, geometry, layers)
        self.key_tables = self._tables()
        self.value_tables = self._tables() if options.value else None
        self.reset_parameters()

    def _tables(self) -> nn.ParameterDict:
        """Return one table a layer."""
        rows = 2 * self.options.max_distance + 1
        return nn.ParameterDict({str(layer): torch.empty(rows, self.geometry.head_dim) for layer in self.layers})

    @classmethod
    def hooks_for(cls, options: SchemeOptions) -> frozenset[str]:
        """Return the hooks in use: `value_bias` only where values have vectors."""
        assert isinstance(options, ShawOptions)
        return super().hooks_for(options) - (set() if options.value else {"value_bias"})

    def reset_parameters(self) -> None:
        """Set every table to zeros."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def rows(self, distance: Tensor) -> Tensor:
        """Return the row of each distance, int64."""
        reach = self.options.max_distance
        return distance.clamp(-reach, reach) + reach

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias; see `Scheme.score_bias`.

        Every query meets every row of the table once, `[batch, heads, q_len, rows]`, and pairs pick from that: no tensor has a
        dimension for queries, keys and `head_dim` together.
        """
        table = self.key_tables[str(layer)].to(query.dtype)
        rows = self.rows(positions.distance)
        by_row = torch.matmul(query, table.T)
        bias = by_row.gather(-1, rows.expand(*by_row.shape[:2], *rows.shape))
        if self.options.variant == "key_query":
            by_row = torch.matmul(key, table.T)
            by_key = by_row.gather(-1, rows.T.expand(*by_row.shape[:2], *rows.T.shape))
            bias = bias + by_key.transpose(-1, -2)
        return bias * scaling

    def value_bias(self, probabilities: Tensor, positions: Positions, *, layer: int) -> Tensor:
        """Return `sum_j alpha_ij a_V[clip(j - i)]`; see `Scheme.value_bias`. Probabilities are summed by row first."""
        assert self.value_tables is not None
        table = self.value_tables[str(layer)].to(probabilities.dtype)
        rows = self.rows(positions.distance).expand(probabilities.shape)
        by_row = probabilities.new_zeros(*probabilities.shape[:-1], table.shape[0]).scatter_add(-1, rows, probabilities)
        return torch.matmul(by_row, table)
