"""Position vectors concatenated to the token embeddings, then projected back to their width.

The alternative to a sum that introductions to the subject mention and models rarely use; no paper defines it for these models.

With `W = [W_token | W_position]`, `W [token ; position] = W_token token + W_position position`. So it is a sum, of a projected position
table (which a learned table can hold by itself) and a *linear map of the tokens*, which a sum does not have. The map can move tokens
and positions into different directions; it costs `width * (width + dim)` parameters.

`python -m pe_swap show concat` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import LARGEST_TABLE, SchemeOptions, none_is
from pe_swap.schemes.parameters import require_numbers
from pe_swap.schemes.position_range import require_within
from pe_swap.schemes.sinusoids import sinusoids

SMALLEST_DIRECTION = 1e-2
"""Directions of the sinusoids below this share of the largest are left out of the fit. Low frequencies are nearly constant over a
short table: fitting with what little they vary takes weights so large that rounding, and the first position beyond, outweigh the rest."""


def projected(tokens: Tensor, positions: Tensor, token_weight: Tensor, position_weight: Tensor) -> Tensor:
    """Return `W [token ; position]` as `W_token token + W_position position`: the two are never copied into one tensor."""
    return linear(tokens, token_weight) + linear(positions, position_weight)


def principal_directions(table: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return vectors `[rows, dim]` and a map `[size, dim]` whose product is the best fit of rank `dim` to `table`, float32.

    Where there is room (`dim` at least the width of the table), the vectors are the table, and the map is the identity, exactly.
    """
    rows, size = table.shape
    if dim >= size:
        directions, rank = torch.eye(size, dtype=table.dtype, device=table.device), size
        coordinates = table
    else:
        directions = torch.linalg.svd(table.double(), full_matrices=False).Vh[:dim]
        rank, coordinates = len(directions), table.double() @ directions.T
    vectors, weight = table.new_zeros(rows, dim), table.new_zeros(size, dim)
    vectors[:, :rank], weight[:, :rank] = coordinates.float(), directions.T.float()
    return vectors, weight


@dataclass(frozen=True)
class ConcatOptions(SchemeOptions):
    """Options of `concat`.

    Attributes:
        table: `"sinusoidal"`, which never ends, or `"learned"`, as long as the trained table.
        dim: dimensions of a position vector; None is the width of the token embeddings.
    """

    scheme: ClassVar[str] = "concat"

    table: str = "sinusoidal"
    dim: int | None = field(default=None, metadata=none_is("the hidden size"))

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("table", ("sinusoidal", "learned"))
        self.require_int("dim", 1, LARGEST_TABLE)

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedConcatOptions:
        """Write out the width of the tokens where no `dim` was given."""
        return self.written_out(ResolvedConcatOptions, native, dim=geometry.input_size)


@dataclass(frozen=True, kw_only=True)
class ResolvedConcatOptions(ConcatOptions):
    """`ConcatOptions` as they are used and saved."""

    dim: int


@SCHEMES.register("concat")
class Concat(Scheme):
    """`x_i = W [token_i ; P_i]`, `W: [input_size, input_size + dim]`.

    Start on a pretrained model: the token part of W is the identity, so tokens pass through unchanged, and the position part is the
    least-squares map from the new vectors to the model's own table over the trained positions. A learned table of `dim` at least the
    width of the tokens starts as the model's own table behind an identity: the model's function is kept. A sinusoidal one keeps it up to
    the residual of the fit. In a model without a table the position part is zeros, which is the model without its positions.
    """

    Options = ConcatOptions
    starts_from_table = True
    at_model_rate = frozenset({"token_weight", "position_weight"})
    summary = "position vectors beside the tokens, projected back to the hidden size"

    options: ResolvedConcatOptions

    def __init__(self, options: ResolvedConcatOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the projection, and the table where it is learned."""
        super().__init__(options, geometry, layers)
        self.token_weight = nn.Parameter(torch.empty(geometry.input_size, geometry.input_size))
        self.position_weight = nn.Parameter(torch.empty(geometry.input_size, options.dim))
        is_learned = options.table == "learned"
        self.table = nn.Parameter(torch.empty(geometry.trained_length, options.dim)) if is_learned else None
        self.reset_parameters()

    def embed(self, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Return `W [token ; P]`; see `Scheme.embed`.

        Raises:
            PositionRangeError: a position that a learned table has no row for. Not checked inside a compiled graph.
        """
        dtype = token_embeddings.dtype
        vectors = self.vectors(position_ids).to(dtype)
        return projected(token_embeddings, vectors, self.token_weight.to(dtype), self.position_weight.to(dtype))

    def vectors(self, position_ids: Tensor) -> Tensor:
        """Return the position vectors before projection, `[..., dim]`."""
        if self.table is None:
            return sinusoids(position_ids, self.options.dim, 10000.0, "interleaved")
        require_within(position_ids, self.geometry.trained_length, self.name)
        return self.table[position_ids]

    @property
    def max_length(self) -> int | None:
        """Rows of a learned table; a sinusoidal one never ends."""
        return self.geometry.trained_length if self.options.table == "learned" else None

    def reset_parameters(self) -> None:
        """Let tokens through unchanged, and no positions yet."""
        nn.init.eye_(self.token_weight)
        nn.init.zeros_(self.position_weight)
        if self.table is not None:
            nn.init.normal_(self.table, std=0.02)

    def start_from(self, native: Native) -> None:
        """Fit the position part to the model's own table, where it has one, in float64."""
        if native.table is None:
            return
        if not self.position_weight.is_meta:
            require_numbers(native.table)
        with torch.no_grad():
            if self.table is not None:
                vectors, weight = principal_directions(native.table, self.options.dim)
                self.table.copy_(vectors)
                self.position_weight.copy_(weight)
                self.keeps_function = self.options.dim >= native.table.shape[1]
                return
            wanted = native.table.double()
            vectors = self.vectors(torch.arange(wanted.shape[0], device=wanted.device)).double()
            fitted = torch.linalg.pinv(vectors, rtol=SMALLEST_DIRECTION) @ wanted
            self.position_weight.copy_(fitted.T.float())
