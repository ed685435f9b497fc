"""The strided forms of a relative bias, against the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pe_swap.attention import relative
from pe_swap.attention.relative import relative_bias_attention, sum_of_antidiagonals
from tests.support.calls import Call, calls, expected, left_padded_call, looks_somewhere
from tests.support.memory import Largest

fast = settings(max_examples=60, deadline=None, derandomize=True)


def attend(call: Call, bias: Tensor, scaling: float = 0.3) -> Tensor:
    return relative_bias_attention(
        call.query,
        call.key,
        call.value,
        bias,
        attention_mask=call.attention_mask,
        is_causal=call.is_causal,
        scaling=scaling,
        dropout=0.0,
    )


def in_blocks_of(size: int, patch: pytest.MonkeyPatch) -> None:
    for name in ("CAUSAL_BLOCK", "MASKED_BLOCK", "BACKWARD_BLOCK"):
        patch.setattr(relative, name, size)


def bias_for(call: Call, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(call.query.shape[1], call.q_len + call.kv_len - 1, generator=generator, dtype=torch.float64) * 2


@fast
@given(calls(), st.sampled_from((4, 16, 512)))
def test_every_call_equals_the_plain_form(call: Call, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        in_blocks_of(block, patch)
        bias = bias_for(call)
        torch.testing.assert_close(attend(call, bias), expected(call, bias, 0.3), atol=1e-12, rtol=1e-10)


@fast
@given(calls(), st.sampled_from((4, 16, 512)))
def test_gradients_of_every_input_equal_the_plain_forms(call: Call, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        in_blocks_of(block, patch)
        found = []
        for form in (attend, lambda call, bias: expected(call, bias, 0.3)):
            leaves = [tensor.clone().requires_grad_() for tensor in (call.query, call.key, call.value, bias_for(call))]
            output = form(Call(*leaves[:3], call.attention_mask, call.is_causal), leaves[3])
            weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
            found.append(torch.autograd.grad((output * weights).sum(), leaves))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("bias_trains", [True, False])
@pytest.mark.parametrize("block", [4, 512])
def test_a_query_that_may_look_nowhere_gets_zeros_and_sends_nothing_back(
    additive: bool, bias_trains: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks_of(block, monkeypatch)
    call = left_padded_call(additive)
    bias = bias_for(call).requires_grad_(bias_trains)
    leaves = [call.query, call.key, call.value, *([bias] if bias_trains else [])]
    ours, theirs = attend(call, bias), expected(call, bias, 0.3) * looks_somewhere(call)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    found = [torch.autograd.grad(output.sum(), leaves) for output in (ours, theirs)]
    for our_gradient, their_gradient in zip(*found, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, atol=1e-11, rtol=1e-9)


def test_a_second_derivative_is_refused() -> None:
    call = Call(*(torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3)), None, is_causal=True)
    bias = torch.randn(2, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(attend(call, bias).square().sum(), bias, create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("bias_trains", [True, False])
def test_gradcheck(is_causal: bool, bias_trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks_of(4, monkeypatch)
    query, key, value = (torch.randn(2, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 13, dtype=torch.float64, requires_grad=bias_trains)
    assert torch.autograd.gradcheck(
        lambda *inputs: attend(Call(*inputs[:3], None, is_causal), inputs[3]), (query, key, value, bias), nondet_tol=0.0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_trains", [True, False])
def test_narrow_types_are_as_near_to_float64_as_the_plain_form(dtype: torch.dtype, bias_trains: bool) -> None:
    torch.manual_seed(5)
    call = Call(*(torch.randn(2, 3, 70, 8, dtype=torch.float64) for _ in range(3)), None, is_causal=True)
    bias = bias_for(call)
    exact = expected(call, bias, 0.3)
    narrow = call.to(dtype)
    fast_form = attend(narrow, bias.float().requires_grad_(bias_trains))
    assert fast_form.dtype == dtype
    plain_form = expected(narrow, bias.float(), 0.3)
    assert (fast_form.double() - exact).norm() <= 1.5 * (plain_form.double() - exact).norm()


def test_dropout_keeps_the_mean_and_drops_whole_probabilities() -> None:
    torch.manual_seed(3)
    length = 64
    query = key = torch.zeros(1, 1, length, 4)
    value = torch.ones(1, 1, length, 4)
    call = Call(query, key, value, None, is_causal=False)
    outputs = torch.stack(
        [
            relative_bias_attention(
                call.query,
                call.key,
                call.value,
                torch.zeros(1, 127),
                attention_mask=None,
                is_causal=False,
                scaling=1.0,
                dropout=0.5,
            )
            for _ in range(50)
        ]
    )
    assert abs(float(outputs.mean()) - 1) < 0.02
    kept = (outputs * length / 2).round()
    torch.testing.assert_close(outputs * length / 2, kept, atol=1e-3, rtol=0)
    assert kept.std() > 2


@pytest.mark.parametrize("bias_trains", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_nothing_of_heads_by_length_by_length_is_allocated(bias_trains: bool, is_causal: bool) -> None:
    heads, length, head_dim = 3, 2048, 8
    leaves = [torch.randn(1, heads, length, head_dim, requires_grad=True) for _ in range(3)]
    bias = torch.zeros(heads, 2 * length - 1, requires_grad=bias_trains)
    with Largest() as largest:
        attend(Call(*leaves, None, is_causal), bias).sum().backward()
    if bias_trains:  # the backward pass holds one block of scores, and once shifted along its diagonals
        assert largest.numbers <= heads * relative.BACKWARD_BLOCK * (length + 2 * relative.BACKWARD_BLOCK)
    else:
        assert largest.numbers <= heads * length * max(head_dim, 8) * 3
    assert largest.numbers < heads * length * length


@given(st.integers(1, 7), st.integers(1, 9))
def test_sum_of_antidiagonals(rows: int, columns: int) -> None:
    matrix = torch.randn(2, rows, columns, dtype=torch.float64)
    found = sum_of_antidiagonals(F.pad(matrix, (0, rows)))
    assert found.shape == (2, rows + columns - 1)
    wanted = torch.zeros(2, rows + columns - 1, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            wanted[:, row + column] += matrix[:, row, column]
    torch.testing.assert_close(found, wanted)
