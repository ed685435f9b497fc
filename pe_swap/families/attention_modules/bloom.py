"""BLOOM's attention through transformers' attention functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.bloom import modeling_bloom

from pe_swap.families.attention_modules.interface import attend, cached

EAGER = "pe_swap_eager"
"""The one implementation that BLOOM has, by our name; its layers do not hold the configuration."""


class BloomAttention(modeling_bloom.BloomAttention):  # type: ignore[misc]
    """`BloomAttention` whose scores come from the layer's scheme, and not from the model's bias."""

    def forward(
        self, hidden_states: Tensor, residual: Tensor, *, attention_mask: Tensor, attention_call: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return `dropout(dense(attention)) + residual`, `[batch, q_len, hidden_size]`, and the probabilities.

        `pretraining_tp` with `slow_but_exact` adds the same products in slices: here they are added at once.
        """
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        key, value = cached(self, key, value, kwargs)
        output, probabilities = attend(
            self, EAGER, query, key, value, attention_mask,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout.p if self.training else 0.0,
            attention_call=attention_call,
        )  # fmt: skip
        return modeling_bloom.dropout_add(self.dense(output), residual, self.hidden_dropout, self.training), probabilities
