"""Sandwich: the product of two sinusoidal positions, as a bias.

Chi, Fan, Rudnicky and Ramadge, "Dissecting Transformer Length Extrapolation via the Lens of Receptive Field Analysis" (ACL 2023,
arXiv:2212.10356), section 5: of `(e_i + p_i) . (e_j + p_j)` only `p_i . p_j` is kept, which is
`sum_k cos((i - j) / 10000 ** (2k / width))` over `width / 2` frequencies, whatever the width of a head, divided by `8 h / heads` in
head h, counted from 1. Nothing is trained.

Two forms are published. They differ in the frequencies: k from 1 to `width / 2` (NeMo's `SandwichRelativePositionEmbedding`, which also
takes `width / 2` from the sum), or from 0 to `width / 2 - 1` (attention-gym's `generate_sandwich_bias`).

Differs from the paper: both forms have `width / 2` taken from the sum, so that the bias is 0 at distance 0. Softmax removes a constant,
and narrow dtypes keep more digits of what remains. The sum is symmetric, so an encoder takes the same form; with it, it cannot tell a
text, or an image, from its mirror image.

`python -m pe_swap show sandwich` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.options import LARGEST_TABLE, SchemeOptions

BASE = 10_000
"""As in the paper; the slowest cosine turns by nearly `1 / base` radians per position."""

FREQUENCIES_AT_ONCE = 16
"""Frequencies whose cosines are held together."""


def sum_of_cosines(distance: Tensor, frequencies: Tensor) -> Tensor:
    """Return `sum_k (cos(distance * omega_k) - 1)`, the shape of `distance`, float64.

    Frequencies are added a few at a time: memory grows with the number of distances alone. Angles are float64 until the cosine is taken,
    as float32 would lose digits of the sum of many cosines of large angles.
    """
    steps = distance.to(torch.float64)
    total = torch.zeros_like(steps)
    for some in torch.split(frequencies, FREQUENCIES_AT_ONCE):
        total += (torch.cos(steps[:, None] * some) - 1.0).sum(-1)
    return total


@dataclass(frozen=True)
class SandwichOptions(SchemeOptions):
    """Options of `sandwich`.

    Attributes:
        convention: `"nemo"`, k from 1, or `"attention_gym"`, k from 0.
        width: twice the number of frequencies; the paper's `d`, 128 whatever the model.
    """

    scheme: ClassVar[str] = "sandwich"

    convention: str = "nemo"
    width: int = 128

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("convention", ("nemo", "attention_gym"))
        self.require_int("width", 2, LARGEST_TABLE)
        if self.width % 2:
            raise self.refuse("width", "even: each frequency gives a sine and a cosine")


@SCHEMES.register("sandwich")
class Sandwich(Scheme):
    """`bias[h](distance) = (sum_k cos(distance * omega_k) - width / 2) * heads / (8 h)`, in logits, h from 1.

    Start on a pretrained model: the bias itself. No start preserves the function; the first heads attend to little beyond a few tokens
    until the model is fine-tuned.
    """

    Options = SandwichOptions
    summary = "the product of sinusoidal positions as a bias: a penalty that grows with the logarithm of the distance"
    on_a_grid = "summed"
    shift_invariant = True
    tells_direction = False
    bias_is_shared = True

    options: SandwichOptions

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        """Return the bias, `[heads, n]`; see `Scheme.relative_bias`."""
        num_heads = self.geometry.num_heads
        frequencies = torch.tensor(self.frequencies(), dtype=torch.float64, device=distance.device)
        heads = torch.arange(1, num_heads + 1, device=distance.device)
        return sum_of_cosines(distance, frequencies).float()[None, :] * (num_heads / (8.0 * heads[:, None].float()))

    def frequencies(self) -> list[float]:
        """Return the frequencies, radians per position."""
        first = 1 if self.options.convention == "nemo" else 0
        width = self.options.width
        return [BASE ** (-2 * k / width) for k in range(first, first + width // 2)]
