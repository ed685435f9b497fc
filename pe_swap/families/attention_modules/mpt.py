"""MPT's attention through transformers' attention functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.mpt import modeling_mpt

from pe_swap.families.attention_modules.interface import attend, cached

EAGER = "pe_swap_eager"
"""The one implementation that MPT has, by our name; its layers do not hold the configuration."""


class MptAttention(modeling_mpt.MptAttention):  # type: ignore[misc]
    """`MptAttention` whose scores come from the layer's scheme, and not from the model's bias."""

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor, attention_call: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, `[batch, q_len, hidden_size]`, and the probabilities.

        Args:
            hidden_states: `[batch, q_len, hidden_size]`.
            attention_mask: `[batch, 1, q_len, kv_len]`; True where a query may not look.
            attention_call: the layer's scheme and positions.
            kwargs: the cache, and what is not used here.
        """
        projected = self.Wqkv(hidden_states)
        if self.clip_qkv:
            projected = projected.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (
            part.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for part in projected.chunk(3, dim=-1)
        )
        key, value = cached(self, key, value, kwargs)
        mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(attention_mask, torch.finfo(query.dtype).min)
        output, probabilities = attend(
            self, EAGER, query, key, value, mask,
            scaling=self.softmax_scale,
            dropout=self.attn_dropout_p if self.training else 0.0,
            attention_call=attention_call,
        )  # fmt: skip
        return self.out_proj(output), probabilities
