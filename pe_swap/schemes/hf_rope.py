"""From rotary parameters to frequencies, by transformers' own functions.

Keys and meanings are those of transformers' `rope_parameters`. The functions read a model's configuration; a stand-in with what they
read of it is enough. The only file of this folder that imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryConfig:
    """What transformers' functions read of a configuration.

    Attributes:
        rope_parameters: the rotary parameters, with `rope_type` and `rope_theta`.
        head_dim: dimensions that turn.
        max_position_embeddings: the length up to which `dynamic` changes nothing, in positions.
    """

    rope_parameters: dict[str, Any]
    head_dim: int
    max_position_embeddings: int

    @property
    def hidden_size(self) -> int:
        """Width of a model of one head: some functions work out a width before they see that `head_dim` is given."""
        return self.head_dim

    @property
    def num_attention_heads(self) -> int:
        """One head."""
        return 1

    def standardize_rope_params(self) -> None:
        """Do nothing: the parameters are complete."""


def transformers_frequencies(
    config: RotaryConfig, length: int | Tensor | None = None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Return what transformers has for a rope type.

    Args:
        config: the parameters.
        length: how long the sequence is so far, in positions, for the types that depend on it; for `dynamic` also a tensor of lengths,
            `[..., 1]`.
        device: where they are computed.

    Returns:
        Radians per position, `[head_dim / 2]`, or `[..., head_dim / 2]` for a tensor of lengths, float32; and the factor on sine and
        cosine.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # here, as a list of schemes needs no transformers

    function: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    return function(config, device, seq_len=length)
