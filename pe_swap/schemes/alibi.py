"""ALiBi: attention with linear biases.

Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation" (ICLR 2022,
arXiv:2108.12409), section 3: `softmax(q_i K^T + m . [-(i-1), ..., -1, 0])`; slopes of the authors' `get_slopes`.

Differs from the paper: encoders take the symmetric form `-m |j - i|`, which the paper does not define (MosaicBERT and others use
it). It cannot tell a text, or an image, from its mirror image. Slopes may be trained. The bias is added after the scores are scaled by
`head_dim ** -0.5`, as in the authors' code.

`python -m pe_swap show alibi` draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry
from pe_swap.schemes.options import SchemeOptions


def linear_bias(distance: Tensor, slopes: Tensor) -> Tensor:
    """Return `-slopes[h] * |distance|`, `[heads, n]`, in logits, for distances `[n]` and slopes `[heads]`."""
    return -slopes[:, None] * distance.abs().to(torch.float32)[None, :]


def geometric_slopes(num_heads: int) -> list[float]:
    """Return `2 ** (-8 h / num_heads)` for h = 1 to `num_heads`, in logits per position."""
    return [2.0 ** (-8.0 * head / num_heads) for head in range(1, num_heads + 1)]


def press_slopes(num_heads: int) -> list[float]:
    """Return the authors' slopes, in logits per position.

    For a power of two they are the geometric ones. For any other number: those of the largest power of two below it, then the
    first, third, fifth, ... of twice that power, until there are enough.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    return geometric_slopes(below) + geometric_slopes(2 * below)[0::2][: num_heads - below]


@dataclass(frozen=True)
class AlibiOptions(SchemeOptions):
    """Options of `alibi`.

    Attributes:
        slopes: `"press"`, the authors' slopes (for a number of heads that is no power of two: those of the next smaller power,
            then every second one of the next larger), or `"geometric"`, `2 ** (-8 h / heads)` for any number of heads.
        trainable: make the slopes parameters, one set for all layers.
    """

    scheme: ClassVar[str] = "alibi"

    slopes: str = "press"
    trainable: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("slopes", ("press", "geometric"))
        self.require_bool("trainable")


@SCHEMES.register("alibi")
class Alibi(Scheme):
    """`bias[h](distance) = -slopes[h] * |distance|`, in logits.

    In a decoder only distances up to 0 occur, so this is the paper's causal form; in an encoder it is the symmetric one.
    Start on a pretrained model: the slopes themselves. No start preserves the function; half of the heads attend to little beyond a few
    tokens until the model is fine-tuned.
    """

    Options = AlibiOptions
    summary = "a penalty that grows linearly with distance, one slope per head"
    on_a_grid = "summed"
    shift_invariant = True
    tells_direction = False
    bias_is_shared = True

    options: AlibiOptions

    def __init__(self, options: AlibiOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the slopes, `[heads]`."""
        super().__init__(options, geometry, layers)
        self.slopes = nn.Parameter(torch.empty(geometry.num_heads)) if options.trainable else None
        self.reset_parameters()

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        """Return `-slopes * |distance|`, `[heads, n]`; see `Scheme.relative_bias`."""
        return linear_bias(distance, self.initial_slopes(distance.device) if self.slopes is None else self.slopes.float())

    def initial_slopes(self, device: torch.device) -> Tensor:
        """Return the slopes that the option names, `[heads]`, float32."""
        slopes_for = {"press": press_slopes, "geometric": geometric_slopes}[self.options.slopes]
        return torch.tensor(slopes_for(self.geometry.num_heads), dtype=torch.float32, device=device)

    def reset_parameters(self) -> None:
        """Set trainable slopes to the paper's."""
        if self.slopes is not None:
            with torch.no_grad():
                self.slopes.copy_(self.initial_slopes(self.slopes.device))
