"""DeBERTa's disentangled attention: products of queries and keys with learned vectors of relative positions.

He, Liu, Gao and Chen, "DeBERTa: Decoding-enhanced BERT with Disentangled Attention" (ICLR 2021, arXiv:2006.03654), equation 4:
`A_ij = q_i . k_j + q_i . Kr[d(i, j)] + k_j . Qr[d(j, i)]`, with `Kr` and `Qr` projections, one pair per layer, of one table of
relative vectors that all layers share, and `d` clipping `i - j` to `[-k, k)`. Version 2's code puts distances in logarithmic buckets
instead.

Differs from the paper: as in the authors' code, both terms look up `d(i, j)`, where the paper writes `d(j, i)` for the second. The
projection of `Kr` has no bias: its product with a query is the same for every key, and softmax removes it. `share_att_key` (the
content's own projections) is not offered, as a scheme has none of the model's weights. The paper divides all terms, content
included, by `sqrt(head_dim * (1 + terms))`, not by `sqrt(head_dim)`: a pretrained model is used to the latter, so `scale="model"`
keeps it for every term, and `scale="paper"` divides queries by `sqrt(1 + terms)`, which is the paper's.

`python -m pe_swap show deberta` draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry
from pe_swap.schemes.options import LARGEST_LENGTH, LARGEST_TABLE, SchemeOptions
from pe_swap.schemes.pairs import picked
from pe_swap.schemes.parameters import layer_parameters, of_layer
from pe_swap.schemes.positions import Positions

TABLE_DEVIATION = 0.02
"""Standard deviation of the table's start: what the models' own tables start from."""


def log_bucket(distance: Tensor, span: int, max_distance: int) -> Tensor:
    """Return the signed bucket of each distance (query minus key), int64, the shape of `distance`.

    With `m = span // 2` and `n = |distance|`: n up to m, else `m + ceil(log(n / m) / log((max_distance - 1) / m) * (m - 1))`, under
    the sign of the distance. The logarithm is taken in float32, as the authors' code does: bucket edges are exact.
    """
    middle = span // 2
    n = distance.abs()
    largest = torch.tensor((max_distance - 1) / middle, dtype=torch.float32, device="cpu")  # a number: it fits every device
    share = torch.log(n.clamp(min=middle).float() / middle) / torch.log(largest)
    logarithmic = (torch.ceil(share * (middle - 1)) + middle).long()
    return torch.where(n <= middle, distance, logarithmic * distance.sign())


@dataclass(frozen=True)
class DebertaOptions(SchemeOptions):
    """Options of `deberta`.

    Attributes:
        buckets: `"log"` (version 2 and 3) or `"clip"` (version 1): which row a distance has.
        span: rows of each side. With `"clip"`, the distance from which on all share a row, in positions; with `"log"`, the buckets of
            each side: distances up to half of them have one each.
        max_distance: with `"log"`, the distance of the last bucket, in positions.
        terms: `"both"`, `"content_to_position"` or `"position_to_content"`.
        scale: `"model"` or `"paper"`: see above.
        layer_norm: normalise the table's rows, as version 2 and 3 do.
    """

    scheme: ClassVar[str] = "deberta"

    buckets: str = "log"
    span: int = 256
    max_distance: int = 512
    terms: str = "both"
    scale: str = "model"
    layer_norm: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("buckets", ("log", "clip"))
        self.require_int("span", 2, LARGEST_TABLE)
        self.require_int("max_distance", 2, LARGEST_LENGTH)
        self.require_choice("terms", ("both", "content_to_position", "position_to_content"))
        self.require_choice("scale", ("model", "paper"))
        self.require_bool("layer_norm")
        if self.buckets == "log" and self.max_distance <= self.span // 2 + 1:
            raise self.refuse(
                "max_distance", f"above span / 2 + 1 = {self.span // 2 + 1}: nearer distances have a bucket each already"
            )

    @property
    def unused_hooks(self) -> frozenset[str]:
        """`query_scale`, where queries are not scaled."""
        return frozenset() if self.scale == "paper" or self.logit_scale is not None else frozenset({"query_scale"})


class Deberta(Scheme):
    """`bias_ij = scaling * (q_i . Kr[d(i, j)] + k_j . Qr[d(i, j)])`, in logits.

    Start on a pretrained model: projections zero, which is the model without its table (under `scale="paper"`, with flatter
    attention); the table of relative vectors starts at random, as two factors that are both zero have no gradient.
    """

    Options = DebertaOptions
    summary = "dot products of queries and keys with learned vectors, one per distance bucket"
    shift_invariant = True

    options: DebertaOptions

    def __init__(self, options: DebertaOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the table, `[2 span, hidden_size]`, and projections, `[heads * head_dim, hidden_size]` per layer."""
        super().__init__(options, geometry, layers)
        size, hidden_size = geometry.num_heads * geometry.head_dim, geometry.hidden_size
        self.table = nn.Parameter(torch.empty(2 * options.span, hidden_size))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-7) if options.layer_norm else None
        to_position = layers if options.terms in ("both", "content_to_position") else ()
        from_position = layers if options.terms in ("both", "position_to_content") else ()
        self.key_weights = layer_parameters(to_position, size, hidden_size)
        self.query_weights = layer_parameters(from_position, size, hidden_size)
        self.query_biases = layer_parameters(from_position, size)
        self.reset_parameters()

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias; see `Scheme.score_bias`. Queries come scaled by `content_scale`, keys do not."""
        rows = self.rows(positions.distance)  # [q_len, kv_len]
        terms = []
        if self.key_weights:
            terms.append(picked(query @ self.projected_keys(layer).to(query.dtype), rows))
        if self.query_weights:
            by_row = key @ self.per_head(self.projected_queries(layer).to(key.dtype) * self.content_scale)
            terms.append(picked(by_row, rows.T).transpose(-1, -2))
        return scaling * sum(terms[1:], terms[0])

    def rows(self, distance: Tensor) -> Tensor:
        """Return the row of each distance (key minus query), int64, counted from `first_row`."""
        span, looking_back = self.options.span, -distance
        if self.options.buckets == "log":
            looking_back = log_bucket(looking_back, span, self.options.max_distance)
        return (looking_back + span).clamp(self.first_row, 2 * span - 1) - self.first_row

    @property
    def first_row(self) -> int:
        """The first row of the table in use: a decoder's keys are never after the query, so the half before it is not read."""
        return self.options.span if self.geometry.is_causal else 0

    def table_in_use(self) -> Tensor:
        """Return the table from `first_row` on, `[rows, hidden_size]`, normalised where asked."""
        table = self.table[self.first_row :]
        return table if self.norm is None else self.norm(table)

    def projected_keys(self, layer: int) -> Tensor:
        """Return `Kr`, `[heads, head_dim, rows]`."""
        return self.per_head(F.linear(self.table_in_use(), of_layer(self.key_weights, layer)))

    def projected_queries(self, layer: int) -> Tensor:
        """Return `Qr`, `[rows, heads * head_dim]`."""
        return F.linear(self.table_in_use(), of_layer(self.query_weights, layer), of_layer(self.query_biases, layer))

    def per_head(self, rows: Tensor) -> Tensor:
        """Return `[rows, heads * head_dim]` as `[heads, head_dim, rows]`."""
        return rows.T.view(self.geometry.num_heads, self.geometry.head_dim, -1)

    @property
    def content_scale(self) -> float:
        """The factor on every term: `1 / sqrt(1 + terms)` where the paper's scale is asked for, else 1."""
        terms = 2 if self.options.terms == "both" else 1
        return 1 / math.sqrt(1 + terms) if self.options.scale == "paper" else 1.0

    def query_scale(self, num_keys: Tensor, *, layer: int) -> Tensor:
        """Return the factor on queries; see `Scheme.query_scale`."""
        return super().query_scale(num_keys, layer=layer) * self.content_scale

    def reset_parameters(self) -> None:
        """Set projections to zeros and the table to small random vectors."""
        for parameters in (self.key_weights, self.query_weights, self.query_biases):
            for parameter in parameters.values():
                nn.init.zeros_(parameter)
        nn.init.normal_(self.table, std=TABLE_DEVIATION)
        if self.norm is not None:
            self.norm.reset_parameters()


