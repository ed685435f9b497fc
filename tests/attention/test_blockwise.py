"""Attention in blocks with any bias, against the plain one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pe_swap.attention import blockwise
from pe_swap.attention.blockwise import blockwise_attention
from pe_swap.attention.plain import plain_attention
from pe_swap.schemes.base import FoldedBias
from pe_swap.schemes.positions import Positions, slots_from
from tests.support.calls import Call, calls, left_padded_call, looks_somewhere
from tests.support.memory import Largest

fast = settings(max_examples=50, deadline=None, derandomize=True)


def score_bias(query: Tensor, key: Tensor, positions: Positions) -> Tensor:
    """Return a bias that depends on the query, the key, the distance and the query's id: all that a scheme may use."""
    by_query, by_key = query.sum(-1)[..., :, None], key.square().sum(-1)[..., None, :]
    distance = positions.distance.to(query.dtype)
    return 0.1 * by_query * distance.sin() + 0.1 * by_key / (1 + positions.query_ids[:, None, :, None].to(query.dtype))


def value_bias(probabilities: Tensor, positions: Positions) -> Tensor:
    """Return a term that depends on probabilities and distance, the same in every dimension of the output."""
    by_distance = (probabilities * positions.distance.to(probabilities.dtype).cos()).sum(-1, keepdim=True)
    return by_distance


def positions_of(call: Call) -> Positions:
    first = call.kv_len - call.q_len
    slots = slots_from(first, call.q_len, torch.device("cpu"))
    key_slots = slots_from(0, call.kv_len, torch.device("cpu"))
    return Positions(slots, key_slots, slots[None], key_slots[None])


def both_forms(call: Call, with_value: bool) -> tuple[Tensor, Tensor]:
    positions = positions_of(call)
    options = {"attention_mask": call.attention_mask, "is_causal": call.is_causal, "scaling": 0.4, "dropout": 0.0}
    blocks = blockwise_attention(
        call.query, call.key, call.value, positions, score_bias, value_bias if with_value else None, **options
    )
    plain, probabilities = plain_attention(
        call.query, call.key, call.value, score_bias(call.query, call.key, positions), **options
    )
    return blocks, plain + value_bias(probabilities, positions) if with_value else plain


