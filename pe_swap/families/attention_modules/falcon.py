"""Falcon's attention through transformers' attention functions, where its positions are a rotation."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.falcon import modeling_falcon

from pe_swap.families.attention_modules.interface import attend, cached


class FalconAttention(modeling_falcon.FalconAttention):  # type: ignore[misc]
    """`FalconAttention` with the layer's scheme; layers without one keep the rotation that they are handed."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_call: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, `[batch, q_len, hidden_size]`, and the probabilities.

        Falcon drops no attention probabilities where it has a rotation, and neither does this.
        """
        query, key, value = (part.transpose(1, 2) for part in self._split_heads(self.query_key_value(hidden_states)))
        query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = cached(self, key, value, kwargs)
        output, probabilities = attend(
            self, self.config._attn_implementation, query, key, value, attention_mask,
            scaling=self.inv_norm_factor,
            dropout=0.0,
            attention_call=attention_call,
        )  # fmt: skip
        return self.dense(output), probabilities
