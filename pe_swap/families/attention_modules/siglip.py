"""SigLIP's attention, with its keywords handed on to the attention function."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.siglip import modeling_siglip

from pe_swap.families.attention_modules.interface import attend


class SiglipAttention(modeling_siglip.SiglipAttention):  # type: ignore[misc]
    """`SiglipAttention` whose attention function gets the layer's scheme."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, attention_call: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, `[batch, length, hidden_size]`, and the probabilities where the attention function has them.

        Args:
            hidden_states: `[batch, length, hidden_size]`.
            attention_mask: as the attention function takes it.
            attention_call: the layer's scheme and positions.
            kwargs: what the model was called with beside, not used here, as in the family's own.
        """
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        output, probabilities = attend(
            self, self.config._attn_implementation, query, key, value, attention_mask,
            scaling=self.scale,
            dropout=self.dropout if self.training else 0.0,
            attention_call=attention_call,
        )  # fmt: skip
        return self.out_proj(output), probabilities
