"""One table for pairs of a row and a column distance: a relative bias of two dimensions that is no sum over axes.

Bao et al., "BEiT: BERT Pre-Training of Image Transformers" (ICLR 2022, arXiv:2106.08254), section 2.4, with the table of Liu et al.,
"Swin Transformer" (ICCV 2021, arXiv:2103.14030), section 3.2:

`bias[h](i, j) = table[row_i - row_j, column_i - column_j, h]`, and one entry each where i, j or both stand nowhere (class tokens).

On a grid of another size than the trained one the table is resampled to the distances of that grid, bilinear, as BEiT does: the ends of
the trained range become the ends of the new one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_swap.schemes.base import Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.parameters import layer_parameters, of_layer
from pe_swap.schemes.positions import Positions

NOWHERE = 3
"""Last entries of a table: the query stands nowhere, the key does, both do."""


def distances(sides: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many distances a grid has along each axis: `1 - side` to `side - 1`."""
    return tuple(2 * side - 1 for side in sides)


def resampled(table: Tensor, trained: tuple[int, ...], sides: tuple[int, ...]) -> Tensor:
    """Return a table for the distances of a grid, `[heads, entries]`.

    Args:
        table: `[entries, heads]`, row distances by column distances, then `NOWHERE` entries.
        trained: rows and columns of the table's own grid.
        sides: rows and columns of the grid that it is wanted for.
    """
    of_pairs = table[:-NOWHERE].T.reshape(1, -1, *distances(trained))
    if sides != trained:
        of_pairs = F.interpolate(of_pairs, size=distances(sides), mode="bilinear", align_corners=False)
    return torch.cat((of_pairs[0].flatten(1), table[-NOWHERE:].T), dim=1)


def entries_of(query_ids: Tensor, key_ids: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Return the entry of each pair in a table for a grid, `[batch or 1, q_len, kv_len]`, int64.

    Args:
        query_ids: `[batch or 1, q_len, 2]`, int64; -1 for what stands nowhere.
        key_ids: `[batch or 1, kv_len, 2]`, as `query_ids`.
        sides: rows and columns of the grid.
    """
    (rows, columns), number = sides, math.prod(distances(sides))
    difference = query_ids[:, :, None] - key_ids[:, None]
    entries = (difference[..., 0] + rows - 1) * (2 * columns - 1) + difference[..., 1] + columns - 1
    query_nowhere, key_nowhere = (query_ids[:, :, None, 0] < 0), (key_ids[:, None, :, 0] < 0)
    entries = torch.where(query_nowhere, number, entries)
    return torch.where(key_nowhere, number + 1 + query_nowhere.long(), entries)


class JointTable(Scheme):
    """A table in every layer, `[row distances * column distances + 3, heads]`.

    Attributes:
        tables: one per layer.
    """

    def __init__(self, options: SchemeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the tables."""
        super().__init__(options, geometry, layers)
        self.tables = layer_parameters(layers, math.prod(distances(geometry.sides)) + NOWHERE, geometry.num_heads)
        self.reset_parameters()

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the table's entry for every pair; see `Scheme.score_bias`."""
        bias = resampled(of_layer(self.tables, layer).float(), self.geometry.sides, positions.sides)
        entries: Tensor = positions.share_across_layers(
            ("entries of a joint table",), lambda: entries_of(positions.query_ids, positions.key_ids, positions.sides)
        )
        return bias[:, entries].transpose(0, 1)

    def reset_parameters(self) -> None:
        """Set the tables to zero: no bias."""
        for table in self.tables.values():
            nn.init.zeros_(table)

    def start_from(self, native: Native) -> None:
        """Take the model's own biases, where the start is that.

        Raises:
            OptionError: the model has no such tables.
        """
        if getattr(self.options, "start", None) != "model":
            return
        shape = next(iter(self.tables.values())).shape
        if native.bias_table is None or native.bias_table.shape[1:] != shape:
            raise self.options.refuse("start", "'zero', as this model has no bias of pairs of row and column distances")
        own = native.bias_table.expand(self.geometry.num_layers, *shape)
        with torch.no_grad():
            for layer, table in self.tables.items():
                table.copy_(own[int(layer)])
        self.keeps_function = True
