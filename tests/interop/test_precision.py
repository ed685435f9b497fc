"""bfloat16 and float16 models: positions, angles and biases lose no integers, near or far."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import pe_swap
from pe_swap.patching.install import holder_of, positional_parameters
from pe_swap.schemes import Scheme
from tests.support.covering import COVERING
from tests.support.models import CASES, build, disturb, token_ids, with_cache

NARROW = [torch.bfloat16, torch.float16]

EDGES = [0, 1, 255, 256, 257, 2047, 2048, 2049, 29_999, 30_000, 30_001, 65_537]
"""Positions around the last integers that bfloat16 (256) and float16 (2,048; 65,504) hold."""

FAR, NEAR = 30_000, 100

HEADS, HEAD_DIM, TRAINED = 12, 8, 128


def long_options(case: str) -> dict[str, Any]:
    """Return a case's options, with a table as long as the positions, and small where every key meets every row of a table."""
    name, options = CASES[case]
    return options | {"learned": {"max_length": FAR + 100_000}, "deberta": {"span": 16}}.get(name, {})


def reads_ids_alone(case: str) -> bool:
    """Tell whether a case reads position ids, no slots, and reaches as far as these tests go."""
    scheme = next(iter(holder_of(swapped(case))))
    return scheme.reads_position_ids and not scheme.counts_slots and (scheme.max_length is None or scheme.max_length > FAR)


def swapped(case: str) -> PreTrainedModel:
    """Return a model swapped to a case, its positional parameters moved as training might, by a tenth."""
    model = pe_swap.swap_positional(build("gpt2", n_positions=TRAINED), CASES[case][0], **long_options(case))
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in positional_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def in_both(case: str, dtype: torch.dtype) -> tuple[Scheme, Scheme]:
    """Return a scheme in a narrow dtype, and the same rounded numbers in float32."""
    scheme = holder_of(swapped(case)).scheme_at(0)
    narrow = copy.deepcopy(scheme).to(dtype)
    return narrow, copy.deepcopy(narrow).float()


def cases_with(hook: str) -> list[str]:
    """Return the cases whose scheme uses a hook, and has no end before the far positions."""
    found = []
    for case, (name, options) in CASES.items():
        scheme_class = pe_swap.schemes.SCHEMES[name]
        if hook in scheme_class.hooks_for(scheme_class.Options(**options)):
            found.append(case)
    return found


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", cases_with("encode"))
def test_vectors_are_float32_until_they_are_added(case: str, dtype: torch.dtype) -> None:
    narrow, wide = in_both(case, dtype)
    position_ids = torch.tensor([EDGES])
    found, expected = narrow.encode(position_ids), wide.encode(position_ids)
    assert torch.equal(found.to(dtype), expected.to(dtype))
    steps = expected.diff(dim=1).abs().amax(-1)[0]
    assert (steps > 0).all(), "two positions have one vector"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", cases_with("transform_query_key"))
def test_angles_are_float32_and_the_rotation_is_rounded_once(case: str, dtype: torch.dtype) -> None:
    narrow, wide = in_both(case, dtype)
    position_ids = torch.tensor([EDGES])
    x = torch.randn(1, HEADS, 1, HEAD_DIM).expand(1, HEADS, len(EDGES), HEAD_DIM).to(dtype)
    for role in ("query", "key"):
        found = narrow.transform_query_key(x, narrow.prepare_positions(position_ids), role=role, layer=0)
        assert found.dtype == dtype
        assert torch.equal(
            found, wide.transform_query_key(x.float(), wide.prepare_positions(position_ids), role=role, layer=0).to(dtype)
        )
        if case == "rope":
            assert (found.diff(dim=2).abs().amax(dim=(0, 1, 3)) > 0.01).all(), "two positions turn alike"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", cases_with("relative_bias"))
def test_biases_are_float32(case: str, dtype: torch.dtype) -> None:
    narrow, wide = in_both(case, dtype)
    distance = -torch.tensor(EDGES)
    found = narrow.relative_bias(distance, layer=0)
    assert found.dtype == torch.float32
    assert torch.equal(found, wide.relative_bias(distance, layer=0))
    if case.startswith("alibi"):
        assert (found.diff(dim=1) != 0).all(), "two distances have one bias"


# --- whole models --------------------------------------------------------------------------------------------------------------

QUERIES = 4


@torch.no_grad()
def random_cache(model: PreTrainedModel, length: int, dtype: torch.dtype) -> DynamicCache:
    """Return a cache of random keys and values, as if `length` tokens had been read."""
    generator, cache = torch.Generator().manual_seed(3), DynamicCache(config=model.config)
    positional = holder_of(model)
    for layer in range(2):
        keys, values = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
        if positional is not None and "extra_key_channels" in positional.scheme_at(0).hooks:
            states = torch.randn(1, length, HEADS * HEAD_DIM, generator=generator).to(dtype)
            keys = torch.cat((keys, positional.scheme_at(0).extra_key_channels(states, layer=layer)), dim=-1)
        cache.update(keys, values, layer)
    return cache


