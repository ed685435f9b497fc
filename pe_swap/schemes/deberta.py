"""DeBERTa's disentangled attention: content meets relative position, and relative position meets content.

He, Liu, Gao and Chen, "DeBERTa: Decoding-enhanced BERT with Disentangled Attention" (ICLR 2021, arXiv:2006.03654), equation 4:
`A_ij = q_i . k_j + q_i . Kr[d(i, j)] + k_j . Qr[d(j, i)]`, with `Kr` and `Qr` projections, of each layer's own, of one table of
relative vectors that all layers share, and `d` clipping `i - j` to `[-k, k)`. Version 2's code puts distances in logarithmic buckets
instead.

Differs from the paper: as in the authors' code, both terms look up `d(i, j)`, where the paper writes `d(j, i)` for the second. The
projection of `Kr` has no bias: its product with a query is the same for every key, and softmax removes it. `share_att_key` (the
content's own projections) is not offered, as a scheme has none of the model's weights. The paper divides all terms, content
included, by `sqrt(head_dim * (1 + terms))`, not by `sqrt(head_dim)`: a pretrained model is used to the latter, so `scale="model"`
keeps it for every term, and `scale="paper"` divides queries by `sqrt(1 + terms)`, which is the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.positions import Positions

TABLE_DEVIATION = 0.02
"""Standard deviation of the table's start: what the models' own tables start from."""


@dataclass(frozen=True)
class DebertaOptions(SchemeOptions):
    """Options of `deberta`.

    Attributes:
        buckets: `"log"` (version 2 and 3) or `"clip"` (version 1): how a distance finds its row.
        span: rows of each side. With `"clip"`, the distance from which on all share a row, in positions; with `"log"`, the buckets a
            side: distances up to half of them have one each.
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
        self.require_int("span", 2, 65536)
        self.require_int("max_distance", 2, 2**24)
        self.require_choice("terms", ("both", "content_to_position", "position_to_content"))
        self.require_choice("scale", ("model", "paper"))
        self.require_bool("layer_norm")
        if self.buckets == "log" and self.max_distance <= self.span // 2 + 1:
            raise self.refuse(
                "max_distance", f"above span / 2 + 1 = {self.span // 2 + 1}: nearer distances have a bucket each already"
            )


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


def log_bucket(distance: Tensor, span: int, max_distance: int) -> Tensor:
    """Return the signed bucket of each distance (query minus key), int64, the shape of `distance`.

    With `m = span // 2` and `n = |distance|`: n up to m, else `m + ceil(log(n / m) / log((max_distance - 1) / m) * (m - 1))`, under
    the sign of the distance. The logarithm is taken in float32, as the authors' code does: bucket edges are exact.
    """
    middle = span // 2
    n = distance.abs()
    share = torch.log(n.clamp(min=middle).float() / middle) / torch.log(
        torch.tensor((max_distance - 1) / middle, dtype=torch.float32)
    )
    logarithmic = (torch.ceil(share * (middle - 1)) + middle).long()
    return torch.where(n <= middle, distance, logarithmic * distance.sign())


