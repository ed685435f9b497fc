"""What is kept beside a cache: worked out once, never stale, never a reason for a cache not to be copied."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import pe_swap
from pe_swap.attention import kept_with_cache
from pe_swap.attention.kept_with_cache import Kept
from pe_swap.patching import devices
from pe_swap.patching.install import holder_of, positional_parameters
from tests.support.models import ROUNDING, swapped, token_ids, with_cache

CASES = ["transformer-xl", "deberta", "deberta-log", "deberta-clip", "t5"]


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
    found, weight = Kept(), nn.Parameter(torch.zeros(3))
    work_out, calls = counting("found")

    def times(*of: object) -> int:
        assert found.keep("key", of, work_out) == "found"
        return len(calls)

    assert [times(weight, 7), times(weight, 7), times(weight.clone(), 7)] == [1, 1, 1]
    weight.data.add_(1)
    assert [times(weight, 7), times(weight, 7)] == [2, 2]
    assert [times(weight, 8), times(weight, "8"), times(weight, weight), times(8, 8)] == [3, 4, 5, 6]
    assert [times(weight), times(weight.double()), times(weight[:2]), times(weight)] == [7, 8, 9, 10]  # the newest alone is kept
    assert [times(weight, weight), times(weight)] == [11, 12]
    found.keep("other", (weight,), work_out)
    assert times(weight) == 13
    assert [times(weight.to("meta")), times(weight.to("meta")), times(weight[:2].to("meta"))] == [14, 14, 15]


def test_nothing_is_kept_with_gradients() -> None:
    found, weight = Kept(), nn.Parameter(torch.zeros(3))
    work_out, calls = counting()
    for _ in range(2):
        found.keep("key", (weight,), work_out)
    assert len(calls) == 2


@pytest.mark.parametrize("case", ["deberta", "transformer-xl", "alibi"])
def test_copies_and_files_of_a_cache_are_a_plain_cache_s(case: str) -> None:
    model, ids, cache = swapped("gpt2", case), token_ids(2, 10), DynamicCache()
    attributes = set(vars(cache))
    step(model, cache, ids[:, :7])
    assert set(vars(cache)) == attributes
    for used in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
        torch.testing.assert_close(step(model, used, ids[:, 7:8])[:, -1], uncached(model, ids[:, :8])[:, -1], **ROUNDING)


def test_what_is_kept_goes_with_the_cache() -> None:
    model, ids = swapped("gpt2", "deberta"), token_ids(2, 10)
    caches = [DynamicCache(), DynamicCache()]
    gc.collect()
    before = len(kept_with_cache._KEPT)
    for cache in caches:
        step(model, cache, ids)
    assert len(kept_with_cache._KEPT) == before + 2
    del cache
    caches.pop()
    gc.collect()
    assert len(kept_with_cache._KEPT) == before + 1


@pytest.mark.parametrize("case", ["deberta", "deberta-log"])
def test_every_way_to_change_a_weight_acts_on_the_next_token(case: str) -> None:
    """A fused optimizer and `.data` do not move PyTorch's count of writes; swapped tensors may have no weak reference to them."""
    model, ids, cache = swapped("gpt2", case, n_layer=1), token_ids(2, 8), DynamicCache()
    parameters = [parameter for _, parameter in positional_parameters(model)]

    def optimizer() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.optim.AdamW(parameters, lr=0.3, fused=True).step()

    def vector() -> None:
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters).detach() * 1.5, parameters)

    def data() -> None:
        for parameter in parameters:
            parameter.data.mul_(-1.5)

    def swapped_tensors() -> None:
        for parameter in parameters:
            torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 0.5))

    step(model, cache, ids[:, :7])
    before = step(model, cache, ids[:, 7:])[:, -1]
    for change in (optimizer, vector, data, swapped_tensors):
        cache.crop(-1)
        change()
        after = uncached(model, ids)[:, -1]
        assert (after - before).abs().max() > 1e-2
        torch.testing.assert_close(step(model, cache, ids[:, 7:])[:, -1], after, **ROUNDING)
        before = after


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["gpt2", "bert-decoder"])
def test_weights_written_to_between_two_calls_act_on_the_second(case: str, family: str, tokens: int) -> None:
    """In a model of one layer, whose cached keys and values are the embeddings' and nothing else's."""
    model, ids, cache = swapped(family, case, num_hidden_layers=1), token_ids(2, 7 + tokens), DynamicCache()
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


