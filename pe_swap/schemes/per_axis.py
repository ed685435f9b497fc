"""A scheme of one dimension on each axis of a grid.

* Biases of the distance add up: `bias(i, j) = sum_a bias_a(j_a - i_a)`, each axis with parameters of its own, as the decomposed relative
  positions of Li et al., "MViTv2" (CVPR 2022, arXiv:2112.01526), section 4.1, do for vectors.
* Vectors share the width, each axis an equal part of it, as the sinusoids of He et al., "Masked Autoencoders Are Scalable Vision Learners"
  (CVPR 2022, arXiv:2111.06377). Rows come first; the authors' code has columns first.

A pair in which a token stands nowhere (class and register tokens) gets no bias. Rotations need no copy per axis; see `rotary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from pe_swap.errors import OptionError
from pe_swap.schemes.base import Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.joint import JointTable
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.positions import Positions

SMALL = 2**22
"""Numbers: a bias of a block with no more of them is kept for the other layers of a call, where it is the same for all."""


def built(scheme_class: type[Scheme], options: SchemeOptions, geometry: Geometry, layers: tuple[int, ...]) -> Scheme:
    """Return the scheme for a model: the scheme itself, or on a grid one copy of it per axis, or a joint table, where it acts so."""
    if geometry.sides and scheme_class.on_a_grid == "summed" and getattr(options, "table", None) == "joint":
        return JointTable(options, geometry, layers)
    if geometry.sides and scheme_class.on_a_grid != "itself":
        return PerAxis(scheme_class, options, geometry, layers)
    return scheme_class(options, geometry, layers)


def resolved(options: SchemeOptions, on_a_grid: str | None, geometry: Geometry, native: Native) -> SchemeOptions:
    """Return resolved options; those of a scheme with a copy per axis follow the length of an axis."""
    if geometry.sides and on_a_grid != "itself":
        geometry = replace(geometry, trained_length=geometry.longest_side)
    return options.resolve(geometry, native)


class PerAxis(Scheme):
    """One copy of a scheme per axis of a grid.

    Attributes:
        parts: the copies, in the order of the axes.
    """

    def __init__(self, scheme_class: type[Scheme], options: SchemeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the copies.

        Args:
            scheme_class: the scheme of one dimension.
            options: as `Scheme`.
            geometry: as `Scheme`, with `sides`.
            layers: as `Scheme`.

        Raises:
            OptionError: as the scheme; or vectors whose width the axes cannot share equally.
        """
        super().__init__(options, geometry, layers)
        joins = scheme_class.on_a_grid == "joined"
        if joins and geometry.input_size % geometry.axes:
            raise OptionError(
                f"{options.scheme}: token embeddings are {geometry.input_size} wide; the width must be a multiple of {geometry.axes}, "
                "which the axes of a grid share. Choose a scheme inside attention."
            )
        width = geometry.input_size // geometry.axes if joins else geometry.input_size
        first, *_ = parts = [
            scheme_class(options, replace(geometry, trained_length=side, input_size=width, sides=()), layers)
            for side in geometry.sides
        ]
        self.parts = nn.ModuleList(parts)
        self._hooks = frozenset("score_bias" if hook == "relative_bias" else hook for hook in first.hooks)
        self._adds_up = "relative_bias" in first.hooks
        self.tells_direction = first.tells_direction
        self.bias_is_shared = self._adds_up and first.bias_is_shared

    def encode_grid(self, sides: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the vectors of the axes side by side; see `Scheme.encode_grid`."""
        vectors = []
        for axis, (part, side) in enumerate(zip(self.of_axes(), sides, strict=True)):
            along = part.encode(torch.arange(side, device=device)[None])
            shape = [side if other == axis else 1 for other in range(len(sides))]
            vectors.append(along.reshape(*shape, -1).expand(*sides, -1))
        return torch.cat(vectors, dim=-1).reshape(1, math.prod(sides), -1)

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the sum of the biases of the axes; see `Scheme.score_bias`."""
        if not self._adds_up:

            def of_row(part: Scheme, at: Positions, row: slice) -> Tensor:
                return part.score_bias(query[row], key[row], at, scaling=scaling, layer=layer)

            return self.sum_over_axes(positions, of_row) * stands(positions)
        if not self.bias_is_shared or query.shape[1] * query.shape[2] * key.shape[2] > SMALL:
            return self.relative_bias_of_pairs(positions, layer)
        key_of_bias = ("bias of axes", self.options.scheme, self.layers)
        bias: Tensor = positions.share_across_layers(key_of_bias, lambda: self.relative_bias_of_pairs(positions, layer))
        return bias

    def relative_bias_of_pairs(self, positions: Positions, layer: int) -> Tensor:
        """Return the sum over the axes of `relative_bias` at a pair's distance, `[batch or 1, heads, q_len, kv_len]`, float32.

        An axis has few distances and many pairs: each distance is computed once, and a last entry, 0, is for pairs without positions.
        """
        query_ids, key_ids = positions.query_ids[:, :, None], positions.key_ids[:, None]
        nowhere = (query_ids < 0) | (key_ids < 0)
        distance = key_ids - query_ids  # [batch or 1, q_len, kv_len, axes]
        total: Tensor | None = None
        for axis, (part, side) in enumerate(zip(self.of_axes(), positions.sides, strict=True)):
            table = part.relative_bias(torch.arange(1 - side, side, device=distance.device), layer=layer)
            table = torch.cat((table, table.new_zeros(len(table), 1)), dim=1)
            rows = torch.where(nowhere[..., axis], 2 * side - 1, distance[..., axis] + side - 1)
            bias = table[:, rows]
            total = bias if total is None else total + bias
        assert total is not None
        return total.transpose(0, 1)

    def value_bias(self, probabilities: Tensor, positions: Positions, *, layer: int) -> Tensor:
        """Return the sum over the axes; see `Scheme.value_bias`. Pairs without positions take no part."""
        probabilities = probabilities * stands(positions)

        def of_row(part: Scheme, at: Positions, row: slice) -> Tensor:
            return part.value_bias(probabilities[row], at, layer=layer)

        return self.sum_over_axes(positions, of_row)

    def sum_over_axes(self, positions: Positions, of_row: Callable[[Scheme, Positions, slice], Tensor]) -> Tensor:
        """Return the sum over the axes of what `of_row` gives for a copy, its positions, and the rows of the batch that stand there."""
        rows = len(positions.query_ids)
        slices = [slice(None)] if rows == 1 else [slice(row, row + 1) for row in range(rows)]
        by_row = []
        for row, which in enumerate(slices):
            terms = [of_row(part, positions.along(axis, row), which) for axis, part in enumerate(self.of_axes())]
            by_row.append(sum(terms[1:], terms[0]))
        return torch.cat(by_row)

    def start_from(self, native: Native) -> None:
        """Let each copy take what it needs; none of them alone is the model's own positions."""
        for part in self.of_axes():
            part.start_from(native)

    def reset_parameters(self) -> None:
        """Set every parameter of every copy to its start."""
        for part in self.of_axes():
            part.reset_parameters()

    def of_axes(self) -> list[Scheme]:
        """Return the copies, in the order of the axes."""
        return [part for part in self.parts if isinstance(part, Scheme)]


def stands(positions: Positions) -> Tensor:
    """Return True for pairs in which both tokens stand somewhere, `[batch or 1, 1, q_len, kv_len]`."""
    queries, keys = (positions.query_ids >= 0).all(-1), (positions.key_ids >= 0).all(-1)
    return (queries[:, :, None] & keys[:, None, :])[:, None]
