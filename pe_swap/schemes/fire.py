"""FIRE: a small trained function of the distance, relative to how far the query stands.

Li et al., "Functional Interpolation for Relative Positions Improves Long Context Transformers" (ICLR 2024, arXiv:2310.04418), section
3: `b(i, j) = f(psi(i - j) / psi(max(L, i)))`, `psi(x) = log(|c| x + 1)`, f a network of one hidden layer of 32 rectified units and one
output a head; c and the threshold `L = |multiplier * threshold|` are trained. Each layer has its own, or (FIRE-S) all share one. The
argument lies between 0 and 1 at any length. (In a decoder the output layer's bias is the same for every key of a query, so that softmax
removes it; it is kept as the paper has it.)

Differs from the paper: the start of the output layer, random there. The paper defines decoders only. For encoders this scheme has a
two-sided form of our own: `b(i, j) = f_side(psi(|i - j|) / psi(max(L, i, j)))`, with an output layer for keys before the query and at
it, and another for keys after it. Positions are those of each row, whatever its padding and its cache: i is what the model was told,
and j is counted from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.options import LARGEST_LENGTH, SchemeOptions
from pe_swap.schemes.positions import Positions

SMALLEST = 1e-6
"""Added to the denominator, as in the authors' code."""

RECENCY = 8.0
"""Logits that the start `"recency"` takes from the farthest key."""


@dataclass(frozen=True)
class FireOptions(SchemeOptions):
    """Options of `fire`.

    Attributes:
        functions: `"per_layer"`, or `"shared"` by all layers (FIRE-S).
        hidden_units: width of the network.
        threshold: queries nearer to the start than this are treated as if they stood there, in positions; a trained factor on it
            starts at 1. None is a quarter of the trained length: the paper's 512 for 2,048.
        scale: where c starts, a position.
        start: `"recency"`, `f(x) = -8 x` in every head; `"zero"`, no bias; or None for `"recency"` in decoders and `"zero"` in
            encoders. The hidden layer is the paper's but for the unit that hands x on.
    """

    scheme: ClassVar[str] = "fire"

    functions: str = "per_layer"
    hidden_units: int = 32
    threshold: float | None = None
    scale: float = 0.1
    start: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("functions", ("per_layer", "shared"))
        self.require_int("hidden_units", 1, 4096)
        if self.threshold is not None:
            self.require_number("threshold", 0.0, LARGEST_LENGTH)
        self.require_number("scale", 0.0, 1e3)
        if self.start is not None:
            self.require_choice("start", ("recency", "zero"))

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> FireOptions:
        """Return the options with the threshold and the start written out."""
        threshold = geometry.trained_length / 4 if self.threshold is None else self.threshold
        return replace(self, threshold=threshold, start=self.start or ("recency" if geometry.is_causal else "zero"))


def relative_place(distance: Tensor, reach: Tensor, scale: Tensor) -> Tensor:
    """Return `psi(distance) / psi(reach)`, float32.

    Args:
        distance: `[q_len, kv_len]`, positions, at least 0.
        reach: broadcastable to `[batch or 1, q_len, kv_len]`, positions, at least 0.
        scale: c, a scalar.
    """
    return torch.log1p(scale.abs() * distance) / (torch.log1p(scale.abs() * reach) + SMALLEST)


@SCHEMES.register("fire")
class Fire(Scheme):
    """`b(i, j) = f(psi(i - j) / psi(max(L, i)))`, in logits; it depends on where the query stands, not on the distance alone.

    Start on a pretrained model: a decoder prefers near keys from the first, `f(x) = -8 x`; from zero it is the model without its table,
    which disturbs an encoder less. The README has the figures of either.
    """

    Options = FireOptions
    summary = "a small trained network of the distance, relative to the query's position"

    options: FireOptions

    def __init__(self, options: FireOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build one network a layer, or one for all; for encoders each has an output layer for either side."""
        super().__init__(options, geometry, layers)
        assert options.threshold is not None, "options are resolved before a scheme is built"
        self.threshold = options.threshold
        names = ["shared"] if options.functions == "shared" else [str(layer) for layer in layers]
        sides = 1 if geometry.is_causal else 2
        width, outputs = options.hidden_units, sides * geometry.num_heads

        def one_each(*shape: int) -> nn.ParameterDict:
            return nn.ParameterDict({name: torch.empty(shape) for name in names})

        self.scales, self.multipliers = one_each(), one_each()
        self.hidden_weights, self.hidden_biases = one_each(width), one_each(width)
        self.output_weights, self.output_biases = one_each(outputs, width), one_each(outputs)
        self.reset_parameters()

    @property
    def reads_position_ids(self) -> bool:
        """True: how far the query stands is its id."""
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

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        """Return the bias, float32; see `Scheme.score_bias`.

        Memory is that of `[batch or 1, hidden_units, q_len, kv_len]` for a block of queries.
        """
        name = "shared" if self.options.functions == "shared" else str(layer)
        threshold = (self.multipliers[name].float() * self.threshold).abs()
        distance, query_ids = positions.distance, positions.query_ids[:, :, None]
        reach = query_ids if self.geometry.is_causal else torch.maximum(query_ids, positions.key_ids[:, None, :])
        reach = torch.maximum(reach.clamp(min=0).float(), threshold)
        steps = distance.clamp(max=0).neg() if self.geometry.is_causal else distance.abs()
        place = relative_place(steps.float(), reach, self.scales[name].float())
        hidden_weight, hidden_bias = (group[name].float()[:, None, None] for group in (self.hidden_weights, self.hidden_biases))
        hidden = torch.addcmul(hidden_bias, place[:, None], hidden_weight).relu_().flatten(2)
        output_weight, output_bias = self.output_weights[name].float(), self.output_biases[name].float()
        bias: Tensor = torch.baddbmm(output_bias[:, None], output_weight.expand(len(hidden), -1, -1), hidden)
        bias = bias.reshape(*bias.shape[:2], *place.shape[1:])
        if self.geometry.is_causal:
            return bias
        before, after = bias.chunk(2, dim=1)
        return torch.where(distance > 0, after, before)