def test_a_cache_that_goes_on_under_another_scheme_keeps_nothing_of_the_last_one() -> None:
    """Neither `alibi` nor `sandwich` has weights by which they could be told apart."""
    model, ids, cache = swapped("gpt2", "alibi"), token_ids(1, 9), DynamicCache()
    for part in ids[:, :8].split((6, 1, 1), dim=1):
        step(model, cache, part)
    swapped_on = pe_swap.swap_positional(model, "sandwich")
    without_kept = copy.deepcopy(cache)
    assert torch.equal(step(swapped_on, cache, ids[:, 8:]), step(swapped_on, without_kept, ids[:, 8:]))


@pytest.mark.parametrize("case", ["t5", "kerple"])
def test_weights_of_a_layer_on_another_device_are_compared_too(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a layer has a stand-in of its scheme, whose weights are no parameters."""
    monkeypatch.setattr("pe_swap.patching.hooks.on_device", devices._stand_in)
    monkeypatch.setattr(nn.Parameter, "to", lambda weight, *_: weight.clone(), raising=False)  # as to another device
    model, ids, cache = swapped("gpt2", case, num_hidden_layers=1), token_ids(1, 9), DynamicCache()
    for part in ids[:, :8].split((6, 1, 1), dim=1):
        step(model, cache, part)
    for _, parameter in positional_parameters(model):
        parameter.data.add_(torch.randn_like(parameter))
    torch.testing.assert_close(step(model, cache, ids[:, 8:])[:, -1], uncached(model, ids)[:, -1], **ROUNDING)


@pytest.mark.parametrize("case", CASES)
def test_an_emptied_cache_starts_with_nothing_kept(case: str) -> None:
    model, ids, cache = swapped("gpt2", case), token_ids(2, 10), DynamicCache()
    step(model, cache, ids[:, :8]), step(model, cache, ids[:, 8:])
    first = kept_with_cache._KEPT[cache]
    cache.crop(-10)
    step(model, cache, ids[:, :8])
    assert kept_with_cache._KEPT[cache] is not first
    torch.testing.assert_close(step(model, cache, ids[:, 8:])[:, -1], uncached(model, ids)[:, -1], **ROUNDING)


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_the_weights_from_a_token_with_a_cache(case: str) -> None:
    model, ids, cache = swapped("gpt2", case), token_ids(2, 10), DynamicCache()
    step(model, cache, ids[:, :8]), step(model, cache, ids[:, 8:9])
    model(ids[:, 9:], **with_cache(model, cache)).logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in holder_of(model).parameters())


def test_a_table_of_distances_grows_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe_swap.schemes.transformer_xl.KEPT_ROWS", 4)
    model, ids, cache = swapped("gpt2", "transformer-xl"), token_ids(1, 14), DynamicCache()
    scheme = holder_of(model).scheme_at(0)
    rows, vectors = [], scheme.distance_vectors
    monkeypatch.setattr(scheme, "distance_vectors", lambda distance: rows.append(len(distance)) or vectors(distance))
    parts = [step(model, cache, part) for part in ids.split((3, *[1] * 11), dim=1)]
    assert rows == [3, 4, 8, 12, 16]
    torch.testing.assert_close(torch.cat(parts, dim=1), uncached(model, ids), **ROUNDING)


def test_biases_of_decoded_tokens_are_computed_for_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe_swap.attention.call.RESERVED_DISTANCES", 4)
    model, ids, cache = swapped("gpt2", "t5"), token_ids(1, 14), DynamicCache()
    scheme = holder_of(model).scheme_at(0)
    distances, bias = [], scheme.relative_bias
    monkeypatch.setattr(scheme, "relative_bias", lambda of, *, layer: distances.append(len(of)) or bias(of, layer=layer))
    parts = [step(model, cache, part) for part in ids.split((3, *[1] * 11), dim=1)]
    assert distances == [5, 4, 8, 12, 16]  # of 3 queries and 3 keys, then of 4 keys, 5 to 8, 9 to 12 and 13 to 14
    torch.testing.assert_close(torch.cat(parts, dim=1), uncached(model, ids), **ROUNDING)
