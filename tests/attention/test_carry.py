"""What a scheme carries beside each key, wherever the owner of a cache takes it: beams, cropping, padding, static buffers."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import pe_swap
from pe_swap.errors import SwapStateError
from tests.support.models import build, logits, swapped, token_ids, with_cache

CASE = "fox-fading"
every_decoder = pytest.mark.parametrize("family", ["gpt2", "bert-decoder"])


@every_decoder
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_with_a_cache_is_that_without_one(family: str, how: dict[str, object]) -> None:
    model, ids = swapped(family, CASE), token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    beams = {key: value for key, value in how.items() if key == "num_beams"}
    expected = model.generate(ids, use_cache=False, **settings, **beams)
    assert torch.equal(model.generate(ids, use_cache=True, **settings, **how), expected)


@every_decoder
def test_a_cropped_cache_forgets_what_was_cropped(family: str) -> None:
    model, ids = swapped(family, CASE), token_ids(1, 16)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], **with_cache(model, past))
        model(token_ids(1, 4, seed=8), **with_cache(model, past))  # a draft that is not taken
        past.crop(-4)
        rest = model(ids[:, 9:], **with_cache(model, past)).logits
    torch.testing.assert_close(rest, logits(model, ids, use_cache=False)[:, 9:], atol=2e-5, rtol=1e-4)


def test_the_cache_holds_one_channel_more_and_the_same_numbers() -> None:
    model, ids = swapped("gpt2", CASE), token_ids(1, 5)
    past = DynamicCache(config=model.config)
    hidden: list[torch.Tensor] = []
    model.transformer.h[0].attn.register_forward_pre_hook(
        lambda module, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(ids, **with_cache(model, past))
        scheme = model.transformer.wpe.scheme_at(0)
        assert past.layers[0].keys.shape == (1, 12, 5, 9)
        assert past.layers[0].values.shape == (1, 12, 5, 8)
        assert torch.equal(past.layers[0].keys[..., 8:], scheme.extra_key_channels(hidden[0], layer=0))


def test_a_cache_of_another_scheme_or_allocated_ahead_is_refused() -> None:
    model, ids = build("gpt2"), token_ids(1, 5)
    past = DynamicCache(config=model.config)
    logits(model, ids, **with_cache(model, past))
    pe_swap.swap_positional(model, "fox")
    with pytest.raises(SwapStateError, match=r"Layer 0's cache holds keys of 8 channels, but the scheme 'fox' needs 9"):
        logits(model, ids, **with_cache(model, past))
    ahead = StaticCache(config=model.config, max_cache_len=16)
    ahead.early_initialization(batch_size=1, num_heads=12, head_dim=8, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(SwapStateError, match=r"allocated ahead of time \(early_initialization"):
        logits(model, ids, **with_cache(model, ahead))


def test_layers_of_their_own() -> None:
    model, ids = build("gpt2"), token_ids(1, 12)
    pe_swap.swap_positional(model, "rope")
    pe_swap.swap_positional(model, "fox", layers=[1], initial_reach=3.0)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(ids[:, at : at + 4], **with_cache(model, past)).logits for at in (0, 4, 8)]
    assert [layer.keys.shape[-1] for layer in past.layers] == [8, 9]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids, use_cache=False), atol=2e-5, rtol=1e-4)


def test_chunks_into_a_static_cache_that_generate_allocates() -> None:
    model, ids = swapped("gpt2", CASE), token_ids(1, 13)
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    with pytest.raises(
        SwapStateError, match=r"prefill_chunk_size with a static cache\): pass a new, empty cache, or a dynamic one"
    ):
        model.generate(ids, cache_implementation="static", prefill_chunk_size=4, **settings)
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, **settings), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)
