"""Lin et al. 2025, section 3, pair by pair, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def score_term(gate_logits: Tensor, first_query: int) -> Tensor:
    """Return `sum of log sigmoid(logit_l), l = j + 1 .. i`, `[batch, heads, q_len, kv_len]`; zero after the query.

    `gate_logits` is `[batch, heads, kv_len]`.
    """
    batch, heads, kv_len = gate_logits.shape
    out = torch.zeros(batch, heads, kv_len - first_query, kv_len, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            forget = [-math.log1p(math.exp(-float(logit))) for logit in gate_logits[b, h]]
            for i in range(first_query, kv_len):
                for j in range(i + 1):
                    out[b, h, i - first_query, j] = math.fsum(forget[j + 1 : i + 1])
    return out
