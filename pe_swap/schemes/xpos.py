"""xPos: rotary positions with a decay in every plane.

Sun et al., "A Length-Extrapolatable Transformer" (ACL 2023, arXiv:2212.10554), algorithm 1: planes of queries and keys are turned as in
RoPE; plane k of the query is multiplied by `zeta_k ** (i / scale_base)` and of the key by `zeta_k ** (-j / scale_base)`,
`zeta_k = (k / (head_dim / 2) + gamma) / (1 + gamma)`, so that their product decays with `i - j`.

Differs from the paper: in how it is computed, not in what. The factors themselves leave every dtype's range at some length (float32 and
bf16 after 35,000 positions, float16 after 4,500), and an origin in the middle of the input, as in the authors' code, moves with the length
and makes cached keys wrong. Here queries and keys are turned and cached without factors, and the decay of each pair comes in where
scores are computed, so that any length, cache or chunk gives the same scores. The paper's blockwise attention at inference is a mask, not
part of this scheme.

`python -m pe_swap show xpos` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES, FoldedBias
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import LARGEST_LENGTH, native_or
from pe_swap.schemes.parameters import at_least_float32
from pe_swap.schemes.positions import Positions
from pe_swap.schemes.rotary import ResolvedRotaryOptions, RotaryOptions, RotaryScheme, turning_dimensions
from pe_swap.schemes.sinusoids import inverse_frequencies


def log_decays(head_dim: int, gamma: float, scale_base: float) -> Tensor:
    """Return `log(zeta_k) / scale_base` of each plane, at most 0, per position; `[head_dim / 2]`, float64."""
    planes = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    zeta = (planes / len(planes) + gamma) / (1 + gamma)
    return zeta.log() / scale_base


@dataclass(frozen=True)
class XposOptions(RotaryOptions):
    """Options of `xpos`, beside those of `RotaryOptions`.

    Attributes:
        layout: `"interleaved"`, the authors', or `"half"`: which dimensions share a plane.
        scale_base: a plane's decay over this many positions is its zeta.
        gamma: the larger, the weaker the decay; the fastest plane's zeta is `gamma / (1 + gamma)`.
    """

    scheme: ClassVar[str] = "xpos"

    layout: str | None = field(default=None, metadata=native_or("interleaved"))
    scale_base: float = 512
    gamma: float = 0.4

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("scale_base", 0.0, LARGEST_LENGTH)
        self.require_number("gamma", 0.0, 1e6)

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedXposOptions:
        """Return the options with a rotary model's own base and layout written out."""
        return self.written_out(ResolvedXposOptions, native)


@dataclass(frozen=True, kw_only=True)
class ResolvedXposOptions(ResolvedRotaryOptions, XposOptions):
    """`XposOptions` as they are used and saved."""


class Xpos(RotaryScheme):
    """`sum_k zeta_k ** ((i - j) / scale_base) * (R_i query_i)_k . (R_j key_j)_k`, scaled.

    The attention kernel multiplies turned queries and keys without decay; the bias is what the decay changes, in float32.
    Start on a pretrained model: none preserves the function; the same as `rope`, with scores of distant keys nearer to zero.
    """

    Options = XposOptions
    summary = "rotary positions whose planes decay with distance"
    causal_only = True

    options: ResolvedXposOptions

    def __init__(self, options: ResolvedXposOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Work out frequencies and decays, as numbers: there is nothing that a reload could lose.

        Raises:
            OptionError: a head of odd width.
        """
        inv_freq = inverse_frequencies(turning_dimensions("xpos", geometry.head_dim), options.base)
        super().__init__(options, geometry, layers, inv_freq)
        self._log_decay: list[float] = log_decays(geometry.head_dim, options.gamma, options.scale_base).tolist()

    def log_decay(self, device: torch.device) -> Tensor:
        """Return `log(zeta_k) / scale_base` for each dimension of a head, at most 0, per position; `[head_dim]`, float32."""
        decay = torch.tensor(self._log_decay, dtype=torch.float32, device=device)
        return torch.cat((decay, decay)) if self.options.layout == "half" else decay.repeat_interleave(2)

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return `scaling * sum_d (decay_d(i - j) - 1) q_id k_jd`; see `Scheme.score_bias`.

        Keys after the query, which it may not look at, count as if they stood at it.
        """
        dtype = at_least_float32(query.dtype)
        steps = positions.distance.clamp(max=0).neg()[..., None]
        decay = (steps * self.log_decay(query.device).to(dtype)).exp()  # [q_len, kv_len, head_dim]
        return torch.einsum("bhid,bhjd,ijd->bhij", query.to(dtype), key.to(dtype), decay - 1) * scaling


# --- Faster forms of the same numbers ---

LARGEST_EXPONENT = 40.0
"""Natural logarithm of the largest factor on a query: a key's factor underflows at exp(-87), so both stay in the range of float32."""

LARGEST_PAIRED_EXPONENT = 4.0
"""The same for queries that go into the kernel in the model's dtype: they stay in the range of float16."""


@SCHEMES.register("xpos")
class FastXpos(Xpos):
    """`Xpos` by factors on queries and keys, as the paper has it, counted from the last query of a block.

    A key's factor is then at most 1, a query's at most `exp(40)`, and a key's underflows to zero only where the decayed product is below
    1e-20.
    """

    @property
    def block_length(self) -> int:
        """Queries whose factors are counted from one of them."""
        return max(1, int(LARGEST_EXPONENT / -self._log_decay[0]))

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return what the decay changes; see `Xpos.score_bias`."""
        dtype, block = at_least_float32(query.dtype), self.block_length
        query, key = query.to(dtype), key.to(dtype)
        changes = [
            self.change(query[:, :, start : start + block], key, positions.block(start, start + block))
            for start in range(0, query.shape[2], block)
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
        dtype = at_least_float32(query.dtype)
        if query.shape[2] > 1:
            query_factor, key_factor = self.factors(positions, dtype)
            return (query * query_factor).to(query.dtype), (key * key_factor).to(key.dtype), None
        _, key_factor = positions.share_across_layers((self.options, "factors", dtype), lambda: self.factors(positions, dtype))
        return query, (key * key_factor).to(key.dtype), None

    def factors(self, positions: Positions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what queries, `[q_len, head_dim]`, and keys, `[kv_len, head_dim]`, are multiplied by, counted from the last query.

        Keys after it, which no query may look at, count as if they stood there: nothing overflows.
        """
        last, log_decay = positions.query_slots[-1], self.log_decay(positions.query_slots.device).to(dtype)
        query_factor = ((positions.query_slots - last)[:, None] * log_decay).exp()
        key_factor = ((last - positions.key_slots).clamp(min=0)[:, None] * log_decay).exp()
        return query_factor, key_factor
