"""KERPLE: a trained kernel of the distance, a head.

Chi, Fan, Ramadge and Rudnicky, "KERPLE: Kernelized Relative Positional Embedding for Length Extrapolation" (NeurIPS 2022,
arXiv:2205.09921), section 4: the logarithmic variant `-p log(1 + a |i - j|)` with a, p > 0, and the power variant `-a |i - j| ** p`
with a > 0 and 0 < p <= 2; one a and one p a head, shared by all layers, as in the authors' code. The bias is added to scaled scores.

Differs from the paper: a and p stay in their ranges by a softplus (a sigmoid for the power), where the authors' code clamps them
between steps at 0.01; and the start, unless `start="random"`. The kernels are symmetric, so an encoder needs no other form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.options import SchemeOptions

LARGEST_POWER = 2.0
"""Above it the kernel is not conditionally positive definite."""


@dataclass(frozen=True)
class KerpleOptions(SchemeOptions):
    """Options of `kerple`.

    Attributes:
        variant: `"log"` or `"power"`.
        kernels: `"shared"`, those of a head serve all layers, or `"per_layer"`.
        start: `"middle"`, a = 0.5 and p = 1 in every head, the middle of the paper's ranges; `"random"`, the paper's, a from 0 to 1 and
            p from 0 to 2; `"flat"`, nearly no bias; or None for `"middle"` in decoders and `"flat"` in encoders.
    """

    scheme: ClassVar[str] = "kerple"

    variant: str = "log"
    kernels: str = "shared"
    start: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("variant", ("log", "power"))
        self.require_choice("kernels", ("shared", "per_layer"))
        if self.start is not None:
            self.require_choice("start", ("middle", "random", "flat"))

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> KerpleOptions:
        """Return the options with the start written out."""
        return self if self.start is not None else replace(self, start="middle" if geometry.is_causal else "flat")


def softplus_inverse(value: Tensor) -> Tensor:
    """Return what softplus takes to `value`, above 0."""
    return value + (-(-value).expm1()).log()


@SCHEMES.register("kerple")
class Kerple(Scheme):
    """`bias[h](distance) = -p[h] * log(1 + a[h] * |distance|)`, or `-a[h] * |distance| ** p[h]`, in logits.

    Start on a pretrained model: a decoder prefers near keys from the first, in the middle of the paper's ranges; a flat start is nearly
    the model without its table, which disturbs an encoder less. The README has the figures. For a long trained length, `power` with
    p = 1 in every head is near-sighted: `"random"` leaves some heads that see far.
    """

    Options = KerpleOptions
    summary = "a penalty that grows with the logarithm, or a power, of the distance, trained a head"
    shift_invariant = True

    options: KerpleOptions

    def __init__(self, options: KerpleOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build what softplus and sigmoid turn into `a` and `p`, `[heads]` each."""
        super().__init__(options, geometry, layers)
        self.bias_is_shared = options.kernels == "shared"
        names = ["shared"] if options.kernels == "shared" else [str(layer) for layer in layers]
        self.raw_scales = nn.ParameterDict({name: torch.empty(geometry.num_heads) for name in names})
        self.raw_powers = nn.ParameterDict({name: torch.empty(geometry.num_heads) for name in names})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set a and p to the start."""
        is_log = self.options.variant == "log"
        with torch.no_grad():
            for raw_scale, raw_power in zip(self.raw_scales.values(), self.raw_powers.values(), strict=True):
                scale, power = torch.full_like(raw_scale, 0.5), torch.full_like(raw_power, 1.0)
                if self.options.start == "random":
                    scale.uniform_(0.01, 1.0)
                    power.uniform_(0.01, 1.99)
                elif self.options.start == "flat":  # what is 0.01, the smallest of the authors' code, multiplies the rest
                    (power if is_log else scale).fill_(0.01)
                    power.clamp_(max=0.5)
                raw_scale.copy_(softplus_inverse(scale))
                raw_power.copy_(softplus_inverse(power) if is_log else torch.logit(power / LARGEST_POWER))

    def kernel(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return `a` and `p` of a layer, `[heads]` each, float32."""
        name = "shared" if self.options.kernels == "shared" else str(layer)
        raw_power = self.raw_powers[name].float()
        power = F.softplus(raw_power) if self.options.variant == "log" else LARGEST_POWER * torch.sigmoid(raw_power)
        return F.softplus(self.raw_scales[name].float()), power

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        """Return the bias, `[heads, n]`; see `Scheme.relative_bias`."""
        scale, power = (value[:, None] for value in self.kernel(layer))
        steps = distance.abs().to(torch.float32)[None, :]
        if self.options.variant == "log":
            return -power * torch.log1p(scale * steps)
        # 0 ** p is 0, but its gradient by p is 0 times the logarithm of 0
        return -scale * (power * steps.clamp(min=1.0).log()).exp() * (steps > 0)