@SCHEMES.register("deberta")
class Deberta(Scheme):
    """`bias_ij = scaling * (q_i . Kr[d(i, j)] + k_j . Qr[d(i, j)])`, in logits.

    Start on a pretrained model: projections zero, which is the model without its table (under `scale="paper"`, with flatter
    attention); the table of relative vectors starts at random, as nothing would move from zero times zero.
    """

    Options = DebertaOptions
    summary = "content meets vectors of bucketed distances, and they meet content"
    shift_invariant = True

    options: DebertaOptions

    def __init__(self, options: DebertaOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the table, `[2 span, hidden_size]`, and projections, `[heads * head_dim, hidden_size]` a layer."""
        super().__init__(options, geometry, layers)
        size = geometry.num_heads * geometry.head_dim
        self.table = nn.Parameter(torch.empty(2 * options.span, geometry.hidden_size))
        self.norm = nn.LayerNorm(geometry.hidden_size, eps=1e-7) if options.layer_norm else None
        content_to_position, position_to_content = self.uses("content_to_position"), self.uses("position_to_content")
        self.key_weights = self._per_layer(size, geometry.hidden_size) if content_to_position else None
        self.query_weights = self._per_layer(size, geometry.hidden_size) if position_to_content else None
        self.query_biases = self._per_layer(size) if position_to_content else None
        self.reset_parameters()

    def _per_layer(self, *shape: int) -> nn.ParameterDict:
        """Return one parameter a layer."""
        return nn.ParameterDict({str(layer): torch.empty(*shape) for layer in self.layers})

    def uses(self, term: str) -> bool:
        """Tell whether a term is in use."""
        return self.options.terms in ("both", term)

    def reset_parameters(self) -> None:
        """Set projections to zeros and the table to small random vectors."""
        for parameters in (self.key_weights, self.query_weights, self.query_biases):
            for parameter in () if parameters is None else parameters.values():
                nn.init.zeros_(parameter)
        nn.init.normal_(self.table, std=TABLE_DEVIATION)
        if self.norm is not None:
            self.norm.reset_parameters()

    @classmethod
    def hooks_for(cls, options: SchemeOptions) -> frozenset[str]:
        """The hooks in use: queries are scaled only where asked."""
        assert isinstance(options, DebertaOptions)
        scales = options.scale == "paper" or options.logit_scale is not None
        return super().hooks_for(options) - (set() if scales else {"query_scale"})

    @property
    def content_scale(self) -> float:
        """The factor on every term: `1 / sqrt(1 + terms)` where the paper's scale is asked for, else 1."""
        terms = 2 if self.options.terms == "both" else 1
        return 1 / math.sqrt(1 + terms) if self.options.scale == "paper" else 1.0

    def query_scale(self, num_keys: Tensor, *, layer: int) -> Tensor:
        """Return the factor on queries; see `Scheme.query_scale`."""
        return super().query_scale(num_keys, layer=layer) * self.content_scale

    @property
    def first_row(self) -> int:
        """The first row of the table in use: a decoder's keys, none of them after the query, never meet the half before it."""
        return self.options.span if self.geometry.is_causal else 0

    def rows(self, distance: Tensor) -> Tensor:
        """Return the row of each distance (key minus query), int64, counted from `first_row`."""
        span, looking_back = self.options.span, -distance
        if self.options.buckets == "log":
            looking_back = log_bucket(looking_back, span, self.options.max_distance)
        return (looking_back + span).clamp(self.first_row, 2 * span - 1) - self.first_row

    def table_in_use(self) -> Tensor:
        """Return the table from `first_row` on, `[rows, hidden_size]`, normalised where asked."""
        table = self.table[self.first_row :]
        return table if self.norm is None else self.norm(table)

    def prepare(self, positions: Positions, *, layer: int) -> Prepared:
        """Return rows of distances and the table's projections; see `Scheme.prepare`.

        For a single query, in decoding, `Kr` is left out: the query is projected in place of every row, `(q W_K) . t` for `q . (W_K t)`.
        """
        q_len, name = len(positions.query_slots), str(layer)
        norm = () if self.norm is None else (self.norm.weight, self.norm.bias)
        shape = (self.geometry.num_heads, self.geometry.head_dim, -1)

        def rows() -> Tensor:
            lowest = positions.key_slots[0] - positions.query_slots[-1]
            return self.rows(torch.arange(q_len + len(positions.key_slots) - 1, device=lowest.device) + lowest)

        keys = queries = None
        if self.key_weights is not None and q_len > 1:
            weight = self.key_weights[name]
            of = (self.table, *norm, weight)
            keys = positions.keep(("Kr", layer), of, lambda: F.linear(self.table_in_use(), weight).T.view(shape))
        if self.query_weights is not None and self.query_biases is not None:
            weights = self.query_weights[name], self.query_biases[name]
            of = (self.table, *norm, *weights)
            queries = positions.keep(("Qr", layer), of, lambda: F.linear(self.table_in_use(), *weights))
        return Prepared(positions.share_across_layers((self.options, "rows"), rows), keys, queries)

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias; see `Scheme.score_bias`. Queries and keys meet every row once, and pairs pick from that.

        Beside a single query, in decoding, a key meets the one row of its pair. Queries come scaled, keys do not.
        """
        prepared: Prepared = self.prepare(positions, layer=layer) if positions.prepared is None else positions.prepared
        is_single, kv_len = query.shape[2] == 1, key.shape[2]
        by_distance = positions.by_distance(prepared.rows)
        rows = by_distance[None] if is_single else by_distance.unfold(0, kv_len, 1).flip(0)  # windows, the last query's first
        terms = []
        if self.key_weights is not None:
            query = query * scaling
            if is_single:
                weight = self.key_weights[str(layer)].to(query.dtype).view(*query.shape[1::2], -1)
                by_row = torch.matmul(torch.matmul(query, weight), self.table_in_use().to(query.dtype).T)
            else:
                assert prepared.keys is not None
                by_row = torch.matmul(query, prepared.keys.to(query.dtype))
            terms.append(by_row.gather(-1, rows.expand(*by_row.shape[:2], *rows.shape)))
        if prepared.queries is not None:
            queries = prepared.queries.to(key.dtype) * (scaling * self.content_scale)
            if is_single:
                of_pair = queries.index_select(0, rows[0]).view(kv_len, *key.shape[1::2]).transpose(0, 1)
                terms.append((key * of_pair).sum(-1)[:, :, None])
            else:
                by_row = torch.matmul(key, queries.T.view(*key.shape[1::2], -1))
                terms.append(by_row.gather(-1, rows.T.expand(*by_row.shape[:2], *rows.T.shape)).transpose(-1, -2))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]
