"""Transformer-XL's relative positions: sinusoids of the distance, projected, multiplied by queries and by trained vectors.

Dai et al., "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context" (ACL 2019, arXiv:1901.02860), section 3.3:
`A_ij = q_i . k_j + q_i . W_R R_{i-j} + u . k_j + v . W_R R_{i-j}`, `R` the sinusoid of query minus key in the layout
`[sines | cosines]`, one `W_R` per layer, all of it divided by `sqrt(head_dim)`.

Differs from the paper: the paper writes one `u` and one `v` for all; the authors' code has one per head, shared by layers, or per head
and layer (`untie_r`), and so has this. `max_distance` is their `clamp_len`. The recurrence over segments is no positional
scheme. An encoder takes the same formula: sines tell the sides apart.

`python -m pe_swap show transformer_xl` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, FoldedBias, Scheme
from pe_swap.schemes.geometry import Geometry
from pe_swap.schemes.options import LARGEST_LENGTH, SchemeOptions, none_is
from pe_swap.schemes.parameters import SHARED, layer_parameters, of_layer
from pe_swap.schemes.positions import Positions, pairs_of
from pe_swap.schemes.sinusoids import sinusoids

SINUSOID_BASE = 10_000
"""As in the paper; the slowest sinusoid turns by nearly `1 / base` radians per position."""


@dataclass(frozen=True)
class TransformerXLOptions(SchemeOptions):
    """Options of `transformer_xl`.

    Attributes:
        biases: `"shared"`, one `u` and one `v` per head for all layers, or `"per_layer"`.
        max_distance: distances beyond count as this one, in positions.
    """

    scheme: ClassVar[str] = "transformer_xl"

    biases: str = SHARED
    max_distance: int | None = field(default=None, metadata=none_is("no limit"))

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("biases", (SHARED, "per_layer"))
        self.require_int("max_distance", 1, LARGEST_LENGTH)


class TransformerXL(Scheme):
    """`bias_ij = scaling * (u . k_j + (q_i + v) . W_R r_{i-j})`, in logits.

    In a decoder a key after its query, which the causal mask removes, has no term of its distance: a mask of your own that lets queries
    look ahead is for encoders.

    Start on a pretrained model: `W_R`, `u` and `v` zero, which is the model without its table.
    """

    Options = TransformerXLOptions
    summary = "projected sinusoids of the distance, multiplied by queries and by trained vectors"
    shift_invariant = True

    options: TransformerXLOptions

    def __init__(self, options: TransformerXLOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build `W_R`, `[heads * head_dim, hidden_size]` per layer, and `u` and `v`, `[heads, head_dim]`."""
        super().__init__(options, geometry, layers)
        heads, head_dim = geometry.num_heads, geometry.head_dim
        is_shared = options.biases == SHARED
        self.distance_weights = layer_parameters(layers, heads * head_dim, geometry.hidden_size)
        self.content_biases = layer_parameters(layers, heads, head_dim, shared=is_shared)
        self.distance_biases = layer_parameters(layers, heads, head_dim, shared=is_shared)
        self.reset_parameters()

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias; see `Scheme.score_bias`."""
        content_bias, distance_bias, weight = (
            of_layer(parameters, layer).to(query.dtype)
            for parameters in (self.content_biases, self.distance_biases, self.distance_weights)
        )
        by_content = torch.einsum("hd,bhjd->bhj", content_bias, key)
        r = F.linear(self.distance_vectors(positions.distance).to(query.dtype), weight)  # [q_len, kv_len, heads * head_dim]
        r = r.view(*r.shape[:2], *content_bias.shape)
        by_distance = torch.einsum("bhid,ijhd->bhij", query + distance_bias[:, None], r)
        return scaling * (by_content[:, :, None] + by_distance)

    def distance_vectors(self, distance: Tensor) -> Tensor:
        """Return `r_{i-j}` for each distance (key minus query), `[..., hidden_size]`, in the dtype of `W_R`."""
        reach = self.options.max_distance
        looking_back = -distance if reach is None else -distance.clamp(-reach, reach)
        dtype = next(iter(self.distance_weights.values())).dtype
        return sinusoids(looking_back, self.geometry.hidden_size, SINUSOID_BASE, "split").to(dtype)

    def reset_parameters(self) -> None:
        """Set everything to zeros."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


