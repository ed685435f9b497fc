"""FoX: the forgetting transformer.

Lin, Nikishin, He and Courville, "Forgetting Transformer: Softmax Attention with a Forget Gate" (ICLR 2025, arXiv:2503.02130),
section 3: with a gate `f_t = sigmoid(w_f . x_t + b_f)` for every head, `x_t` being the layer's hidden state, the scores take the
bias `d_ij = sum_{l = j + 1 .. i} log f_l`, so that a token fades by what came after it. ALiBi is the case of constant gates
`f = exp(-slope)`.

Differs from the paper: the gate alone; the output gate, the norms and the shifts of "FoX (Pro)" are no positional scheme. The
authors start gate biases at 0, which forgets half of everything at each token; here `initial_reach` sets them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.positions import Positions


@dataclass(frozen=True)
class FoxOptions(SchemeOptions):
    """Options of `fox`.

    Attributes:
        initial_reach: distance, in positions, at which a token has lost one logit before any training. `"match"` is a 32nd of the
            trained length, and at least 2: the least disturbing of seven reaches on two small models, trained at 64 and at 256.
    """

    scheme: ClassVar[str] = "fox"

    initial_reach: float | str = "match"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("initial_reach", 1.0, 1e9, or_text=("match",))

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> FoxOptions:
        """Return the options with the reach written out."""
        return replace(self, initial_reach=max(2.0, geometry.trained_length / 32)) if self.initial_reach == "match" else self


def initial_bias(reach: float) -> float:
    """Return the gate logit `b` with `log sigmoid(b) = -1 / reach`: gates that lose one logit in `reach` positions."""
    return -math.log(math.expm1(1.0 / reach))


@SCHEMES.register("fox")
class Fox(Scheme):
    """`bias_ij = c_i - c_j` with `c` the running sum of `log sigmoid(w . x + b)`, in logits; one gate a head, for every layer.

    The gate's logarithm is carried beside each key, in the model's dtype; the running sum is taken in float64 when scores are
    computed, so that a cached sum can neither round nor go stale. Only tokens between key and query count: padding on the
    left does not, padding inside a row (a padded prompt that is decoded further) does.

    Start on a pretrained model: `w = 0` and a `b` that lets older tokens fade evenly (`initial_reach`), as a bias against distance
    would. A large reach is nearly the model without its table. The README has the figures.
    """

    Options = FoxOptions
    summary = "older tokens fade by forget gates that read the hidden state"
    shift_invariant = True
    causal_only = True

    options: FoxOptions

    def __init__(self, options: FoxOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the gates: weights `[heads, hidden_size]` and biases `[heads]` of every layer."""
        super().__init__(options, geometry, layers)
        heads = geometry.num_heads
        self.gate_weights = nn.ParameterDict({str(layer): torch.empty(heads, geometry.hidden_size) for layer in layers})
        self.gate_biases = nn.ParameterDict({str(layer): torch.empty(heads) for layer in layers})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weights to zeros and biases so that gates lose one logit in `initial_reach` positions."""
        assert not isinstance(self.options.initial_reach, str), "options are resolved before a scheme is built"
        for weight in self.gate_weights.values():
            nn.init.zeros_(weight)
        for bias in self.gate_biases.values():
            nn.init.constant_(bias, initial_bias(self.options.initial_reach))

    def extra_key_channels(self, hidden_states: Tensor, *, layer: int) -> Tensor:
        """Return `log f`, `[batch, heads, length, 1]`; see `Scheme.extra_key_channels`."""
        weight, bias = self.gate_weights[str(layer)], self.gate_biases[str(layer)]
        logits = F.linear(hidden_states, weight, bias)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return F.logsigmoid(logits.to(wide)).to(logits.dtype).transpose(1, 2)[..., None]

    def prepare(self, positions: Positions, *, layer: int) -> Tensor:
        """Return the running sum over all keys, `[batch, heads, kv_len]`, float64; see `Scheme.prepare`.

        A float32 sum over 100,000 tokens would be off by hundredths of a logit.
        """
        assert positions.carried is not None
        return positions.carried[..., 0].double().cumsum(dim=-1)

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return `c_i - c_j`, `[batch, heads, q_len, kv_len]`, float32; see `Scheme.score_bias`.

        Keys after the query get positive numbers, which the causal mask removes.
        """
        assert positions.carried is not None
        running: Tensor = self.prepare(positions, layer=layer) if positions.prepared is None else positions.prepared
        at_query = running.index_select(-1, positions.query_slots - positions.key_slots[0])
        last = at_query[..., -1:]  # both are counted from here, and are then small wherever it matters
        wide = torch.float64 if positions.carried.dtype == torch.float64 else torch.float32
        by_key = (running[..., : key.shape[2]] - last).to(wide)[..., None, :]
        return -by_key if query.shape[2] == 1 else (at_query - last).to(wide)[..., None] - by_key
