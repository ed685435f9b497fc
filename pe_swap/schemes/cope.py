"""CoPE: contextual position encoding.

Golovneva, Wang, Weston and Sukhbaatar, "Contextual Position Encoding: Learning to Count What's Important" (2024,
arXiv:2405.18719), equations 3 to 5: a query counts the keys behind it by gates, `g_ij = sigmoid(q_i . k_j)`,
`p_ij = sum_{t = j .. i} g_it`, and the vector at that position, interpolated between the two nearest integers, is added to the key:
`a_ij = softmax(q_i . (k_j + e[p_ij]))`. Positions are clipped to the last row; one table per layer, shared by its heads.

Differs from the paper: none beyond what its code makes precise: scores are scaled by `head_dim ** -0.5` before they open gates, and
the positional term is scaled with them. (The listing in the paper's appendix leaves the term unscaled, which a larger table makes
up for.)

`python -m pe_swap show cope` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry
from pe_swap.schemes.options import LARGEST_TABLE, SchemeOptions
from pe_swap.schemes.parameters import at_least_float32, layer_parameters, of_layer
from pe_swap.schemes.positions import Positions


def count_back(gates: Tensor) -> Tensor:
    """Return `sum_{t >= j} gates[..., t]`, the shape of `gates`: with the future's gates shut, the count from the query to key j."""
    return gates.flip(-1).cumsum(dim=-1).flip(-1)


def interpolated(by_row: Tensor, counts: Tensor) -> Tensor:
    """Return `by_row[..., p]` at fractional positions p, by a straight line between the two nearest rows.

    Args:
        by_row: `[batch, heads, q_len, rows]`.
        counts: `[batch, heads, q_len, kv_len]`, from 0 to `rows - 1`.
    """
    below = counts.detach().floor().long()
    above = (below + 1).clamp(max=by_row.shape[-1] - 1)
    share = counts - below
    return by_row.gather(-1, below) * (1 - share) + by_row.gather(-1, above) * share


@dataclass(frozen=True)
class CopeOptions(SchemeOptions):
    """Options of `cope`.

    Attributes:
        num_positions: rows of the table, for counts from 0 to one less; larger counts share the last.
    """

    scheme: ClassVar[str] = "cope"

    num_positions: int = 64

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_int("num_positions", 2, LARGEST_TABLE)


@SCHEMES.register("cope")
class Cope(Scheme):
    """`bias_ij = scaling * q_i . e[p_ij]`, `p_ij` the sum of `sigmoid(scaling * q_i . k_t)` over keys t from j to i; in logits.

    Gates after the query are shut by slot, so the empty tail of a static cache counts for nothing; padding on the left lies beyond
    every real key. Time and memory of a block are those of a few score matrices; only a block's are held at once.

    Start on a pretrained model: zeros, which is the model without its table.
    """

    Options = CopeOptions
    summary = "positions counted in context by gates of queries and keys"
    shift_invariant = True
    causal_only = True

    options: CopeOptions

    def __init__(self, options: CopeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the tables, `[num_positions, head_dim]` per layer."""
        super().__init__(options, geometry, layers)
        self.tables = layer_parameters(layers, options.num_positions, geometry.head_dim)
        self.reset_parameters()

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias; see `Scheme.score_bias`. Every query is multiplied by every row of the table once."""
        counts = self.counts(query, key, positions, scaling)
        by_row = torch.matmul(query, of_layer(self.tables, layer).to(query.dtype).T).to(counts.dtype)
        return interpolated(by_row, counts) * scaling

    def counts(self, query: Tensor, key: Tensor, positions: Positions, scaling: float) -> Tensor:
        """Return `p_ij`, `[batch, heads, q_len, kv_len]`, at least float32, from 0 to `num_positions - 1`.

        Scores are taken in float32: rounded to bfloat16 one by one, they would move a long count by whole positions.
        """
        dtype = at_least_float32(query.dtype)
        gates = torch.sigmoid(torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)) * scaling)
        gates = gates.masked_fill(positions.distance > 0, 0.0)
        return count_back(gates).clamp(max=self.options.num_positions - 1)

    def reset_parameters(self) -> None:
        """Set every table to zeros."""
        for table in self.tables.values():
            nn.init.zeros_(table)