# --- Faster forms of the same numbers ---


class Prepared(NamedTuple):
    """What the blocks of a call share.

    Attributes:
        rows: `[q_len + kv_len - 1]`, int64, the row of each distance.
        keys: `Kr`, `[heads, head_dim, rows]`, or None.
        queries: `Qr`, `[rows, heads * head_dim]`, or None.
    """

    rows: Tensor
    keys: Tensor | None
    queries: Tensor | None


@SCHEMES.register("deberta")
class FastDeberta(Deberta):
    """`Deberta` with rows and projections worked out once per call; a single query, in decoding, needs the rows of its own pairs alone."""

    def prepare(self, positions: Positions, *, layer: int) -> Prepared:
        """Return rows of distances and the table's projections; see `Scheme.prepare`.

        For a single query, in decoding, `Kr` is left out: the query is projected in place of every row, `(q W_K) . t` for `q . (W_K t)`.
        """
        q_len, name = len(positions.query_slots), str(layer)
        norm = () if self.norm is None else (self.norm.weight, self.norm.bias)

        def rows() -> Tensor:
            lowest = positions.key_slots[0] - positions.query_slots[-1]
            return self.rows(torch.arange(q_len + len(positions.key_slots) - 1, device=lowest.device) + lowest)

        keys = queries = None
        if self.key_weights and q_len > 1:
            inputs = (self.table, *norm, self.key_weights[name])
            keys = positions.keep(("Kr", layer), inputs, lambda: self.projected_keys(layer))
        if self.query_weights:
            inputs = (self.table, *norm, self.query_weights[name], self.query_biases[name])
            queries = positions.keep(("Qr", layer), inputs, lambda: self.projected_queries(layer))
        return Prepared(positions.share_across_layers((self.options, "rows"), rows), keys, queries)

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias; see `Deberta.score_bias`. Queries and keys are multiplied by every row once, and pairs pick from that."""
        prepared: Prepared = self.prepare(positions, layer=layer) if positions.prepared is None else positions.prepared
        is_single, kv_len = query.shape[2] == 1, key.shape[2]
        by_distance = positions.by_distance(prepared.rows)
        rows = by_distance[None] if is_single else by_distance.unfold(0, kv_len, 1).flip(0)  # windows, the last query's first
        terms = []
        if self.key_weights:
            query = query * scaling
            if prepared.keys is None or is_single:
                weight = of_layer(self.key_weights, layer).to(query.dtype).view(*query.shape[1::2], -1)
                by_row = torch.matmul(torch.matmul(query, weight), self.table_in_use().to(query.dtype).T)
            else:
                by_row = torch.matmul(query, prepared.keys.to(query.dtype))
            terms.append(picked(by_row, rows))
        if prepared.queries is not None:
            queries = prepared.queries.to(key.dtype) * (scaling * self.content_scale)
            if is_single:
                of_pair = queries.index_select(0, rows[0]).view(kv_len, *key.shape[1::2]).transpose(0, 1)
                terms.append((key * of_pair).sum(-1)[:, :, None])
            else:
                terms.append(picked(torch.matmul(key, self.per_head(queries)), rows.T).transpose(-1, -2))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]
