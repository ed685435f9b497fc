"""No positions at all ("NoPE"), and what keeps such a model working on longer input ("DroPE").

Haviv et al., "Transformer Language Models without Positional Encodings Still Learn Positional Information" (Findings of EMNLP
2022, arXiv:2203.16634); Kazemnejad et al., "The Impact of Positional Encoding on Length Generalization in Transformers" (NeurIPS
2023, arXiv:2305.19466). Gelberg et al., "Extending the Context of Pretrained LLMs by Dropping Their Positional Embeddings" (2025,
arXiv:2512.12167): drop the positions of a trained model, fine-tune at the trained length, normalising queries and keys where
training is unstable, and multiply the scores by `1 + c ln(s)` on input `s` times as long.

Differs from the papers: `s` is taken for every query, keys it may look at over trained length and at least 1, where the paper
has one `s` for a whole input: a cached pass then equals an uncached one. The normalisation is RMSNorm over each head's dimensions,
with one gain per dimension, shared by heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.parameters import at_least_float32, layer_parameters, of_layer

NORM_EPSILON = 1e-6
"""Added to the mean square of a head's dimensions, as in transformers' models with such norms."""


def temperature_factor(num_keys: Tensor, trained_length: int, coefficient: float) -> Tensor:
    """Return `1 + c ln(keys / trained_length)`, at least 1, the shape of `num_keys`, float32."""
    extension = (num_keys.float() / trained_length).clamp(min=1.0)
    return 1.0 + coefficient * extension.log()


@dataclass(frozen=True)
class NoneOptions(SchemeOptions):
    """Options of `none`.

    Attributes:
        temperature: `"log"` multiplies queries with more keys than in training by `1 + c ln(keys / trained_length)`.
        temperature_coefficient: that `c`. The default is that of YaRN's attention factor, and no number of DroPE's: a model's own is
            found by measuring at the longer length.
        qk_norm: normalise queries and keys, with trained gains per layer.
    """

    scheme: ClassVar[str] = "none"

    temperature: str | None = None
    temperature_coefficient: float = 0.1
    qk_norm: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_choice("temperature", (None, "log"))
        self.require_number("temperature_coefficient", 0.0, 100.0)
        self.require_bool("qk_norm")
        if self.temperature is not None and self.logit_scale is not None:
            raise self.refuse("logit_scale", "None beside temperature='log': both scale queries by length. Choose one")

    @property
    def unused_hooks(self) -> frozenset[str]:
        """Both hooks without options; a norm and a temperature use one each."""
        used = {
            "transform_query_key": self.qk_norm,
            "query_scale": self.temperature is not None or self.logit_scale is not None,
        }
        return frozenset(hook for hook, is_used in used.items() if not is_used)


@SCHEMES.register("none")
class NoPositions(Scheme):
    """Nothing is added anywhere. In a decoder the causal mask still gives some order; an encoder ignores word order.

    Start on a pretrained model: the table goes, and with it its mean vector, which every position shared (`keep_mean=True` of a swap
    keeps that). The temperature changes nothing up to the trained length. `qk_norm` starts with gains of 1, which no pretrained model
    without such norms is used to: it is for training that would not be stable without it.
    """

    Options = NoneOptions
    summary = "no positions at all; only the causal mask gives any order"
    on_a_grid = "itself"
    shift_invariant = True
    tells_direction = False

    options: NoneOptions

    def __init__(self, options: NoneOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the gains, `[head_dim]` per layer, where queries and keys are normalised."""
        super().__init__(options, geometry, layers)
        normed = layers if options.qk_norm else ()
        self.query_gains = layer_parameters(normed, geometry.head_dim)
        self.key_gains = layer_parameters(normed, geometry.head_dim)
        self.reset_parameters()

    def query_scale(self, num_keys: Tensor, *, layer: int) -> Tensor:
        """Return `1 + c ln(keys / trained_length)`, at least 1; see `Scheme.query_scale`."""
        if self.options.temperature is None:
            return super().query_scale(num_keys, layer=layer)
        return temperature_factor(num_keys, self.geometry.trained_length, self.options.temperature_coefficient)

    def transform_query_key(self, x: Tensor, prepared: Any, *, role: Literal["query", "key"], layer: int) -> Tensor:
        """Return `x` over its root mean square, times the gains; positions play no part. See `Scheme.transform_query_key`."""
        gains, dtype = of_layer(self.query_gains if role == "query" else self.key_gains, layer), at_least_float32(x.dtype)
        return F.rms_norm(x.to(dtype), (x.shape[-1],), gains.to(dtype), NORM_EPSILON).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set every gain to 1."""
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    @property
    def tells_order(self) -> bool:
        """False: a causal mask may."""
        return False

    @property
    def reads_position_ids(self) -> bool:
        """False: normalising queries and keys reads no positions."""
        return False
