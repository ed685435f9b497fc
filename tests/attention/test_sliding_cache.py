"""Caches that have dropped keys: the first key of a call is not at position 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from pe_swap.errors import UnsupportedBackendError
from tests.support.models import CASES, LENGTH_DEPENDENT, build, swapped, token_ids, with_cache

WINDOW = 8
ROUNDING = {"atol": 5e-5, "rtol": 1e-4}
every_case = pytest.mark.parametrize("case", [case for case in CASES if case not in LENGTH_DEPENDENT])


def band(query_slots: Tensor, key_slots: Tensor) -> Tensor:
    """Return the mask of the window; GPT-2 itself makes none, as its cache alone slides."""
    distance = key_slots[None, :] - query_slots[:, None]
    return ((distance <= 0) & (distance > -WINDOW))[None, None]


def in_one_pass(model: PreTrainedModel, ids: Tensor) -> Tensor:
    slots = torch.arange(ids.shape[1])
    logits: Tensor = model(ids, attention_mask=band(slots, slots), position_ids=slots[None], use_cache=False).logits
    return logits


def in_chunks(model: PreTrainedModel, ids: Tensor, cache: Any, chunks: tuple[int, ...]) -> Tensor:
    parts, start = [], 0
    for part in ids.split(chunks, dim=1):
        num_keys, first_key = cache.get_mask_sizes(part.shape[1], 0)
        slots = torch.arange(start, start + part.shape[1])
        mask = band(slots, torch.arange(first_key, first_key + num_keys))
        parts.append(model(part, attention_mask=mask, position_ids=slots[None], **with_cache(model, cache)).logits)
        start += part.shape[1]
    return torch.cat(parts, dim=1)


def cache_of(model: PreTrainedModel, kind: str) -> Any:
    return StaticCache(config=model.config, max_cache_len=40) if kind == "static" else DynamicCache(config=model.config)


@every_case
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [(5, 1, 1, 1, 1, 1, 7, 1, 4), (13, 1, 1, 3, 1, 3)], ids=["short", "long"])
@torch.no_grad()
def test_chunks_through_a_window_equal_one_pass(case: str, kind: str, chunks: tuple[int, ...]) -> None:
    model, ids = swapped("gpt2", case, sliding_window=WINDOW), token_ids(2, 22)
    cache = cache_of(model, kind)
    found = in_chunks(model, ids, cache, chunks)
    assert cache.layers[0].is_sliding
    assert cache.layers[0].keys.shape[2] <= WINDOW
    torch.testing.assert_close(found, in_one_pass(model, ids), **ROUNDING)


@pytest.mark.parametrize("case", ["alibi", "rope", "shaw", "fox-fading", "fire", "cope", "transformer-xl", "xpos", "rerope"])
@torch.no_grad()
def test_layers_with_and_without_a_window_share_nothing_wrong(case: str) -> None:
    """One token at a time: the first layer's cache drops keys, the second's keeps them all."""
    model, ids = swapped("gpt2", case, sliding_window=WINDOW), token_ids(2, 22)
    cache = DynamicCache(config=model.config)
    cache.layers[1] = DynamicLayer()
    kept = DynamicCache(config=swapped("gpt2", case).config)
    masks: list[Tensor] = []

    def mask_first_layer(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": masks[-1]}

    found = [model(ids[:, at : at + 1], **with_cache(model, cache)).logits for at in range(22)]
    hook = model.transformer.h[0].attn.register_forward_pre_hook(mask_first_layer, with_kwargs=True)
    wanted = []
    for at in range(22):
        masks.append(band(torch.tensor([at]), torch.arange(at + 1)))
        wanted.append(model(ids[:, at : at + 1], **with_cache(model, kept)).logits)
    hook.remove()
    assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW - 1, 22]
    torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(wanted, dim=1), **ROUNDING)


@torch.no_grad()
def test_a_cache_that_returns_other_keys_than_it_said_is_refused() -> None:
    class Forgetful(DynamicCache):
        """Drops all keys but the last four, and says nothing of it."""

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys[:, :, -4:], values[:, :, -4:]

    model = swapped("gpt2", "shaw")
    with pytest.raises(UnsupportedBackendError, match=r"returned 4 keys, but its get_mask_sizes said 6"):
        model(token_ids(1, 6), **with_cache(model, Forgetful()))


@torch.no_grad()
def test_a_layer_that_stores_no_keys_is_refused() -> None:
    class Dummy:
        """As transformers' layer for keys that another layer stores: it does not know how many there are."""

        keys = None

    model = swapped("gpt2", "shaw")
    cache = DynamicCache(config=model.config)
    model(token_ids(1, 4), **with_cache(model, cache))
    cache.layers[1] = Dummy()
    with pytest.raises(UnsupportedBackendError, match=r"Layer 1 carries the scheme 'shaw', but stores no keys in the cache"):
        model(token_ids(1, 1), **with_cache(model, cache))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_position_ids_without_a_batch_dimension(case: str) -> None:
    model, ids = swapped("gpt2", case), token_ids(2, 9)
    mask = torch.ones_like(ids)
    position_ids = torch.arange(9) + 3
    found = model(ids, attention_mask=mask, position_ids=position_ids).logits
    assert torch.equal(found, model(ids, attention_mask=mask, position_ids=position_ids[None]).logits)
    assert torch.equal(
        build("gpt2")(ids, position_ids=position_ids).logits, build("gpt2")(ids, position_ids=position_ids[None]).logits
    )
