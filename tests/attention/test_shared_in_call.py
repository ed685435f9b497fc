"""What layers share in one forward pass: worked out once, never kept, never wrong."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import pe_swap
from pe_swap.attention import backends
from pe_swap.attention.relative import relative_bias_attention
from pe_swap.attention.shared_in_call import ARGUMENT, SharedInCall
from pe_swap.patching.install import holder_of
from tests.support.models import CASES, disturb, swapped, token_ids, with_cache

HOOK = {"rope": "prepare_positions", "alibi": "relative_bias", "t5": "relative_bias", "kerple-power": "relative_bias"}
SHARED = ["rope", "alibi", "t5"]


def count_calls(model: PreTrainedModel, case: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    calls: Counter[str] = Counter()
    scheme, hook = holder_of(model).scheme_at(0), HOOK[case]
    function = getattr(scheme, hook)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[hook] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(scheme, hook, counted)
    return calls


@pytest.mark.parametrize(("case", "times"), [*((case, 1) for case in SHARED), ("kerple-power", 2)])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_once_a_forward_pass_where_layers_are_alike(case: str, times: int, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = swapped(family, case), token_ids(2, 12)
    calls = count_calls(model, case, monkeypatch)
    with torch.no_grad():
        model(ids)
    assert calls.total() == times
    with torch.no_grad():
        model(ids)
    assert calls.total() == 2 * times


@pytest.mark.parametrize("case", SHARED)
def test_once_a_layer_with_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped("gpt2", case)
    calls = count_calls(model, case, monkeypatch)
    model(token_ids(2, 12), use_cache=False)
    assert calls.total() == 2


@pytest.mark.parametrize(("case", "method"), [("transformer-xl", "distance_vectors"), ("deberta", "rows")])
def test_a_decoded_token_has_its_distances_worked_out_once(case: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = swapped("gpt2", case), token_ids(2, 9)
    cache = DynamicCache(config=model.config)
    calls: Counter[str] = Counter()
    scheme = holder_of(model).scheme_at(0)
    function = getattr(scheme, method)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[method] += 1
        return function(*args, **kwargs)

    with torch.no_grad():
        model(ids[:, :8], **with_cache(model, cache))
        monkeypatch.setattr(scheme, method, counted)
        model(ids[:, 8:], **with_cache(model, cache))
    assert calls.total() == 1


@pytest.mark.parametrize("case", ["transformer-xl", "deberta"])
def test_two_schemes_of_one_name_share_nothing(case: str) -> None:
    model, ids = swapped("gpt2", case), token_ids(2, 9)
    name, options = CASES[case]
    pe_swap.swap_positional(model, name, layers=[1], **{**options, "max_distance": 270 if name == "deberta" else 3})
    disturb(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, **with_cache(model, cache)).logits for part in ids.split((7, 1, 1), dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("case", ["alibi", "t5", "kerple", "sandwich"])
def test_the_kernel_reads_a_bias_whose_distances_lie_side_by_side(
    case: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, strides = swapped(family, case), []

    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **kwargs: Any) -> Tensor:
        strides.append(bias.stride(-1))
        return relative_bias_attention(query, key, value, bias, **kwargs)

    monkeypatch.setattr(backends, "relative_bias_attention", attention)
    model(token_ids(2, 12))
    assert strides == [1, 1]


@pytest.mark.parametrize("case", ["rope", "alibi", "fire", "xpos"])
def test_what_is_shared_is_what_each_layer_would_have_worked_out(case: str) -> None:
    model, ids = swapped("gpt2", case), token_ids(2, 12)
    alone = model(ids, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, alone, atol=1e-5, rtol=1e-4)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, **with_cache(model, cache)).logits for part in ids.split((7, 1, 4), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), alone, atol=1e-5, rtol=1e-4)


def test_position_ids_changed_in_place_are_read_again() -> None:
    model, ids = swapped("gpt2", "rope"), token_ids(1, 8)
    position_ids = torch.arange(8)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        first = model(ids, attention_mask=mask, position_ids=position_ids).logits
        position_ids.mul_(3)
        second = model(ids, attention_mask=mask, position_ids=position_ids).logits
        assert torch.equal(second, model(ids, attention_mask=mask, position_ids=torch.arange(8)[None] * 3).logits)
    assert not torch.allclose(first, second, atol=1e-3)


def test_threads_do_not_meet() -> None:
    model = swapped("gpt2", "rope")
    inputs = [(token_ids(1, 9 + index, seed=index), torch.arange(9 + index)[None] + index) for index in range(8)]

    def run(given: tuple[Tensor, Tensor]) -> Tensor:
        ids, position_ids = given
        with torch.no_grad():
            return model(ids, attention_mask=torch.ones_like(ids), position_ids=position_ids).logits

    alone = [run(given) for given in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, inputs * 5))
    assert all(torch.equal(found, alone[index % 8]) for index, found in enumerate(together))


def test_nothing_stays_on_the_model() -> None:
    model, ids = swapped("gpt2", "rope"), token_ids(1, 12)
    size = len(pickle.dumps(holder_of(model)))
    with torch.no_grad():
        model(ids)
    assert len(pickle.dumps(holder_of(model))) == size
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_inputs_are_kept_alive() -> None:
    shared = SharedInCall()
    with torch.no_grad():
        for value in range(50):  # each is freed before the next is made, unless it is kept
            assert shared.get("double", (one := torch.tensor(value),), lambda: int(one) * 2) == 2 * value


def test_the_argument_reaches_no_attention_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's hook takes it out: what a backend is not told of, it cannot trip over."""
    model = swapped("gpt2", "rope")
    seen: list[set[str]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(set(kwargs))

    for block in model.transformer.h:
        block.attn.register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        model(token_ids(1, 5))
    assert len(seen) == 2
    assert all("attention_call" in keywords and ARGUMENT not in keywords for keywords in seen)
