"""Queries and keys that come back wider than they went."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from pe_swap.attention.plain import plain_attention
from pe_swap.errors import SchemeContractError, SwapStateError
from pe_swap.patching.layer_cache import LayerCache
from tests.attention.direct_calls import Narrow, Sizes, Turning, Wide, build, direct_call, factor_of


class WideWithBias(Wide):
    """`Wide`, and a bias of the distance, which takes the other form of attention."""

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        return -0.25 * distance.abs().float().expand(self.geometry.num_heads, -1)


@pytest.mark.parametrize("kind", [Wide, WideWithBias])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_wide_queries_and_keys(kind: type[Wide], backend: str, key_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[set[int]] = []
    original = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        widths.append({query.shape[-1], key.shape[-1], value.shape[-1]})
        return original(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    call = direct_call(build(kind), Sizes(key_heads=key_heads))
    slots, groups = call.context.call.query_slots, 4 // key_heads
    query, key = (
        torch.cat((x, x[..., :3] * factor_of(slots, role)[:, None]), dim=-1)
        for x, role in ((call.query, "query"), (call.key.repeat_interleave(groups, 1), "key"))
    )
    bias = -0.25 * (slots[None, :] - slots[:, None]).abs().double() if kind is WideWithBias else None
    wanted, _ = plain_attention(
        query,
        key,
        call.value.repeat_interleave(groups, 1),
        bias,
        attention_mask=None,
        is_causal=True,
        scaling=6**-0.5,
        dropout=0.0,
    )
    with torch.no_grad():
        found = call.run(backend)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)
    assert widths == ([] if backend == "eager" else [{9}])  # one width: other ones leave the fused kernel


def test_a_shape_that_no_one_declared_is_refused() -> None:
    call = direct_call(build(Narrow), Sizes())
    with pytest.raises(
        SchemeContractError, match=r"shape \[2, 4, 7, 5\] for one of \[2, 4, 7, 6\]; the last dimension must be 6 or"
    ):
        call.run("sdpa")


def test_wide_keys_are_cached_and_a_cache_of_another_width_is_refused() -> None:
    cache = DynamicCache()
    for kind, accepted in ((Wide, True), (Wide, True), (Turning, False)):
        call = direct_call(build(kind), Sizes(key_heads=2))
        view = LayerCache(cache, replace(call.context, keys_are_transformed=True))
        assert view.get_seq_length() == cache.get_seq_length()
        if accepted:
            keys, values = view.update(call.key, call.value, 0)
            assert (keys.shape[-1], values.shape[-1]) == (9, 6)
        else:
            with pytest.raises(SwapStateError, match=r"cache holds keys of 9 channels, but the scheme 'test' needs 6"):
                view.update(call.key, call.value, 0)
