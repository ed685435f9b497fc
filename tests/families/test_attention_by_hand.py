"""Families whose attention is written out by hand: the class of their attention modules is set and undone exactly."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import pe_swap
from pe_swap.families import FAMILIES
from tests.support.families import ROUNDING, config_of, difference, outputs, tiny, token_ids

BY_HAND = [name for name in FAMILIES.names() if any(stack.attention_class for stack in FAMILIES[name].stacks)]


def attention_modules(model):  # type: ignore[no-untyped-def]
    return FAMILIES[model.config.model_type.removeprefix("pe_swap_")].stacks[0].attention_modules(model.base_model, model.config)


@pytest.mark.parametrize("family", BY_HAND)
def test_classes_are_set_and_undone(family: str) -> None:
    model = tiny(family)
    own = [type(module) for module in attention_modules(model)]
    pe_swap.swap_positional(model, "kerple")
    assert all(
        type(module) is not before and isinstance(module, before)
        for module, before in zip(attention_modules(model), own, strict=True)
    )
    copied = copy.deepcopy(model)
    restored = pe_swap.restore_positional(model)
    assert [type(module) for module in attention_modules(restored)] == own
    assert type(attention_modules(copied)[0]) is not own[0]
    assert type(pickle.loads(pickle.dumps(attention_modules(copied)[0].__class__))) is type


@pytest.mark.parametrize("family", [name for name in BY_HAND if FAMILIES[name].stacks[0].native.keeps_layers])
def test_layers_that_are_not_named_keep_their_positions_bit_for_bit(family: str) -> None:
    ids = token_ids(2, 20)
    expected = outputs(tiny(family), ids, output_hidden_states=True)
    found = outputs(pe_swap.swap_positional(tiny(family), "none", layers=[2]), ids)
    assert difference(found, expected) > 1e-4
    states = pe_swap.swap_positional(tiny(family), "kerple", layers=[2])(ids, output_hidden_states=True).hidden_states
    for state, own in zip(states[:3], tiny(family)(ids, output_hidden_states=True).hidden_states[:3], strict=True):
        assert torch.equal(state, own)


@pytest.mark.parametrize("family", BY_HAND)
def test_modules_that_accelerate_has_hooked_are_refused(family: str) -> None:
    model, ids = tiny(family), token_ids(1, 9)
    expected = outputs(model, ids)
    add_hook_to_module(attention_modules(model)[1], ModelHook())
    with pytest.raises(pe_swap.errors.FamilyError, match="has a forward of its own"):
        pe_swap.swap_positional(model, "kerple")
    assert torch.equal(outputs(model, ids), expected)
    remove_hook_from_module(attention_modules(model)[1])
    swapped = outputs(pe_swap.swap_positional(model, "kerple"), ids)
    add_hook_to_module(attention_modules(model)[1], ModelHook())  # as device_map does with a swapped model
    assert torch.equal(outputs(model, ids), swapped)
    with pytest.raises(pe_swap.errors.FamilyError, match="has a forward of its own"):
        pe_swap.restore_positional(model)
    assert torch.equal(outputs(model, ids), swapped)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_position_ids_are_refused_where_the_family_ignores_them(family: str) -> None:
    model, ids = pe_swap.swap_positional(tiny(family), "fire"), token_ids(1, 9)
    with pytest.raises(pe_swap.errors.UnsupportedModelError, match="takes no position_ids"):
        model.base_model(ids, position_ids=torch.arange(9)[None])


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}
"""Angles by the length of the row, into which padding must not count."""


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("fire", {}), ("rope", DYNAMIC), ("sinusoidal", {"scale": 1.0})],
    ids=["fire", "dynamic", "sinusoidal"],
)
@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_padding_is_no_position_with_a_cache_and_without(family: str, scheme: str, options: dict[str, object]) -> None:
    model, row = pe_swap.swap_positional(tiny(family), scheme, **options), token_ids(1, 12)
    alone = model.generate(row, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), row), dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 12])
    ways: list[dict[str, object]] = [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
    for way in ways[: 2 if family == "mpt" else 3]:  # transformers' MPT has no static cache
        found = model.generate(
            padded, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **way
        )
        assert torch.equal(found[:, 5:], alone)
    assert difference(outputs(model, padded, attention_mask=mask)[:, 5:], outputs(model, row)) <= ROUNDING


@pytest.mark.parametrize("family", BY_HAND)
def test_the_check_holds_on_them(family: str) -> None:
    report = pe_swap.check_positional(pe_swap.swap_positional(tiny(family), "fire"))
    assert report.passed, str(report)


@pytest.mark.parametrize(
    "settings",
    [{"multi_query": True}, {"new_decoder_architecture": True, "num_kv_heads": 4}, {"multi_query": False, "num_kv_heads": 12}],
)
def test_falcons_forms_of_key_heads(settings: dict[str, object]) -> None:
    ids = token_ids(2, 20)
    model = pe_swap.swap_positional(tiny("falcon", **settings), "rope", layout="interleaved")
    in_pairs = outputs(model, ids)
    model.config._attn_implementation = "eager"
    assert difference(outputs(model, ids), in_pairs) <= ROUNDING
    all_but_rope = pe_swap.swap_positional(tiny("falcon", **settings), "xpos", scale_base=10**6, layout="half")
    assert difference(outputs(all_but_rope, ids), outputs(tiny("falcon", **settings), ids)) <= 1e-3


def test_a_falcon_with_alibi_is_refused() -> None:
    with pytest.raises(pe_swap.errors.UnsupportedModelError, match=r"configuration of this Falcon.* configured otherwise"):
        pe_swap.swap_positional(tiny("falcon", alibi=True), "rope")
    assert config_of("falcon").alibi is False
