"""FIRE: a small trained function of the distance, relative to the query's position.

Li et al., "Functional Interpolation for Relative Positions Improves Long Context Transformers" (ICLR 2024, arXiv:2310.04418), section
3: `b(i, j) = f(psi(i - j) / psi(max(L, i)))`, `psi(x) = log(|c| x + 1)`, f a network of one hidden layer of 32 rectified units and one
output per head; c and the threshold `L = |multiplier * threshold|` are trained. Each layer has its own, or (FIRE-S) all share one. The
argument lies between 0 and 1 at any length. (In a decoder the output layer's bias is the same for every key of a query, so that softmax
removes it; it is kept as the paper has it.)

Differs from the paper: the start of the output layer, random there. The paper defines decoders only. For encoders this scheme has a
two-sided form, which no paper has: `b(i, j) = f_side(psi(|i - j|) / psi(max(L, i, j)))`, with an output layer for keys before the query
and at it, and another for keys after it. Positions are those of each row, whatever its padding and its cache: i is the position id, and
j is counted from it.

`python -m pe_swap show fire` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import LARGEST_LENGTH, SchemeOptions, none_is
from pe_swap.schemes.parameters import SHARED, layer_parameters, of_layer
from pe_swap.schemes.positions import Positions

SMALLEST = 1e-6
"""Added to the denominator, as in the authors' code."""

RECENCY = 8.0
"""Logits that the start `"recency"` takes from the farthest key."""


def relative_place(distance: Tensor, reach: Tensor, scale: Tensor) -> Tensor:
    """Return `psi(distance) / psi(reach)`, float32.

    Args:
        distance: `[q_len, kv_len]`, positions, at least 0.
        reach: broadcastable to `[batch or 1, q_len, kv_len]`, positions, at least 0.
        scale: c, `[1]`.
    """
    return torch.log1p(scale.abs() * distance) / (torch.log1p(scale.abs() * reach) + SMALLEST)


@dataclass(frozen=True)
class FireOptions(SchemeOptions):
    """Options of `fire`.

    Attributes:
        functions: `"per_layer"`, or `"shared"` by all layers (FIRE-S).
        hidden_units: width of the network.
        threshold: queries nearer to the start than this are treated as if they stood there, in positions; a trained factor on it
            starts at 1. None is a quarter of the trained length: the paper's 512 for 2,048.
        scale: where c starts, per position.
        start: `"recency"`, `f(x) = -8 x` in every head; `"zero"`, no bias; or None for `"recency"` in decoders and `"zero"` in
            encoders. The hidden layer is the paper's but for the unit that passes x on.
    """

    scheme: ClassVar[str] = "fire"

    functions: str = "per_layer"
    hidden_units: int = 32
    threshold: float | None = field(default=None, metadata=none_is("a quarter of the trained length"))
    scale: float = 0.1
    start: str | None = field(default=None, metadata=none_is("'recency' in decoders, 'zero' in encoders"))

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("functions", ("per_layer", SHARED))
        self.require_int("hidden_units", 1, 4096)
        self.require_number("threshold", 0.0, LARGEST_LENGTH)
        self.require_number("scale", 0.0, 1e3)
        self.require_choice("start", ("recency", "zero"))

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedFireOptions:
        """Return the options with the threshold and the start written out."""
        start = "recency" if geometry.is_causal else "zero"
        return self.written_out(ResolvedFireOptions, native, threshold=geometry.trained_length / 4, start=start)


@dataclass(frozen=True, kw_only=True)
class ResolvedFireOptions(FireOptions):
    """`FireOptions` as they are used and saved."""

    threshold: float
    start: str


