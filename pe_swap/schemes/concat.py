"""Position vectors concatenated to the token embeddings, then projected back to the hidden size.

The alternative to a sum that introductions to the subject mention and models rarely use; no paper defines it for these models.

What it adds over a sum: with `W = [W_token | W_position]`, `W [token ; position] = W_token token + W_position position`. So it is a
sum after all, of a projected position table (which a learned table can hold by itself) and a *linear map of the tokens*, which a
sum does not have. Tokens and positions can be turned out of each other's way; the price is `hidden_size * (hidden_size + dim)`
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.learned import refuse_outside
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.sinusoidal import sinusoids

SMALLEST_DIRECTION = 1e-2
"""Directions of the sinusoids below this share of the largest are left out of the fit. Low frequencies are nearly constant over a
short table; fitting with what little they vary takes weights so large that rounding (and the first position beyond) is all one sees."""


@dataclass(frozen=True)
class ConcatOptions(SchemeOptions):
    """Options of `concat`.

    Attributes:
        table: `"sinusoidal"`, which never ends, or `"learned"`, as long as the trained table.
        dim: dimensions of a position vector; None is the hidden size.
    """

    scheme: ClassVar[str] = "concat"

    table: str = "sinusoidal"
    dim: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("table", ("sinusoidal", "learned"))
        self.require_int("dim", 1, 65536, none_is="the hidden size")

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> ConcatOptions:
        """Write out the hidden size where no `dim` was given."""
        return self if self.dim is not None else replace(self, dim=geometry.hidden_size)


@SCHEMES.register("concat")
class Concat(Scheme):
    """`x_i = W [token_i ; P_i]`, `W: [hidden_size, hidden_size + dim]`.

    Start on a pretrained model: the token part of W is the identity, so tokens pass through unchanged, and the position part is the
    least-squares map from the new vectors to the model's own table over the trained positions. A learned table of `dim` at least the
    hidden size starts as the model's own table behind an identity: the model's function is kept. A sinusoidal one keeps it up to the
    residual of the fit.
    """

    Options = ConcatOptions
    needs_table = True
    summary = "position vectors beside the tokens, projected back to the hidden size"

    options: ConcatOptions

    def __init__(self, options: ConcatOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the projection, and the table where it is learned."""
        super().__init__(options, geometry, layers)
        self.dim = options.dim or geometry.hidden_size
        self.token_weight = nn.Parameter(torch.empty(geometry.hidden_size, geometry.hidden_size))
        self.position_weight = nn.Parameter(torch.empty(geometry.hidden_size, self.dim))
        is_learned = options.table == "learned"
        self.table = nn.Parameter(torch.empty(geometry.trained_length, self.dim)) if is_learned else None
        self.reset_parameters()

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

    def start_from(self, position_table: Tensor) -> None:
        """Fit the position part to the model's own table, in float64."""
        wanted = position_table.double()
        with torch.no_grad():
            if self.table is not None:
                # The table's principal directions, or all of it where there is room: then the map is the identity, exactly.
                hidden_size = wanted.shape[1]
                if self.dim >= hidden_size:
                    self.table.zero_()[:, :hidden_size] = position_table
                    self.position_weight.zero_()[:, :hidden_size] = torch.eye(hidden_size)
                    return
                directions = torch.linalg.svd(wanted, full_matrices=False).Vh[: self.dim]
                rank = directions.shape[0]
                self.table.zero_()[:, :rank] = (wanted @ directions.T).float()
                self.position_weight.zero_()[:, :rank] = directions.T.float()
                return
            vectors = self.vectors(torch.arange(wanted.shape[0])).double()
            fitted = torch.linalg.pinv(vectors, rtol=SMALLEST_DIRECTION) @ wanted
            self.position_weight.copy_(fitted.T.float())

    def vectors(self, position_ids: Tensor) -> Tensor:
        """Return the position vectors before projection, `[..., dim]`."""
        if self.table is None:
            return sinusoids(position_ids, self.dim, 10000.0, "interleaved")
        if not torch.compiler.is_compiling():
            refuse_outside(position_ids, self.geometry.trained_length, self.name)
        return self.table[position_ids]

    def embed(self, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Return `W [token ; P]`, as `W_token token + W_P P`: neither is written beside the other; see `Scheme.embed`.

        Raises:
            PositionRangeError: a position that a learned table has no row for. Not checked inside a compiled graph.
        """
        dtype = token_embeddings.dtype
        positions = nn.functional.linear(self.vectors(position_ids).to(dtype), self.position_weight.to(dtype))
        return nn.functional.linear(token_embeddings, self.token_weight.to(dtype)) + positions