def logits_at(model: PreTrainedModel, start: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Return the logits of a few tokens at position `start` and on, with every position before them in the cache."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(backend)
    position_ids = torch.arange(start, start + QUERIES)[None]
    with torch.no_grad():
        output = model(token_ids(1, QUERIES), **with_cache(model, random_cache(model, start, dtype)), position_ids=position_ids)
    return output.logits.float()


def error_at(model: PreTrainedModel, start: int, backend: str) -> dict[torch.dtype, float]:
    """Return how far narrow logits are from float32 ones, relative to their norm."""
    wide = logits_at(model, start, torch.float32, backend)
    return {dtype: float((logits_at(model, start, dtype, backend) - wide).norm() / wide.norm()) for dtype in NARROW}


@functools.cache
def unswapped_error(backend: str) -> dict[torch.dtype, float]:
    """Return the error of an unswapped model at position 100."""
    return error_at(build("gpt2", n_positions=TRAINED), NEAR, backend)


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (case, backend)
        for backend, cases in (("sdpa", CASES), ("eager", COVERING))
        for case in cases
        if CASES[case][1].get("table") != "learned"
    ],
)
def test_a_narrow_model_at_position_30000_is_as_close_as_an_unswapped_one_at_100(case: str, backend: str) -> None:
    """Half as much again is allowed: the two are other functions of other tokens, and their roundings other draws."""
    found = error_at(swapped(case), FAR, backend)
    assert found == {dtype: pytest.approx(0, abs=1.5 * error) for dtype, error in unswapped_error(backend).items()}


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if reads_ids_alone(case)],
)
def test_position_ids_in_the_call_count_and_not_the_slots(case: str) -> None:
    """The same at position ids that no cache stands behind."""
    model, ids = swapped(case), token_ids(1, 12)
    plain = build("gpt2", n_positions=TRAINED)
    mask = torch.ones_like(ids)

    def error(subject: PreTrainedModel, start: int) -> float:
        position_ids = torch.arange(start, start + 12)[None]
        with torch.no_grad():
            wide = subject(ids, attention_mask=mask, position_ids=position_ids).logits
            narrow = copy.deepcopy(subject).bfloat16()(ids, attention_mask=mask, position_ids=position_ids).logits.float()
        return float((narrow - wide).norm() / wide.norm())

    assert error(model, FAR) < 1.5 * error(plain, NEAR)


MIXED = ["rope", "alibi-trained", "cope", "fire", "fox", "rerope", "shaw-all", "transformer-xl", "xpos"]


@pytest.mark.parametrize(
    ("case", "backend"), [*((case, "sdpa") for case in MIXED), *((case, "eager") for case in MIXED if case in COVERING)]
)
def test_mixed_precision_is_as_close_as_a_narrow_model(case: str, backend: str) -> None:
    """Autocast would run a scheme's own matrix products in bfloat16: cope's counts were off by positions."""
    name, options = CASES[case]
    model = pe_swap.swap_positional(build("gpt2", backend, n_positions=TRAINED), name, **options)
    disturb(model)
    ids = token_ids(1, 600)
    with torch.no_grad():
        wide = model(ids, use_cache=False).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(ids, use_cache=False).logits.float()
        narrow = copy.deepcopy(model).bfloat16()(ids, use_cache=False).logits.float()
    assert (mixed - wide).norm() < 1.5 * (narrow - wide).norm()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["alibi", "shaw-all"])
def test_a_rotary_model_trains_in_mixed_precision(case: str, backend: str) -> None:
    """The family's own rotation leaves queries and keys in float32, beside values in the dtype of autocast."""
    name, options = CASES[case]
    model, ids = pe_swap.swap_positional(build("llama", backend), name, **options), token_ids(2, 20)
    disturb(model)
    with torch.no_grad():
        wide = model(ids, use_cache=False).logits
        narrow = copy.deepcopy(model).bfloat16()(ids, use_cache=False).logits.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids, labels=ids, use_cache=False)
    mixed.loss.backward()
    assert (mixed.logits.float() - wide).norm() < 1.5 * (narrow - wide).norm()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_stack_that_is_not_swapped_keeps_its_numbers_in_mixed_precision(backend: str) -> None:
    """A T5's own bias is float32 beside queries in bfloat16, which PyTorch's kernels for GPUs take from autocast alone."""
    model, ids = build("t5", backend), token_ids(2, 20)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = model.get_encoder()(ids).last_hidden_state
        pe_swap.swap_positional(model, "alibi", part="decoder")
        assert torch.equal(model.get_encoder()(ids).last_hidden_state, before)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(("scheme", "options"), [("xpos", {"scale_base": 20, "gamma": 0.1}), ("fox", {"initial_reach": 1.001})])
def test_no_future_key_outweighs_the_mask(scheme: str, options: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    """What these schemes add to a key that may not be looked at is larger than the lowest number of float16."""
    model = pe_swap.swap_positional(build("gpt2", backend), scheme, **options)
    if scheme == "fox":
        with torch.no_grad():
            for bias in holder_of(model).schemes[0].gate_biases.values():
                bias.fill_(-400.0)
    model.to(dtype)
    ids = token_ids(1, 300)
    other = torch.cat((ids[:, :150], ids[:, 150:].flip(1)), dim=1)
    with torch.no_grad():
        first, second = model(ids).logits, model(other).logits
    assert not torch.equal(first, second)
    assert torch.equal(first[:, :150], second[:, :150])
