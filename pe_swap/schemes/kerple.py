"""KERPLE: a trained kernel of the distance per head.

Chi, Fan, Ramadge and Rudnicky, "KERPLE: Kernelized Relative Positional Embedding for Length Extrapolation" (NeurIPS 2022,
arXiv:2205.09921), section 4: the logarithmic variant `-p log(1 + a |i - j|)` with a, p > 0, and the power variant `-a |i - j| ** p`
with a > 0 and 0 < p <= 2; one a and one p per head, shared by all layers, as in the authors' code. The bias is added to scaled scores.

Differs from the paper: a and p stay in their ranges by a softplus (a sigmoid for the power), where the authors' code clamps them
between steps at 0.01; and the start, unless `start="random"`. The kernels are symmetric, so an encoder takes the same form; with it, it
cannot tell a text, or an image, from its mirror image.

`python -m pe_swap show kerple` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import SchemeOptions, none_is
from pe_swap.schemes.parameters import SHARED, layer_parameters, of_layer

LARGEST_POWER = 2.0
"""Above it the kernel is not conditionally positive definite."""


def logarithmic_kernel(steps: Tensor, scale: Tensor, power: Tensor) -> Tensor:
    """Return `-p log(1 + a n)` for distances n."""
    return -power * torch.log1p(scale * steps)


def power_kernel(steps: Tensor, scale: Tensor, power: Tensor) -> Tensor:
    """Return `-a n ** p` for distances n; 0 ** p is 0, but its gradient by p would be 0 times the logarithm of 0."""
    return -scale * (power * steps.clamp(min=1.0).log()).exp() * (steps > 0)


def softplus_inverse(value: Tensor) -> Tensor:
    """Return what softplus takes to `value`, above 0."""
    return value + (-(-value).expm1()).log()


@dataclass(frozen=True)
class KerpleOptions(SchemeOptions):
    """Options of `kerple`.

    Attributes:
        variant: `"log"` or `"power"`.
        kernels: `"shared"`, one kernel per head for all layers, or `"per_layer"`.
        start: `"middle"`, a = 0.5 and p = 1 in every head, the middle of the paper's ranges; `"random"`, the paper's, a from 0 to 1 and
            p from 0 to 2; `"flat"`, nearly no bias; or None for `"middle"` in decoders and `"flat"` in encoders.
    """

    scheme: ClassVar[str] = "kerple"

    variant: str = "log"
    kernels: str = SHARED
    start: str | None = field(default=None, metadata=none_is("'middle' in decoders, 'flat' in encoders"))

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("variant", ("log", "power"))
        self.require_choice("kernels", (SHARED, "per_layer"))
        self.require_choice("start", ("middle", "random", "flat"))

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedKerpleOptions:
        """Return the options with the start written out."""
        return self.written_out(ResolvedKerpleOptions, native, start="middle" if geometry.is_causal else "flat")


@dataclass(frozen=True, kw_only=True)
class ResolvedKerpleOptions(KerpleOptions):
    """`KerpleOptions` as they are used and saved."""

    start: str


@SCHEMES.register("kerple")
class Kerple(Scheme):
    """`bias[h](distance) = -p[h] * log(1 + a[h] * |distance|)`, or `-a[h] * |distance| ** p[h]`, in logits.

    Start on a pretrained model: a decoder prefers near keys from the first, in the middle of the paper's ranges; a flat start is nearly
    the model without its table, which disturbs an encoder less. `configs/README.md` has the figures. For a long trained length, `power`
    with p = 1 in every head leaves almost no weight for distant keys; `"random"` gives some heads a slower decay.
    """

    Options = KerpleOptions
    summary = "a penalty per head that grows with the logarithm, or a power, of the distance, trained"
    on_a_grid = "summed"
    shift_invariant = True
    tells_direction = False

    options: ResolvedKerpleOptions

    def __init__(self, options: ResolvedKerpleOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build what softplus and sigmoid turn into `a` and `p`, `[heads]` each."""
        super().__init__(options, geometry, layers)
        self.bias_is_shared = options.kernels == SHARED
        self.raw_scales = layer_parameters(layers, geometry.num_heads, shared=self.bias_is_shared)
        self.raw_powers = layer_parameters(layers, geometry.num_heads, shared=self.bias_is_shared)
        self.reset_parameters()

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        """Return the bias, `[heads, n]`; see `Scheme.relative_bias`."""
        scale, power = (value[:, None] for value in self.kernel(layer))
        kernel = logarithmic_kernel if self.options.variant == "log" else power_kernel
        return kernel(distance.abs().to(torch.float32)[None, :], scale, power)

    def kernel(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return `a` and `p` of a layer, `[heads]` each, float32."""
        raw_power = of_layer(self.raw_powers, layer).float()
        power = F.softplus(raw_power) if self.options.variant == "log" else LARGEST_POWER * torch.sigmoid(raw_power)
        return F.softplus(of_layer(self.raw_scales, layer).float()), power

    def reset_parameters(self) -> None:
        """Set a and p to the start."""
        is_log = self.options.variant == "log"
        with torch.no_grad():
            for raw_scale, raw_power in zip(self.raw_scales.values(), self.raw_powers.values(), strict=True):
                scale, power = torch.full_like(raw_scale, 0.5), torch.full_like(raw_power, 1.0)
                if self.options.start == "random":
                    scale.uniform_(0.01, 1.0)
                    power.uniform_(0.01, 1.99)
                elif self.options.start == "flat":  # the factor in front is 0.01, the smallest of the authors' code
                    (power if is_log else scale).fill_(0.01)
                    power.clamp_(max=0.5)
                raw_scale.copy_(softplus_inverse(scale))
                raw_power.copy_(softplus_inverse(power) if is_log else torch.logit(power / LARGEST_POWER))
