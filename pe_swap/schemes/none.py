"""No positions at all ("NoPE").

Haviv et al., "Transformer Language Models without Positional Encodings Still Learn Positional Information" (Findings of EMNLP
2022, arXiv:2203.16634); Kazemnejad et al., "The Impact of Positional Encoding on Length Generalization in Transformers" (NeurIPS
2023, arXiv:2305.19466). Differs from the papers: none.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.options import SchemeOptions


@dataclass(frozen=True)
class NoneOptions(SchemeOptions):
    """`none` has no options."""

    scheme: ClassVar[str] = "none"


@SCHEMES.register("none")
class NoPositions(Scheme):
    """Nothing is added anywhere. A causal mask alone still tells a decoder something about order; an encoder sees a bag of words.

    Start on a pretrained model: the table goes, and with it its mean vector, which every position shared.
    """

    Options = NoneOptions
    summary = "no positions at all; the causal mask alone tells order"
    shift_invariant = True

    def start_from(self, position_table: Tensor) -> None:
        """Warn where the swap leaves a model that cannot tell any order."""
        if not self.geometry.is_causal:
            warnings.warn(
                "The scheme 'none' on an encoder leaves a bag of words: without a causal mask nothing tells the order of tokens. "
                "Use it as a baseline only; alibi, t5, rope and shaw have two-sided forms.",
                UserWarning,
                stacklevel=3,
            )
