"""Transformer-XL's relative positions: sinusoids of the distance, projected, met by queries and by trained vectors.

Dai et al., "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context" (ACL 2019, arXiv:1901.02860), section 3.3:
`A_ij = q_i . k_j + q_i . W_R R_{i-j} + u . k_j + v . W_R R_{i-j}`, `R` the sinusoid of query minus key in the layout
`[sines | cosines]`, `W_R` of each layer's own, all of it divided by `sqrt(head_dim)`.

Differs from the paper: the paper writes one `u` and one `v` for all; the authors' code has one a head, shared by layers, or of each
layer's own (`untie_r`), and so has this. `max_distance` is their `clamp_len`. The recurrence over segments is no positional
scheme. An encoder takes the same formula: sines tell the sides apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_swap.positions import Positions, pairs_of
from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.options import LARGEST_LENGTH, SchemeOptions
from pe_swap.schemes.sinusoidal import sinusoids

SINUSOID_BASE = 10_000
"""As in the paper; the slowest sinusoid turns by nearly `1 / base` radians a position."""


@dataclass(frozen=True)
class TransformerXLOptions(SchemeOptions):
    """Options of `transformer_xl`.

    Attributes:
        biases: `"shared"`, one `u` and one `v` a head for all layers, or `"per_layer"`.
        max_distance: distances beyond count as this one, in positions.
    """

    scheme: ClassVar[str] = "transformer_xl"

    biases: str = "shared"
    max_distance: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("biases", ("shared", "per_layer"))
        self.require_int("max_distance", 1, LARGEST_LENGTH, none_is="no limit")


@SCHEMES.register("transformer_xl")
class TransformerXL(Scheme):
    """`bias_ij = scaling * (u . k_j + (q_i + v) . W_R r_{i-j})`, in logits.

    Start on a pretrained model: `W_R`, `u` and `v` zero, which is the model without its table.
    """

    Options = TransformerXLOptions
    summary = "projected sinusoids of the distance, met by queries and by trained vectors"
    shift_invariant = True

    options: TransformerXLOptions

    def __init__(self, options: TransformerXLOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build `W_R`, `[heads * head_dim, hidden_size]` a layer, and `u` and `v`, `[heads, head_dim]`."""
        super().__init__(options, geometry, layers)
        heads, head_dim = geometry.num_heads, geometry.head_dim
        names = ["shared"] if options.biases == "shared" else [str(layer) for layer in layers]
        self.distance_weights = nn.ParameterDict(
            {str(layer): torch.empty(heads * head_dim, geometry.hidden_size) for layer in layers}
        )
        self.content_biases = nn.ParameterDict({name: torch.empty(heads, head_dim) for name in names})
        self.distance_biases = nn.ParameterDict({name: torch.empty(heads, head_dim) for name in names})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set everything to zeros."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def distance_vectors(self, distance: Tensor) -> Tensor:
        """Return `r_{i-j}` for each distance (key minus query), `[n, hidden_size]`, in the dtype of `W_R`."""
        reach = self.options.max_distance
        looking_back = -distance if reach is None else -distance.clamp(-reach, reach)
        dtype = next(iter(self.distance_weights.values())).dtype
        return sinusoids(looking_back, self.geometry.hidden_size, SINUSOID_BASE, "split").to(dtype)

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias; see `Scheme.score_bias`.

        A block of queries meets each of its `q_len + kv_len - 1` distances once, and pairs pick from that. A single query, in
        decoding, is projected by `W_R` in place of every distance: `(q W_R) . r` for `q . (W_R r)`.
        """
        name = "shared" if self.options.biases == "shared" else str(layer)
        content_bias = self.content_biases[name].to(query.dtype)
        distance_bias = self.distance_biases[name].to(query.dtype)
        by_key = torch.matmul(key, content_bias[..., None]).transpose(-1, -2)
        q_len, kv_len, shape = query.shape[2], key.shape[2], (self.geometry.num_heads, self.geometry.head_dim, -1)
        query, weight = query + distance_bias[:, None], self.distance_weights[str(layer)]
        if q_len == 1:
            vectors = positions.once((self.options, "vectors"), lambda: self.distance_vectors(positions.distance[0]))
            projected = torch.matmul(query, weight.to(query.dtype).view(shape))
            return (torch.matmul(projected, vectors.to(query.dtype).T) + by_key) * scaling
        lowest = positions.key_slots[0] - positions.query_slots[-1]
        vectors = self.distance_vectors(torch.arange(q_len + kv_len - 1, device=query.device) + lowest)
        keys = F.linear(vectors, weight).T.view(shape).to(query.dtype)
        return (pairs_of(torch.matmul(query, keys), kv_len) + by_key) * scaling
