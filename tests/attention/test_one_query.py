"""The short way of a decoded token: taken where nothing but a bias of all layers is added, and the same numbers as by the long one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from pe_swap.attention import backends
from pe_swap.patching.install import holder_of
from tests.support.models import left_padded, swapped_tiny, token_ids, with_cache

LENGTH = 9


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every call of an attention function with such a bias, whether the short way had an answer."""
    found: list[bool] = []
    short = backends.one_query_attention

    def noted(*args: Any, **kwargs: Any) -> Tensor | None:
        output = short(*args, **kwargs)
        found.append(output is not None)
        return output

    monkeypatch.setattr(backends, "one_query_attention", noted)
    return found


def decoded(model: PreTrainedModel, ids: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
    """Return the logits of every token, given one at a time."""
    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
    found = []
    with torch.no_grad():
        for column in range(ids.shape[1]):
            mask = {name: mask[:, : column + 1] for name, mask in kwargs.items()}
            found.append(model(ids[:, column : column + 1], **with_cache(model, cache), **mask).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("case", ["alibi", "t5", "sandwich"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_same_numbers_by_either_way(case: str, family: str, taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = swapped_tiny(family, case).eval(), token_ids(2, LENGTH)
    short = decoded(model, ids)
    assert taken == [True] * LENGTH * model.config.num_hidden_layers
    monkeypatch.setattr(backends, "one_query_attention", lambda *args, **kwargs: None)
    assert torch.equal(decoded(model, ids), short)


@pytest.mark.parametrize("case", ["kerple-power", "rope", "fox", "shaw", "none-norm", "cope"])
def test_not_where_layers_differ_or_more_is_done(case: str, taken: list[bool]) -> None:
    decoded(swapped_tiny("llama", case).eval(), token_ids(1, 3))
    assert not taken


def test_not_beside_padding_a_cap_or_sinks(taken: list[bool]) -> None:
    ids, mask = left_padded([token_ids(1, LENGTH), token_ids(1, LENGTH - 3)])
    model = swapped_tiny("llama", "alibi").eval()
    assert decoded(model, ids, attention_mask=mask).isfinite().all()
    assert taken.count(False) == LENGTH * model.config.num_hidden_layers
    for family in ("gemma2", "gpt_oss"):
        taken.clear()
        model = swapped_tiny(family, "alibi").eval()
        decoded(model, token_ids(1, 3))
        assert not any(taken)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "position_bias", "of_a_later_version"])
def test_not_with_a_keyword_that_may_change_scores(keyword: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, Any]] = []
    short = backends.one_query_attention

    def noted(*args: Any, **kwargs: Any) -> Tensor | None:
        calls.append((args, kwargs))
        return short(*args, **kwargs)

    monkeypatch.setattr(backends, "one_query_attention", noted)
    decoded(swapped_tiny("llama", "alibi").eval(), token_ids(1, 3))
    args, kwargs = calls[-1]
    assert short(*args, **kwargs) is not None
    assert short(*args, **kwargs, **{keyword: torch.ones(1)}) is None


@pytest.mark.parametrize("case", ["alibi", "sandwich"])
def test_a_bias_is_never_computed_under_autocast(case: str, taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped_tiny("llama", case).eval()
    scheme, autocast = holder_of(model).scheme_at(0), []
    own = scheme.relative_bias

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return own(*args, **kwargs)

    monkeypatch.setattr(scheme, "relative_bias", noted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded(model, token_ids(1, 3))
    assert autocast
    assert not any(autocast)
    assert not taken


def test_not_with_a_static_cache_or_gradients(taken: list[bool]) -> None:
    model, ids = swapped_tiny("llama", "t5").eval(), token_ids(1, 3)
    decoded(model, ids, StaticCache(config=model.config, max_cache_len=LENGTH))
    cache = DynamicCache(config=model.config)
    for column in range(3):
        model(ids[:, column : column + 1], **with_cache(model, cache))
    assert not taken
