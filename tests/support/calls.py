"""Random attention calls, and what every fast form must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from pe_swap.attention.plain import plain_attention


@dataclass(frozen=True)
class Call:
    """The tensors of one attention call, float64."""

    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    is_causal: bool

    @property
    def q_len(self) -> int:
        """Number of queries."""
        return self.query.shape[2]

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.key.shape[2]

    def to(self, dtype: torch.dtype) -> Call:
        """Return the call in another dtype."""
        mask = self.attention_mask
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        return Call(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype), mask, self.is_causal)


@st.composite
def calls(draw: st.DrawFn, longest: int = 40) -> Call:
    """Draw a call: any lengths, cached keys or none, and the masks that transformers makes."""
    batch, heads, head_dim = draw(st.integers(1, 2)), draw(st.sampled_from((1, 3))), draw(st.sampled_from((2, 5, 8)))
    q_len, cached = draw(st.integers(1, longest)), draw(st.integers(0, longest))
    kind = draw(st.sampled_from(("causal", "two-sided", "left", "right", "packed", "additive")))
    kv_len = q_len if kind in ("causal", "packed") else q_len + cached
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query, key, value = (
        torch.randn(batch, heads, length, head_dim, generator=generator, dtype=torch.float64)
        for length in (q_len, kv_len, kv_len)
    )
    mask: Tensor | None = None
    if kind not in ("causal", "two-sided"):
        mask = torch.ones(batch, 1, q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        padding = draw(st.integers(0, max(0, kv_len - q_len)))
        if kind == "left":  # queries are real tokens, so each may look somewhere
            mask[0, :, :, :padding] = False
        elif kind == "right":
            mask[0, :, :, kv_len - padding :] = False
            mask[..., 0] = True
        elif kind == "packed":
            document = torch.arange(kv_len) // draw(st.integers(1, longest))
            mask = mask & (document[:, None] == document[None, :])
        else:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    return Call(query, key, value, mask, is_causal=kind == "causal")


def left_padded_call(additive: bool) -> Call:
    """Return causal rows of which one begins with padding, whose own queries may look nowhere."""
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(2, 3, 12, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    mask[0, :, :, :5] = False
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    return Call(*tensors, mask, is_causal=False)


def looks_somewhere(call: Call) -> Tensor:
    """Return 1 for queries that may look at any key, 0 for others, `[batch, 1, q_len, 1]`."""
    assert call.attention_mask is not None
    mask = call.attention_mask
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return allowed.any(-1, keepdim=True).double()


def expected(call: Call, bias: Tensor, scaling: float) -> Tensor:
    """Return plain attention with a bias vector `[heads, q_len + kv_len - 1]` written out for every pair."""
    pairs = torch.arange(call.kv_len)[None, :] - torch.arange(call.q_len)[:, None] + call.q_len - 1
    output, _ = plain_attention(
        call.query,
        call.key,
        call.value,
        bias[:, pairs][None],
        attention_mask=call.attention_mask,
        is_causal=call.is_causal,
        scaling=scaling,
        dropout=0.0,
    )
    return output
