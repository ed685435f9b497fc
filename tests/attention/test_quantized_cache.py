"""Quantized caches, which move keys from one store to another: with exact stores they are a cache like any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import QuantizedLayer

from pe_swap.errors import SwapStateError
from tests.support.covering import covering, scheme_of
from tests.support.models import CASES, LENGTH_DEPENDENT, logits, swapped, token_ids, with_cache

CARRIES = [case for case in CASES if "extra_key_channels" in scheme_of(case).hooks]
SERVED = covering([case for case in CASES if case not in LENGTH_DEPENDENT and case not in CARRIES])
RESIDUAL = 4
"""Keys that are held back before they are moved."""


class Exact(QuantizedLayer):
    """A layer whose store for many keys rounds nothing."""

    moved = 0

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        self.moved += 1
        return tensor.clone()

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


def exact_cache(layers: int) -> DynamicCache:
    cache = DynamicCache()
    cache.layers.extend(Exact(residual_length=RESIDUAL) for _ in range(layers))
    return cache


@pytest.mark.parametrize("case", SERVED)
@torch.no_grad()
def test_chunks_and_tokens_through_it_equal_one_pass(case: str) -> None:
    model, ids = swapped("gpt2", case), token_ids(2, 20)
    cache = exact_cache(model.config.n_layer)
    parts = [model(part, **with_cache(model, cache)).logits for part in ids.split((5, 1, 3, 1, 1, 1, 1, 2, 1, 4), dim=1)]
    layer = cache.layers[0]
    assert isinstance(layer, Exact)
    assert layer.moved >= 3
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids, use_cache=False), atol=5e-5, rtol=1e-4)


@pytest.mark.skipif(
    not hasattr(QuantizedLayer, "_apply_pending_reorder"), reason="this transformers does not reorder a quantized cache"
)
@pytest.mark.parametrize("case", ["alibi", "rope", "shaw"])
def test_beams_over_it_are_beams_over_a_dynamic_one(case: str) -> None:
    model, ids = swapped("gpt2", case), token_ids(2, 9)
    settings = {
        "max_new_tokens": 9,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    found = model.generate(ids, **with_cache(model, exact_cache(model.config.n_layer)), **settings)
    assert torch.equal(found, model.generate(ids, **settings))


@pytest.mark.parametrize("case", CARRIES)
def test_a_scheme_that_keeps_numbers_beside_keys_is_refused(case: str) -> None:
    model, ids = swapped("gpt2", case), token_ids(1, 9)
    with pytest.raises(SwapStateError, match=r"^Layer 0 carries the scheme 'fox'.*quantized cache would round them\. Use a"):
        logits(model, ids, **with_cache(model, exact_cache(model.config.n_layer)))
