"""Minus infinity in a relative bias, and a scheme that says how far back it looks: all forms agree, and keys out of reach are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pe_swap.attention import blockwise, fused, relative
from pe_swap.attention.blockwise import blockwise_attention
from pe_swap.attention.plain import plain_attention
from pe_swap.attention.relative import relative_bias_attention
from tests.attention.direct_calls import Sizes, Window, build, direct_call

HEADS, LIMIT = 3, Window.limit
EXACT = {"atol": 1e-11, "rtol": 1e-9}


def leaves(q_len: int, kv_len: int, key_heads: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, HEADS, q_len, 6), (2, key_heads, kv_len, 6), (2, key_heads, kv_len, 6))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def bias_of(q_len: int, kv_len: int) -> Tensor:
    """Return a bias of the distance, `[heads, q_len + kv_len - 1]`, minus infinity beyond the window; a leaf."""
    generator = torch.Generator().manual_seed(1)
    distance = torch.arange(1 - q_len, kv_len) - (kv_len - q_len)
    bias = torch.randn(HEADS, len(distance), generator=generator, dtype=torch.float64)
    return bias.masked_fill(distance < -LIMIT, -torch.inf).requires_grad_()


def reach_from(first_query: int) -> Callable[[int], int]:
    return lambda query: max(0, first_query + query - LIMIT)


def plain(inputs: list[Tensor], bias: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = inputs
    groups = query.shape[1] // key.shape[1]
    q_len, kv_len = query.shape[2], key.shape[2]
    pairs = torch.arange(kv_len)[None, :] - torch.arange(q_len)[:, None] + q_len - 1
    output, _ = plain_attention(
        query,
        key.repeat_interleave(groups, 1),
        value.repeat_interleave(groups, 1),
        bias[:, pairs][None],
        attention_mask=mask,
        is_causal=mask is None,
        scaling=0.4,
        dropout=0.0,
    )
    return output


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAUSAL_BLOCK", "MASKED_BLOCK", "BACKWARD_BLOCK"):
        monkeypatch.setattr(relative, name, 4)
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 4)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("bias_trains", [False, True])
@pytest.mark.parametrize("key_heads", [HEADS, 1])
@pytest.mark.parametrize(("q_len", "kv_len"), [(23, 23), (9, 30), (1, 30)])
def test_the_strided_form_and_its_gradients(
    skips: bool, bias_trains: bool, key_heads: int, q_len: int, kv_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    first = kv_len - q_len
    mask = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool).tril(first) if first else None
    found = []
    for form in ("ours", "plain"):
        inputs, bias = leaves(q_len, kv_len, key_heads), bias_of(q_len, kv_len)
        if form == "ours":
            output = relative_bias_attention(
                *inputs,
                bias if bias_trains else bias.detach(),
                attention_mask=mask,
                is_causal=mask is None,
                scaling=0.4,
                dropout=0.0,
                first_visible=reach_from(first) if skips else None,
            )
        else:
            output = plain(inputs, bias, mask)
        wanted = [*inputs, bias] if bias_trains else inputs
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
        found.append([output, *torch.autograd.grad((output * weights).sum(), wanted)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_blockwise_form_and_its_gradients(softcap: float | None, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    call = direct_call(build(Window), Sizes(q_len=23, kv_len=23), masked=masked, trains=True)
    inputs = [call.query, call.key, call.value]
    positions = call.context.positions(23, torch.device("cpu"))

    def bias(positions: Any) -> Tensor:
        distance = positions.distance
        return call.scheme.relative_bias(distance.reshape(-1), layer=0).reshape(1, -1, *distance.shape)

    settings = {"attention_mask": call.mask, "is_causal": not masked, "scaling": 0.4, "dropout": 0.0, "softcap": softcap}
    ours = blockwise_attention(*inputs, positions, None, None, relative_bias=bias, first_visible=reach_from(0), **settings)
    theirs, _ = plain_attention(*inputs, None, relative_bias=bias(positions), **settings)
    torch.testing.assert_close(ours, theirs, **EXACT)
    found = [torch.autograd.grad(output.square().sum(), inputs) for output in (ours, theirs)]
    for our_gradient, their_gradient in zip(*found, strict=True):
        assert our_gradient.isfinite().all()
        torch.testing.assert_close(our_gradient, their_gradient, **EXACT)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # PyTorch's own import
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_every_backend(backend: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    call = direct_call(build(Window), Sizes(key_heads=2, q_len=23, kv_len=23))
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        found, wanted = call.run(backend, softcap=softcap), call.run("eager", softcap=softcap)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)  # the bias is float32


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_keys_out_of_reach_are_skipped_and_no_others(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    seen: list[int] = []
    for module, name in ((fused.F, "scaled_dot_product_attention"), (blockwise, "plain_attention")):
        original = getattr(module, name)

        def spy(query: Tensor, key: Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(key.shape[2])
            return original(query, key, *args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    call = direct_call(build(Window), Sizes(q_len=40, kv_len=40))
    with torch.no_grad():
        call.run("sdpa", softcap=softcap)
    assert sorted(seen) == [4, 8, *[4 + LIMIT] * 8]
    seen.clear()
    decoded = direct_call(build(Window), Sizes(q_len=1, kv_len=40, first_key_slot=7))
    with torch.no_grad():
        found = decoded.run("sdpa", softcap=softcap)
    assert seen == [LIMIT + 1]
    torch.testing.assert_close(found, decoded.run("eager", softcap=softcap), atol=1e-6, rtol=1e-5)