# --- Faster forms of the same numbers ---

KEPT_ROWS = 256
"""The sinusoids kept beside a cache grow by so many at a time."""


@SCHEMES.register("transformer_xl")
class FastTransformerXL(TransformerXL):
    """`TransformerXL` with one product per query and distance, of which pairs pick; with `u` added to queries."""

    def prepare(self, positions: Positions, *, layer: int) -> Tensor:
        """Return `W_R r` for each distance of the call, `[heads, head_dim, q_len + kv_len - 1]`; see `Scheme.prepare`.

        For a single query of a decoder, r itself of 0, 1, 2, ... positions back, `[kv_len, hidden_size]`: the query is then projected in
        place of every distance.
        """
        q_len, kv_len = len(positions.query_slots), len(positions.key_slots)
        if q_len == 1 and self.geometry.is_causal:
            return self._looking_back(positions, kv_len)
        # Of a decoder's, those that look ahead are left out: at least the last q_len - 1, as no query stands after the last slot.
        ahead = q_len - 1 if self.geometry.is_causal else 0

        def of_distances() -> Tensor:
            lowest = positions.key_slots[0] - positions.query_slots[-1]
            return self.distance_vectors(torch.arange(q_len + kv_len - 1 - ahead, device=lowest.device) + lowest)

        vectors = positions.share_across_layers((self.options, "vectors"), of_distances)
        projected = F.linear(vectors, of_layer(self.distance_weights, layer)).T.reshape(*self._shape, -1)
        return F.pad(projected, (0, ahead)) if ahead else projected

    def _looking_back(self, positions: Positions, kv_len: int) -> Tensor:
        """Return r of 0 to `kv_len - 1` positions back, `[kv_len, hidden_size]`, of a table that grows with the cache."""
        device, dtype = positions.key_slots.device, next(iter(self.distance_weights.values())).dtype
        rows = -(-kv_len // KEPT_ROWS) * KEPT_ROWS
        key = (self.options, self.geometry.hidden_size, "looking back")
        table: Tensor = positions.keep(
            key, (rows, device, dtype), lambda: self.distance_vectors(-torch.arange(rows, device=device))
        )
        return table[:kv_len]

    @property
    def _shape(self) -> tuple[int, int]:
        return self.geometry.num_heads, self.geometry.head_dim

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias; see `Scheme.score_bias`."""
        content_bias = of_layer(self.content_biases, layer).to(query.dtype)[..., None]
        by_key = torch.matmul(key, scaling * content_bias).transpose(-1, -2)
        return self.distance_term(query, positions, scaling, layer) + by_key

    def fold_bias_into_query_key(
        self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int
    ) -> FoldedBias | None:
        """Return queries with `u` in them, and the term of distances; see `Scheme.fold_bias_into_query_key`."""
        content_bias = of_layer(self.content_biases, layer).to(query.dtype)[:, None]
        return query + content_bias, key, self.distance_term(query, positions, scaling, layer)

    def distance_term(self, query: Tensor, positions: Positions, scaling: float, layer: int) -> Tensor:
        """Return `scaling * (q_i + v) . W_R r_{i-j}`, `[batch, heads, q_len, kv_len]`.

        Each query of a block is multiplied by each of the block's `q_len + kv_len - 1` distances once, and pairs pick from that. A single
        query, in decoding, is projected by `W_R` in place of every distance: `(q W_R) . r` for `q . (W_R r)`.
        """
        prepared: Tensor = self.prepare(positions, layer=layer) if positions.prepared is None else positions.prepared
        distance_bias = scaling * of_layer(self.distance_biases, layer).to(query.dtype)[:, None]
        query = torch.add(distance_bias, query, alpha=scaling)  # scale the query: it is smaller than the scores
        if prepared.dim() == 2:  # only a call of one query, not a block of one
            projected = torch.matmul(query, of_layer(self.distance_weights, layer).to(query.dtype).view(*self._shape, -1))
            by_distance = torch.matmul(projected, prepared.to(query.dtype).T)
            return by_distance.index_select(-1, positions.distance[0].neg().clamp(min=0))
        by_distance = torch.matmul(query, positions.by_distance(prepared).to(query.dtype))
        return pairs_of(by_distance, len(positions.key_slots))
