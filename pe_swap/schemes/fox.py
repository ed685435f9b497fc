"""FoX: the forgetting transformer.

Lin, Nikishin, He and Courville, "Forgetting Transformer: Softmax Attention with a Forget Gate" (ICLR 2025, arXiv:2503.02130),
section 3: with a gate `f_t = sigmoid(w_f . x_t + b_f)` for every head, `x_t` being the layer's hidden state, the scores take the
bias `d_ij = sum_{l = j + 1 .. i} log f_l`, so that a token fades by what came after it. ALiBi is the case of constant gates
`f = exp(-slope)`.

Differs from the paper: the gate alone; the output gate, the norms and the shifts of "FoX (Pro)" are no positional scheme. The
authors start gate biases at 0, which forgets half of everything at each token; here `initial_reach` sets them.

`python -m pe_swap show fox` draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import MATCH, SchemeOptions
from pe_swap.schemes.parameters import at_least_float32, layer_parameters, of_layer
from pe_swap.schemes.positions import Positions


def running_sum(log_gates: Tensor) -> Tensor:
    """Return `c_i = sum_{l <= i} log f_l` over the last dimension, float64.

    A float32 sum over 100,000 tokens would be off by hundredths of a logit.
    """
    return log_gates.double().cumsum(dim=-1)


def initial_bias(reach: float) -> float:
    """Return the gate logit `b` with `log sigmoid(b) = -1 / reach`: gates that lose one logit in `reach` positions."""
    return -math.log(math.expm1(1.0 / reach))


@dataclass(frozen=True)
class FoxOptions(SchemeOptions):
    """Options of `fox`.

    Attributes:
        initial_reach: distance, in positions, at which a token has lost one logit before any training. `"match"` is a 32nd of the
            trained length, and at least 2: the least disturbing of seven reaches on two small models, trained at 64 and at 256.
    """

    scheme: ClassVar[str] = "fox"

    initial_reach: float | str = MATCH

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("initial_reach", 1.0, 1e9, or_text=(MATCH,))

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedFoxOptions:
        """Return the options with the reach written out."""
        return self.written_out(ResolvedFoxOptions, native, initial_reach=max(2.0, geometry.trained_length / 32))


@dataclass(frozen=True, kw_only=True)
class ResolvedFoxOptions(FoxOptions):
    """`FoxOptions` as they are used and saved."""

    initial_reach: float


class Fox(Scheme):
    """`bias_ij = c_i - c_j` with `c` the running sum of `log sigmoid(w . x + b)`, in logits; one gate per head and layer.

    The gate's logarithm is carried beside each key, in the model's dtype; the running sum is taken in float64 when scores are
    computed, so that a cached sum can neither round nor go stale. Only tokens between key and query count: padding on the
    left does not, padding inside a row (a padded prompt that is decoded further) does.

    Start on a pretrained model: `w = 0` and a `b` that lets older tokens fade evenly (`initial_reach`), as a bias against distance
    would. A large reach is nearly the model without its table. `configs/README.md` has the figures.
    """

    Options = FoxOptions
    summary = "older tokens fade by forget gates that read the hidden state"
    shift_invariant = True
    causal_only = True

    options: ResolvedFoxOptions

    def __init__(self, options: ResolvedFoxOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the gates: weights `[heads, hidden_size]` and biases `[heads]` of every layer."""
        super().__init__(options, geometry, layers)
        self.gate_weights = layer_parameters(layers, geometry.num_heads, geometry.hidden_size)
        self.gate_biases = layer_parameters(layers, geometry.num_heads)
        self.reset_parameters()

    def extra_key_channels(self, hidden_states: Tensor, *, layer: int) -> Tensor:
        """Return `log f`, `[batch, heads, length, 1]`; see `Scheme.extra_key_channels`."""
        logits = F.linear(hidden_states, of_layer(self.gate_weights, layer), of_layer(self.gate_biases, layer))
        return F.logsigmoid(logits.to(at_least_float32(logits.dtype))).to(logits.dtype).transpose(1, 2)[..., None]

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return `c_i - c_j`, `[batch, heads, q_len, kv_len]`, float32; see `Scheme.score_bias`.

        Keys after the query get positive numbers, which the causal mask removes.
        """
        log_gates = log_gates_of(positions)
        sums = running_sum(log_gates)
        at_query = sums.index_select(-1, positions.query_slots - positions.key_slots[0])
        return (at_query[..., :, None] - sums[..., None, :]).to(at_least_float32(log_gates.dtype))

    def reset_parameters(self) -> None:
        """Set weights to zeros and biases so that gates lose one logit in `initial_reach` positions."""
        for weight in self.gate_weights.values():
            nn.init.zeros_(weight)
        for bias in self.gate_biases.values():
            nn.init.constant_(bias, initial_bias(self.options.initial_reach))


def log_gates_of(positions: Positions) -> Tensor:
    """Return what `extra_key_channels` gave for every key, `[batch, heads, kv_len]`."""
    if positions.carried is None:
        raise ValueError("fox: no gates came with the keys; score_bias needs what extra_key_channels gave for every one of them.")
    return positions.carried[..., 0]


# --- Faster forms of the same numbers ---


@SCHEMES.register("fox")
class FastFox(Fox):
    """`Fox` with one running sum for all blocks of a call, and differences in float32."""

    def prepare(self, positions: Positions, *, layer: int) -> Tensor:
        """Return the running sum over all keys, `[batch, heads, kv_len]`, float64; see `Scheme.prepare`."""
        return running_sum(log_gates_of(positions))

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return `c_i - c_j`; see `Fox.score_bias`. Both are counted from the block's last query: near it they are small."""
        sums: Tensor = self.prepare(positions, layer=layer) if positions.prepared is None else positions.prepared
        dtype = at_least_float32(log_gates_of(positions).dtype)
        at_query = sums.index_select(-1, positions.query_slots - positions.key_slots[0])
        last = at_query[..., -1:]
        by_key = (sums[..., : key.shape[2]] - last).to(dtype)[..., None, :]
        return -by_key if query.shape[2] == 1 else (at_query - last).to(dtype)[..., None] - by_key
