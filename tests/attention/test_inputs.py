"""What a family does to its scores: grouped key heads, caps, sinks, scaled queries, against attention pair by pair."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

import pe_swap
from pe_swap.attention import backends, blockwise
from pe_swap.attention.call import per_key_head, per_query_head
from pe_swap.errors import UnsupportedBackendError
from pe_swap.schemes import SCHEMES, Scheme
from pe_swap.schemes.base import ATTENTION_HOOKS, hooks_of
from pe_swap.schemes.positions import Positions
from tests.attention.direct_calls import (
    Attention,
    Carrying,
    DirectCall,
    Relative,
    Scoring,
    ScoringAndRelative,
    Sizes,
    Turning,
    Valuing,
    build,
    direct_call,
    factor_of,
)
from tests.references import attention as reference
from tests.support.families import tiny, token_ids

KINDS = [Turning, Relative, Scoring, ScoringAndRelative, Valuing, Carrying]
BACKENDS = ["eager", "sdpa"]
EXACT = {"atol": 1e-12, "rtol": 1e-10}
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
GROUPED, WHOLE = Sizes(key_heads=2), Sizes()
every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def slots(call: DirectCall) -> tuple[Tensor, Tensor]:
    """Return the slots of queries and keys."""
    first = call.sizes.first_key_slot
    return call.context.call.query_slots, torch.arange(first, first + call.sizes.kv_len)


def expected(call: DirectCall, *, scaling: float, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """Return the output of a call with one of `KINDS`, pair by pair."""
    scheme, query, key = call.scheme, call.query, call.key
    query_slots, key_slots = slots(call)
    if isinstance(scheme, Turning):
        query = query * factor_of(query_slots, "query")[:, None]
        key = key * factor_of(key_slots, "key")[:, None]
    groups = call.sizes.heads // call.sizes.key_heads
    scores = isinstance(scheme, (Scoring, ScoringAndRelative))

    def distance(i: int, j: int) -> int:
        return int(key_slots[j] - query_slots[i])

    def score_bias(row: int, head: int, i: int, j: int) -> float:
        if scores:
            product = query[row, head, i, 0] * key[row, head // groups, j, 0]
            return float(0.3 * product + 0.1 * scaling * distance(i, j))
        if isinstance(scheme, Carrying):
            first, second = call.hidden_states[row, j, 0], call.hidden_states[row, j, 1]
            return float(first * (head + 1) - (second + head + 1))
        return 0.0

    def relative_bias(row: int, head: int, i: int, j: int) -> float:
        return float(scheme.table.detach()[head, distance(i, j) + 50]) if isinstance(scheme, Relative) else 0.0

    output, probabilities = reference.attention(
        query,
        key,
        call.value,
        scaling=scaling,
        allowed=call.allowed,
        score_bias=score_bias,
        relative_bias=relative_bias,
        softcap=softcap,
        sinks=sinks,
    )
    if isinstance(scheme, Valuing):
        distances = (key_slots[None, :] - query_slots[:, None]).double()
        output = output + (probabilities * distances).sum(-1, keepdim=True)
    return output


@every_kind
@every_backend
@pytest.mark.parametrize("sizes", [WHOLE, GROUPED, Sizes(key_heads=1)], ids=["whole", "grouped", "one"])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_key_heads(kind: type[Scheme], backend: str, sizes: Sizes, masked: bool) -> None:
    call = direct_call(build(kind), sizes, masked=masked)
    torch.testing.assert_close(call.run(backend), expected(call, scaling=6**-0.5), **EXACT)


@every_kind
@every_backend
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["", "cap"])
def test_caps_and_sinks(kind: type[Scheme], backend: str, softcap: float | None, sinks: Tensor | None) -> None:
    call = direct_call(build(kind), GROUPED, masked=True)
    found = call.run(backend, scaling=0.8, softcap=softcap, s_aux=sinks)
    torch.testing.assert_close(found, expected(call, scaling=0.8, softcap=softcap, sinks=sinks), **EXACT)
    if softcap is not None or sinks is not None:
        assert (found - call.run(backend, scaling=0.8)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [Turning, Relative])
@pytest.mark.parametrize("heads", [4, 3], ids=["power of two", "not"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # PyTorch's own import
def test_flex_takes_groups_and_caps(kind: type[Scheme], heads: int) -> None:
    call = direct_call(build(kind, num_heads=heads), Sizes(heads=heads, key_heads=1))
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        found = call.run("flex_attention", softcap=1.5)
    torch.testing.assert_close(found, expected(call, scaling=6**-0.5, softcap=1.5), atol=1e-10, rtol=1e-8)


@every_kind
@every_backend
@pytest.mark.parametrize("first_key_slot", [0, 9])
def test_cached_keys_start_anywhere(kind: type[Scheme], backend: str, first_key_slot: int) -> None:
    sizes = Sizes(key_heads=2, q_len=3, kv_len=8, first_key_slot=first_key_slot)
    call = direct_call(build(kind), sizes)
    key = call.key
    if kind is Carrying:  # as the cache of the layer returns them
        assert call.context.carried is not None
        call = replace(call, key=torch.cat((key, per_key_head(call.context.carried, 2)), dim=-1))
    found = call.run(backend)
    torch.testing.assert_close(found, expected(replace(call, key=key), scaling=6**-0.5), **EXACT)


@every_kind
@every_backend
def test_queries_that_come_scaled(kind: type[Scheme], backend: str) -> None:
    plain = direct_call(build(kind), GROUPED)
    call = direct_call(build(kind), GROUPED, query_is_scaled=True)
    call = replace(call, query=call.query * 6**-0.5)
    torch.testing.assert_close(call.run(backend, scaling=1.0), plain.run(backend), **EXACT)


@pytest.mark.parametrize("kind", [Relative, Scoring, ScoringAndRelative, Valuing])
def test_gradients_of_grouped_heads(kind: type[Scheme], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 4)
    found = []
    for backend in BACKENDS:
        call = direct_call(build(kind), GROUPED, trains=True)
        leaves = [call.query, call.key, call.value, *call.scheme.parameters()]
        found.append(torch.autograd.grad(call.run(backend).square().sum(), leaves))
    for eager, fused in zip(*found, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(fused, eager, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", [name for name in SCHEMES.names() if hooks_of(SCHEMES[name]) & ATTENTION_HOOKS])
@every_backend
def test_a_query_head_of_every_scheme_has_the_key_of_its_group(name: str, backend: str) -> None:
    """Repeated keys and values, one for each query head, are the same call."""
    scheme = build(SCHEMES[name], head_dim=8).double()
    grouped = direct_call(scheme, Sizes(key_heads=2, q_len=9, kv_len=9, head_dim=8))
    repeated = replace(
        grouped,
        sizes=Sizes(q_len=9, kv_len=9, head_dim=8),
        key=grouped.key.repeat_interleave(2, 1),
        value=grouped.value.repeat_interleave(2, 1),
    )
    torch.testing.assert_close(grouped.run(backend), repeated.run(backend), atol=1e-10, rtol=1e-8)


def test_the_fused_kernel_reads_grouped_keys_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, original = [], F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        shapes.append((query.shape[1], key.shape[1], kwargs["enable_gqa"]))
        return original(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    call = direct_call(build(Relative), GROUPED)
    with torch.no_grad():
        call.run("sdpa")
    assert shapes == [(4, 2, True)]


@every_backend
@pytest.mark.parametrize("keyword", ["position_bias", "indices", "sinks", "nonsense"])
def test_a_keyword_that_may_change_scores_is_refused_by_name(backend: str, keyword: str) -> None:
    call = direct_call(build(Relative), WHOLE)
    with pytest.raises(UnsupportedBackendError, match=f"'{keyword}'"):
        call.run(backend, **{keyword: torch.zeros(1, 4, 7, 7)})
    same = {"position_ids": torch.arange(7)[None], "use_cache": True, "output_attentions": True, "sliding_window": 3}
    assert torch.equal(call.run(backend, **same, **{keyword: None}), call.run(backend))


@every_backend
@pytest.mark.parametrize("kind", [Turning, Relative])
def test_the_zeros_that_a_hook_hands_in_change_nothing_and_whatever_else_looks_like_them_is_refused(
    backend: str, kind: type[Scheme]
) -> None:
    call, zeros = direct_call(build(kind), WHOLE), torch.zeros(1, 1, 1, WHOLE.kv_len)
    with pytest.raises(UnsupportedBackendError, match="'position_bias'"):
        call.run(backend, position_bias=zeros)
    silenced = replace(call, context=replace(call.context, native_bias_is_zero=True))
    assert torch.equal(silenced.run(backend, position_bias=zeros), call.run(backend))


@pytest.mark.parametrize("sizes", [{}, {"num_heads": 1, "d_kv": 96}], ids=["heads", "one head"])
def test_a_t5_that_keeps_its_bias_in_a_layer_is_refused_token_by_token_too(sizes: dict[str, int]) -> None:
    """The bias of one head for one query has the shape of the zeros that stand for it."""
    model, ids = tiny("t5", **sizes), token_ids(1, 5)
    pe_swap.swap_positional(model, "alibi", part="decoder", layers=[1])
    for length in (1, 5):
        with pytest.raises(UnsupportedBackendError, match="'position_bias'"):
            model.generate(ids, decoder_input_ids=ids[:, :length], max_new_tokens=3, min_new_tokens=3)


@pytest.mark.parametrize("kind", [Turning, Relative])
def test_flex_refuses_sinks(kind: type[Scheme]) -> None:
    call = direct_call(build(kind), WHOLE)
    with pytest.raises(UnsupportedBackendError, match=r"sinks.*eager"):
        call.run("flex_attention", s_aux=SINKS)


def test_carried_channels_come_apart_again() -> None:
    carried = torch.randn(2, 6, 5, 3)
    stored = per_key_head(carried, 2)
    assert stored.shape == (2, 2, 5, 9)
    assert torch.equal(per_query_head(stored, 3), carried)
    assert per_key_head(carried, 6) is carried


def test_eager_without_a_scheme_is_the_familys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module whose class stands in a file with an `eager_attention_forward` gets that one, with every keyword."""
    given: list[dict[str, Any]] = []

    def own(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        given.append(kwargs)
        return query.transpose(1, 2), None

    function = AttentionInterface()["pe_swap_eager"]
    query, key = torch.randn(1, 4, 5, 6), torch.randn(1, 2, 5, 6)
    plain, probabilities = function(Attention(2), query, key, key, None)
    wanted = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(plain.transpose(1, 2), wanted)
    assert probabilities.shape == (1, 4, 5, 5)
    monkeypatch.setattr(sys.modules[Attention.__module__], "eager_attention_forward", own, raising=False)
    found, _ = function(Attention(2), query, key, key, None, scaling=0.5, softcap=3.0, s_aux=SINKS)
    assert torch.equal(found, query.transpose(1, 2))
    assert given == [{"scaling": 0.5, "softcap": 3.0, "s_aux": SINKS}]


def test_the_other_backends_hand_caps_and_sinks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def kernel(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        given.append(kwargs | {"key_heads": key.shape[1]})
        return query.transpose(1, 2), None

    monkeypatch.setattr(backends, "library_function", lambda name, module=None: kernel)
    call = direct_call(build(Turning), GROUPED)
    call.run("flash_attention_2", softcap=3.0, s_aux=SINKS, sliding_window=4)
    (keywords,) = given
    assert (keywords["softcap"], keywords["sliding_window"], keywords["key_heads"]) == (3.0, 4, 2)
    assert keywords["s_aux"] is SINKS


def test_positions_of_a_block_of_keys() -> None:
    ids = torch.arange(9)
    positions = Positions(ids, ids, ids[None], ids[None]).block(4, 7, 7, 2)
    assert positions.key_slots.tolist() == [2, 3, 4, 5, 6]
    of_call = torch.arange(17) - 8  # entry n: the distance itself
    rows = positions.by_distance(of_call)
    wanted = positions.distance
    assert torch.equal(rows[torch.arange(5)[None] - torch.arange(3)[:, None] + 2], wanted)