class Fire(Scheme):
    """`b(i, j) = f(psi(i - j) / psi(max(L, i)))`, in logits; it depends on the query's position, not on the distance alone.

    Start on a pretrained model: a decoder prefers near keys from the first, `f(x) = -8 x`; from zero it is the model without its table,
    which disturbs an encoder less. `configs/README.md` has the figures of either.
    """

    Options = FireOptions
    summary = "a small trained network of the distance, relative to the query's position"
    on_a_grid = "summed"

    options: ResolvedFireOptions

    def __init__(self, options: ResolvedFireOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build one network per layer, or one for all; for encoders each has an output layer for either side."""
        super().__init__(options, geometry, layers)
        is_shared, width = options.functions == SHARED, options.hidden_units
        outputs = geometry.num_heads * (1 if geometry.is_causal else 2)
        self.scales = layer_parameters(layers, 1, shared=is_shared)
        self.multipliers = layer_parameters(layers, 1, shared=is_shared)
        self.hidden_weights = layer_parameters(layers, width, shared=is_shared)
        self.hidden_biases = layer_parameters(layers, width, shared=is_shared)
        self.output_weights = layer_parameters(layers, outputs, width, shared=is_shared)
        self.output_biases = layer_parameters(layers, outputs, shared=is_shared)
        self.reset_parameters()

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias, float32; see `Scheme.score_bias`."""
        threshold = (of_layer(self.multipliers, layer).float() * self.options.threshold).abs()
        distance, query_ids = positions.distance, positions.query_ids[:, :, None]
        is_causal = self.geometry.is_causal
        steps = distance.clamp(max=0).neg() if is_causal else distance.abs()
        reach = query_ids if is_causal else torch.maximum(query_ids, positions.key_ids[:, None, :])
        reach = torch.maximum(reach.clamp(min=0).float(), threshold)
        bias = self.network(relative_place(steps.float(), reach, of_layer(self.scales, layer).float()), layer)
        if is_causal:
            return bias
        before, after = bias.chunk(2, dim=1)
        return torch.where(distance > 0, after, before)

    def network(self, place: Tensor, layer: int) -> Tensor:
        """Return `f(place)`, `[batch or 1, outputs, q_len, kv_len]`, for `place`, `[batch or 1, q_len, kv_len]`, float32."""
        hidden_weight, hidden_bias, output_weight, output_bias = self.network_of(layer)
        hidden = (place[..., None] * hidden_weight + hidden_bias).relu()
        return (hidden @ output_weight.T + output_bias).permute(0, 3, 1, 2)

    def network_of(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return hidden weights and biases, and output weights and biases, of a layer, float32."""
        hidden = of_layer(self.hidden_weights, layer).float(), of_layer(self.hidden_biases, layer).float()
        return *hidden, of_layer(self.output_weights, layer).float(), of_layer(self.output_biases, layer).float()

    @property
    def reads_position_ids(self) -> bool:
        """True: the query's position is its id."""
        return True

    def reset_parameters(self) -> None:
        """Set the output layer to zeros and the rest to the paper's start, then, for recency, one unit to the argument itself."""
        with torch.no_grad():
            for parameters, start in ((self.scales, self.options.scale), (self.multipliers, 1.0)):
                for parameter in parameters.values():
                    parameter.fill_(start)
            for parameter in (*self.hidden_weights.values(), *self.hidden_biases.values()):
                nn.init.uniform_(parameter, -1.0, 1.0)
            for parameter in (*self.output_weights.values(), *self.output_biases.values()):
                nn.init.zeros_(parameter)
            if self.options.start == "recency":
                for name, output_weight in self.output_weights.items():
                    self.hidden_weights[name][0] = 1.0
                    self.hidden_biases[name][0] = 0.0
                    output_weight[:, 0] = -RECENCY


# --- Faster forms of the same numbers ---


@SCHEMES.register("fire")
class FastFire(Fire):
    """`Fire` with its hidden layer in one buffer, `[batch or 1, hidden_units, q_len * kv_len]`, and no transposed copy of the output."""

    def network(self, place: Tensor, layer: int) -> Tensor:
        """Return `f(place)`; see `Fire.network`."""
        hidden_weight, hidden_bias, output_weight, output_bias = self.network_of(layer)
        hidden = torch.addcmul(hidden_bias[:, None, None], place[:, None], hidden_weight[:, None, None]).relu_().flatten(2)
        bias: Tensor = torch.baddbmm(output_bias[:, None], output_weight.expand(len(hidden), -1, -1), hidden)
        return bias.reshape(*bias.shape[:2], *place.shape[1:])
