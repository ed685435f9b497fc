"""What a scheme prepares for a call serves every block of it, for every scheme that prepares anything."""

from dataclasses import replace

import pytest
import torch

from pe_swap.schemes import SCHEMES, Scheme
from tests.support.schemes import build, geometry, positions

PREPARING = [name for name in SCHEMES.names() if SCHEMES[name].prepare is not Scheme.prepare]
CASES = [(name, is_causal) for name in PREPARING for is_causal in (True, False) if is_causal or not SCHEMES[name].causal_only]


def test_some_schemes_prepare() -> None:
    assert {"deberta", "fox", "transformer_xl"} <= set(PREPARING)


@pytest.mark.parametrize(("name", "is_causal"), CASES)
@pytest.mark.parametrize(("first_query", "q_len", "kv_len"), [(0, 9, 9), (4, 5, 9), (4, 5, 12)])
def test_a_blocks_scores_are_those_of_the_whole(name: str, is_causal: bool, first_query: int, q_len: int, kv_len: int) -> None:
    scheme = build(name, sizes=geometry(hidden_size=24, num_heads=3, head_dim=8, is_causal=is_causal))
    for parameter in scheme.parameters():
        torch.nn.init.normal_(parameter)
    query, key = torch.randn(2, 3, q_len, 8), torch.randn(2, 3, kv_len, 8)
    call = positions(first_query, q_len, kv_len)
    if "extra_key_channels" in scheme.hooks:
        call = replace(call, carried=scheme.extra_key_channels(torch.randn(2, kv_len, 24), layer=1))
    prepared = replace(call, prepared=scheme.prepare(call, layer=1))
    whole = scheme.score_bias(query, key, call, scaling=0.5, layer=1)
    assert whole.abs().max() > 0.1
    for start, stop, kv_stop in ((0, 2, kv_len), (2, 5, kv_len), (2, 5, first_query + 5)):
        block = prepared.block(start, stop, kv_stop)
        part = scheme.score_bias(query[:, :, start:stop], key[:, :, :kv_stop], block, scaling=0.5, layer=1)
        seen = block.distance <= (0 if is_causal else kv_len)
        torch.testing.assert_close(part[..., seen], whole[:, :, start:stop, :kv_stop][..., seen], atol=1e-5, rtol=1e-5)
