"""Relative position vectors in keys, and in values.

Shaw, Uszkoreit and Vaswani, "Self-Attention with Relative Position Representations" (NAACL 2018, arXiv:1803.02155), equations 3
to 5: `e_ij = q_i . (k_j + a_K[clip(j - i)]) / sqrt(d)`, `z_i = sum_j alpha_ij (v_j + a_V[clip(j - i)])`, distances clipped to
`max_distance`; one table per layer, shared by its heads. `variant="key_query"` adds `k_j . a_K[clip(j - i)] / sqrt(d)`: Huang et al.,
"Improve Transformer Models with Better Relative Position Embeddings" (Findings of EMNLP 2020, arXiv:2009.13658), method 4.

Differs from the papers: none. transformers 4's `relative_key` indexes its table by `i - j + max_position_embeddings - 1` and does
not clip: this scheme with `max_distance = max_position_embeddings - 1` and that table upside down.

`python -m pe_swap show shaw` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry
from pe_swap.schemes.options import LARGEST_TABLE, SchemeOptions
from pe_swap.schemes.pairs import picked
from pe_swap.schemes.parameters import layer_parameters, of_layer
from pe_swap.schemes.positions import Positions


def clipped_row(distance: Tensor, max_distance: int) -> Tensor:
    """Return the row of each distance, `clip(distance) + max_distance`, int64: row `max_distance` is distance 0."""
    return distance.clamp(-max_distance, max_distance) + max_distance


@dataclass(frozen=True)
class ShawOptions(SchemeOptions):
    """Options of `shaw`.

    Attributes:
        max_distance: distances beyond share the vector at it, in positions. The paper's 16 is for sentences.
        variant: `"key"`, vectors are multiplied by the query, or `"key_query"`, by the key as well.
        value: add vectors to the values too.
    """

    scheme: ClassVar[str] = "shaw"

    max_distance: int = 64
    variant: str = "key"
    value: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_int("max_distance", 1, LARGEST_TABLE)
        self.require_choice("variant", ("key", "key_query"))
        self.require_bool("value")

    @property
    def unused_hooks(self) -> frozenset[str]:
        """`value_bias`, where values have no vectors."""
        return frozenset() if self.value else frozenset({"value_bias"})


@SCHEMES.register("shaw")
class Shaw(Scheme):
    """`bias_ij = scaling * q_i . a[clip(j - i)]`, in logits, and where asked `+ scaling * k_j . a[clip(j - i)]`.

    Every query is multiplied by every row of the table once, `[batch, heads, q_len, rows]`, and pairs pick from that: no tensor has a
    dimension for queries, keys and `head_dim` together.

    Start on a pretrained model: zeros, which is the model without its table.
    """

    Options = ShawOptions
    summary = "a learned vector per distance, added to keys (optionally to queries and values)"
    on_a_grid = "summed"
    shift_invariant = True

    options: ShawOptions

    def __init__(self, options: ShawOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the tables, `[2 max_distance + 1, head_dim]` per layer."""
        super().__init__(options, geometry, layers)
        rows = 2 * options.max_distance + 1
        self.key_tables = layer_parameters(layers, rows, geometry.head_dim)
        self.value_tables = layer_parameters(layers if options.value else (), rows, geometry.head_dim)
        self.reset_parameters()

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias; see `Scheme.score_bias`."""
        table = of_layer(self.key_tables, layer).to(query.dtype)
        rows = clipped_row(positions.distance, self.options.max_distance)
        bias = picked(torch.matmul(query, table.T), rows)
        if self.options.variant == "key_query":
            bias = bias + picked(torch.matmul(key, table.T), rows.T).transpose(-1, -2)
        return bias * scaling

    def value_bias(self, probabilities: Tensor, positions: Positions, *, layer: int) -> Tensor:
        """Return `sum_j alpha_ij a_V[clip(j - i)]`; see `Scheme.value_bias`.

        Probabilities are summed by row first, in float32: in a narrow dtype a GPU rounds after every one of them.
        """
        dtype = torch.promote_types(probabilities.dtype, torch.float32)
        table = of_layer(self.value_tables, layer).to(dtype)
        rows = clipped_row(positions.distance, self.options.max_distance).expand(probabilities.shape)
        by_row = torch.zeros(*probabilities.shape[:-1], table.shape[0], dtype=dtype, device=probabilities.device)
        return torch.matmul(by_row.scatter_add(-1, rows, probabilities.to(dtype)), table)

    def reset_parameters(self) -> None:
        """Set every table to zeros."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
