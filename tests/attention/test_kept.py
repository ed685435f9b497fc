"""What is kept beside a cache: worked out once, never stale, never a reason for a cache not to be copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pe_swap.attention.kept import ATTRIBUTE, Kept
from pe_swap.swap import positional_of, positional_parameters
from tests.models import swapped, token_ids, with_cache

CASES = ["transformer-xl", "deberta", "deberta-log", "deberta-clip"]
ROUNDING = {"atol": 2e-5, "rtol": 1e-4}


def counting(value: object = None) -> tuple[Callable[[], object], list[object]]:
    """Return a function that gives `value` and the list of its calls."""
    calls: list[object] = []

    def work_out() -> object:
        calls.append(value)
        return value

    return work_out, calls


@torch.no_grad()
def step(model: PreTrainedModel, cache: DynamicCache, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, **with_cache(model, cache)).logits
    return logits


@torch.no_grad()
def uncached(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


@torch.no_grad()
def test_a_result_is_worked_out_once_for_each_state_of_what_it_is_of() -> None:
    kept, weight = Kept(), nn.Parameter(torch.zeros(3))
    work_out, calls = counting("found")
    for _ in range(3):
        assert kept.keep("key", (weight, 7), work_out) == "found"
    assert len(calls) == 1
    weight.add_(1)
    kept.keep("key", (weight, 7), work_out)
    assert len(calls) == 2
    kept.keep("key", (weight, 8), work_out)
    assert len(calls) == 3
    other = nn.Parameter(weight.clone()).add_(0)
    assert other._version == weight._version
    kept.keep("key", (other, 8), work_out)
    assert len(calls) == 4
    kept.keep("key", (weight, 8), work_out)  # the newest alone is kept
    assert len(calls) == 5
    kept.keep("other", (weight, 8), work_out)
    kept.keep("key", (weight, 8), work_out)
    assert len(calls) == 6


def test_nothing_is_kept_with_gradients_or_of_weights_that_count_no_writes() -> None:
    kept, weight = Kept(), nn.Parameter(torch.zeros(3))
    work_out, calls = counting()
    for _ in range(2):
        kept.keep("key", (weight,), work_out)
    assert len(calls) == 2
    with torch.inference_mode():
        uncounted = torch.zeros(3)
        for _ in range(2):
            kept.keep("key", (uncounted,), work_out)
    assert len(calls) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache_goes_on_and_starts_with_nothing_kept(copied: Callable[[Any], Any]) -> None:
    model, ids, cache = swapped("gpt2", "deberta"), token_ids(2, 10), DynamicCache()
    step(model, cache, ids[:, :7])
    other = copied(cache)
    assert vars(cache)[ATTRIBUTE]._found
    assert not vars(other)[ATTRIBUTE]._found
    for used in (cache, other):
        torch.testing.assert_close(step(model, used, ids[:, 7:8])[:, -1], uncached(model, ids[:, :8])[:, -1], **ROUNDING)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["gpt2", "bert-decoder"])
def test_weights_written_to_between_two_calls_act_on_the_second(case: str, family: str, tokens: int) -> None:
    """In a model of one layer, whose cached keys and values are the embeddings' and nothing else's."""
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model, ids, cache = swapped(family, case, **{layers: 1}), token_ids(2, 7 + tokens), DynamicCache()
    step(model, cache, ids[:, :7])
    before = uncached(model, ids)[:, -1]
    torch.testing.assert_close(step(model, cache, ids[:, 7:])[:, -1], before, **ROUNDING)
    for _, parameter in positional_parameters(model):
        cache.crop(-tokens)
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
        after = uncached(model, ids)[:, -1]
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(step(model, cache, ids[:, 7:])[:, -1], after, **ROUNDING)
        before = after


@pytest.mark.parametrize("case", CASES)
def test_an_emptied_cache_starts_with_nothing_kept(case: str) -> None:
    model, ids, cache = swapped("gpt2", case), token_ids(2, 10), DynamicCache()
    step(model, cache, ids[:, :8]), step(model, cache, ids[:, 8:])
    for parameter in positional_of(model).parameters():
        parameter.data.mul_(1.5)  # behind PyTorch's count of writes
    cache.crop(-10)
    step(model, cache, ids[:, :8])
    torch.testing.assert_close(step(model, cache, ids[:, 8:])[:, -1], uncached(model, ids)[:, -1], **ROUNDING)


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_the_weights_from_a_token_with_a_cache(case: str) -> None:
    model, ids, cache = swapped("gpt2", case), token_ids(2, 10), DynamicCache()
    step(model, cache, ids[:, :8]), step(model, cache, ids[:, 8:9])
    model(ids[:, 9:], **with_cache(model, cache)).logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in positional_of(model).parameters())


def test_a_table_of_distances_grows_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe_swap.schemes.transformer_xl.KEPT_ROWS", 4)
    model, ids, cache = swapped("gpt2", "transformer-xl"), token_ids(1, 14), DynamicCache()
    scheme = positional_of(model).scheme_at(0)
    rows, vectors = [], scheme.distance_vectors
    monkeypatch.setattr(scheme, "distance_vectors", lambda distance: rows.append(len(distance)) or vectors(distance))
    parts = [step(model, cache, part) for part in ids.split((3, *[1] * 11), dim=1)]
    assert rows == [3, 4, 8, 12, 16]
    torch.testing.assert_close(torch.cat(parts, dim=1), uncached(model, ids), **ROUNDING)
