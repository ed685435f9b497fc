"""xPos: rotary positions with a decay in every plane.

Sun et al., "A Length-Extrapolatable Transformer" (ACL 2023, arXiv:2212.10554), algorithm 1: planes of queries and keys are turned as in
RoPE; plane k of the query is multiplied by `zeta_k ** (i / scale_base)` and of the key by `zeta_k ** (-j / scale_base)`,
`zeta_k = (k / (head_dim / 2) + gamma) / (1 + gamma)`, so that their product decays with `i - j`.

Differs from the paper: in how it is computed, not in what. The factors themselves leave every dtype's range at some length (float32 and
bf16 after 35,000 positions, float16 after 4,500), and an origin in the middle of the input, as in the authors' code, moves with the length
and makes cached keys wrong. Here queries and keys are turned and cached without factors. They come in where scores are computed, in
float32, counted from the last query of a block: a key's is then at most 1, a query's at most `exp(40)`, and a key's underflows to zero
only where the decayed product is below 1e-20. Any length, cache or chunk gives the same scores. The paper's blockwise attention at
inference is a mask, not part of this scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pe_swap.errors import OptionError
from pe_swap.schemes.base import SCHEMES, FoldedBias, Geometry, Scheme
from pe_swap.schemes.options import LARGEST_LENGTH, SchemeOptions
from pe_swap.schemes.positions import Positions
from pe_swap.schemes.rope import rotation_by, turn
from pe_swap.schemes.sinusoidal import inverse_frequencies

LARGEST_EXPONENT = 40.0
"""Natural logarithm of the largest factor on a query: with a key's underflow at exp(-87) it leaves the range of float32 room."""

LARGEST_PAIRED_EXPONENT = 4.0
"""The same for queries that go into the kernel in the model's dtype: it leaves that of float16 room."""


@dataclass(frozen=True)
class XposOptions(SchemeOptions):
    """Options of `xpos`.

    Attributes:
        scale_base: a plane's decay over this many positions is its zeta.
        gamma: the larger, the weaker the decay; the fastest plane's zeta is `gamma / (1 + gamma)`.
        base: as in `rope`.
        layout: `"interleaved"`, the authors', or `"half"`: which dimensions share a plane.
    """

    scheme: ClassVar[str] = "xpos"

    scale_base: float = 512
    gamma: float = 0.4
    base: float = 10000
    layout: str = "interleaved"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("scale_base", 0.0, LARGEST_LENGTH)
        self.require_number("gamma", 0.0, 1e6)
        self.require_number("base", 1.0, 1e12)
        self.require_choice("layout", ("interleaved", "half"))


@SCHEMES.register("xpos")
class Xpos(Scheme):
    """`sum_k zeta_k ** ((i - j) / scale_base) * (R_i query_i)_k . (R_j key_j)_k`, scaled.

    Turned queries and keys meet without decay in the attention kernel; the bias is what the decay changes, in float32.
    Start on a pretrained model: none preserves the function; the same as `rope`, with scores of distant keys nearer to zero.
    """

    Options = XposOptions
    summary = "rotary positions whose planes decay with distance"
    shift_invariant = True
    causal_only = True

    options: XposOptions

    def __init__(self, options: XposOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Work out frequencies and decays, as numbers: there is nothing that a reload could lose.

        Raises:
            OptionError: a head of odd width.
        """
        super().__init__(options, geometry, layers)
        if geometry.head_dim % 2:
            raise OptionError(
                f"xpos: head_dim is {geometry.head_dim}; it must be even, as dimensions turn in pairs. Choose a scheme that adds a bias."
            )
        with torch.device("cpu"):  # also where a model is built without memory
            planes = torch.arange(geometry.head_dim // 2, dtype=torch.float64)
            zeta = (planes / len(planes) + options.gamma) / (1 + options.gamma)
            self._inv_freq: list[float] = inverse_frequencies(geometry.head_dim, options.base).float().tolist()
            self._log_decay: list[float] = (zeta.log() / options.scale_base).tolist()
        self._block = max(1, int(LARGEST_EXPONENT / -self._log_decay[0]))

    def log_decay(self, device: torch.device) -> Tensor:
        """Return `log(zeta_k) / scale_base` for each dimension of a head, at most 0, a position; `[head_dim]`, float32."""
        decay = torch.tensor(self._log_decay, dtype=torch.float32, device=device)
        return torch.cat((decay, decay)) if self.options.layout == "half" else decay.repeat_interleave(2)

    def prepare_positions(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines; see `rotation_by` and `Scheme.prepare_positions`."""
        inv_freq = torch.tensor(self._inv_freq, dtype=torch.float32, device=position_ids.device)
        return rotation_by(position_ids[:, None, :, None].float() * inv_freq, self.options.layout)

    def transform_query_key(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], *, role: Literal["query", "key"], layer: int
    ) -> Tensor:
        """Return `x` turned by its positions, without decay; see `Scheme.transform_query_key`."""
        return turn(x, rotation, self.options.layout)

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return what the decay changes; see `Scheme.score_bias`."""
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        query, key = query.to(wide), key.to(wide)
        changes = [
            self.change(query[:, :, start : start + self._block], key, positions.block(start, start + self._block))
            for start in range(0, query.shape[2], self._block)
        ]
        return torch.cat(changes, dim=2) * scaling

    def change(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor:
        """Return decayed minus plain products for queries near each other, `[batch, heads, q_len, kv_len]`."""
        query_factor, key_factor = self.factors(positions, query.dtype)
        decayed = torch.matmul(query * query_factor, (key * key_factor).transpose(-1, -2))
        return decayed - torch.matmul(query, key.transpose(-1, -2))

    def fold_bias_into_query_key(
        self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int
    ) -> FoldedBias | None:
        """Return queries and keys with their decay from the last query, where it is small; see `Scheme.fold_bias_into_query_key`."""
        if -self._log_decay[0] * (query.shape[2] - 1) > LARGEST_PAIRED_EXPONENT:
            return None
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        if query.shape[2] > 1:
            query_factor, key_factor = self.factors(positions, wide)
            return (query * query_factor).to(query.dtype), (key * key_factor).to(key.dtype), None
        _, key_factor = positions.share_across_layers((self.options, "factors", wide), lambda: self.factors(positions, wide))
        return query, (key * key_factor).to(key.dtype), None

    def factors(self, positions: Positions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what queries, `[q_len, head_dim]`, and keys, `[kv_len, head_dim]`, are multiplied by, counted from the last query.

        Keys after it, which no query may look at, count as if they stood there: nothing overflows.
        """
        last, log_decay = positions.query_slots[-1], self.log_decay(positions.query_slots.device).to(dtype)
        query_factor = ((positions.query_slots - last)[:, None] * log_decay).exp()
        key_factor = ((last - positions.key_slots).clamp(min=0)[:, None] * log_decay).exp()
        return query_factor, key_factor