@fast
@given(calls(), st.sampled_from((4, 16, 256)), st.booleans())
def test_every_call_equals_the_plain_form_and_so_do_its_gradients(call: Call, block: int, with_value: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "QUERY_BLOCK", block)
        leaves = [tensor.clone().requires_grad_() for tensor in (call.query, call.key, call.value)]
        ours, theirs = both_forms(Call(*leaves, call.attention_mask, call.is_causal), with_value)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
        weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).reshape(ours.shape)
        found = [torch.autograd.grad((output * weights).sum(), leaves) for output in (ours, theirs)]
        for our_gradient, their_gradient in zip(*found, strict=True):
            torch.testing.assert_close(our_gradient, their_gradient, atol=1e-11, rtol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(both_forms(call, with_value)[0], theirs.detach(), atol=1e-12, rtol=1e-10)


@fast
@given(calls(), st.sampled_from((4, 16, 256)))
def test_pairs_that_have_their_bias_in_them_equal_the_plain_form_of_it(call: Call, block: int) -> None:
    """Keys are scaled by their slot: in some blocks beforehand, in some by a bias, in some by a half of each."""

    def scaled(key: Tensor, positions: Positions, share: float = 1.0) -> Tensor:
        return key * (1 + 0.1 * share * positions.key_slots.to(key.dtype))[:, None]

    def bias(query: Tensor, key: Tensor, positions: Positions) -> Tensor:
        return 0.4 * query @ (scaled(key, positions) - key).transpose(-1, -2)

    def paired(query: Tensor, key: Tensor, positions: Positions) -> FoldedBias | None:
        way = int(positions.query_slots[0]) // block % 3
        if way == 0:
            return query, scaled(key, positions), None
        return None if way == 1 else (query, scaled(key, positions, 0.5), bias(query, key, positions) / 2)

    positions = positions_of(call)
    options = {"attention_mask": call.attention_mask, "is_causal": call.is_causal, "scaling": 0.4, "dropout": 0.0}
    leaves = [tensor.clone().requires_grad_() for tensor in (call.query, call.key, call.value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "QUERY_BLOCK", block)
        ours = blockwise_attention(*leaves, positions, bias, None, fold_bias=paired, **options)
    theirs, _ = plain_attention(*leaves, bias(leaves[0], leaves[1], positions), **options)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).reshape(ours.shape)
    found = [torch.autograd.grad((output * weights).sum(), leaves) for output in (ours, theirs)]
    for our_gradient, their_gradient in zip(*found, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("block", [4, 256])
def test_a_query_that_may_look_nowhere_gets_zeros_and_sends_nothing_back(
    additive: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", block)
    call = left_padded_call(additive)
    ours, theirs = both_forms(call, with_value=False)
    theirs = theirs * looks_somewhere(call)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    found = [torch.autograd.grad(output.sum(), [call.query, call.key, call.value]) for output in (ours, theirs)]
    for our_gradient, their_gradient in zip(*found, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("additive", [False, True])
def test_a_pair_that_may_look_nowhere_gets_zeros_and_sends_nothing_back(additive: bool) -> None:
    call = left_padded_call(additive)
    options = {"attention_mask": call.attention_mask, "is_causal": call.is_causal, "scaling": 0.4, "dropout": 0.0}
    tensors, positions = (call.query, call.key, call.value), positions_of(call)
    ours = blockwise_attention(
        *tensors, positions, None, None, fold_bias=lambda query, key, positions: (query, key, None), **options
    )
    theirs = plain_attention(*tensors, None, **options)[0] * looks_somewhere(call)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    found = [torch.autograd.grad(output.sum(), tensors) for output in (ours, theirs)]
    for our_gradient, their_gradient in zip(*found, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_what_a_scheme_returned_stays_as_it_was(masked: bool) -> None:
    """It may be a parameter, or shared by layers."""
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    bias, ids = torch.randn(1, 2, 6, 6), torch.arange(6)
    before, mask = bias.clone(), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    blockwise_attention(
        query,
        key,
        value,
        Positions(ids, ids, ids[None], ids[None]),
        lambda query, key, positions: bias,
        None,
        attention_mask=mask if masked else None,
        is_causal=not masked,
        scaling=1.0,
        dropout=0.0,
    )
    assert torch.equal(bias, before)


def test_nothing_larger_than_a_block_of_scores_is_allocated() -> None:
    heads, length = 3, 1536
    leaves = [torch.randn(1, heads, length, 8, requires_grad=True) for _ in range(3)]
    with Largest() as largest:
        call = Call(*leaves, None, is_causal=True)
        blockwise_attention(
            *leaves,
            positions_of(call),
            score_bias,
            None,
            attention_mask=None,
            is_causal=True,
            scaling=0.4,
            dropout=0.0,
        ).sum().backward()
    assert largest.numbers <= heads * blockwise.QUERY_BLOCK * length


@pytest.mark.parametrize("trains", [False, True])
def test_a_bias_that_all_but_cancels_a_score_keeps_its_digits_beside_narrow_queries(trains: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (4 * torch.randn(1, 2, length, 16, generator=generator).bfloat16() for length in (3, 40, 40))
    wanted = torch.randn(1, 2, 3, 40, generator=generator, dtype=torch.float64)
    products = query.double() @ key.double().transpose(-1, -2)
    bias = (wanted - products).float().requires_grad_(trains)
    assert products.abs().max() > 100  # whose step in bfloat16 is 0.5
    ids = slots_from(0, 40, torch.device("cpu"))
    found = blockwise_attention(
        query,
        key,
        value,
        Positions(ids[:3], ids, ids[None, :3], ids[None]),
        lambda query, key, positions: bias,
        None,
        attention_mask=None,
        is_causal=False,
        scaling=1.0,
        dropout=0.0,
    )
    torch.testing.assert_close(found.double(), wanted.softmax(-1) @ value.double(), atol=0.02, rtol=2**-7)
