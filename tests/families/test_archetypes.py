"""Every scheme and form of it in the families that differ most: what holds for GPT-2 and BERT holds there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import pe_swap
from pe_swap.families import FAMILIES
from pe_swap.patching.install import holders_of
from pe_swap.patching.layer_cache import CACHE_ARGUMENTS, parameters_of
from pe_swap.schemes import SCHEMES
from tests.support.covering import COVERING, COVERING_TWO_SIDED
from tests.support.families import ROUNDING, auto_class, difference, looks_back_only, outputs, takes_sdpa, tiny, token_ids
from tests.support.models import CASES, LENGTH_DEPENDENT
from tests.support.models import swapped_tiny as swapped

ARCHETYPES = tuple(
    name
    for name in (
        "bloom",
        "distilbert",
        "falcon",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "llama",
        "roberta",
        "t5",
    )
    if name in FAMILIES
)
"""Attention written by hand; ids from the padding; no cache; grouped heads; a cap; windows; sinks; part of a head; interleaved planes."""


PAIRS = [
    (family, case)
    for family in ARCHETYPES
    for case in CASES
    if looks_back_only(family) or not SCHEMES[CASES[case][0]].causal_only
]


COVERED = [(family, case) for family in ARCHETYPES for case in (COVERING if looks_back_only(family) else COVERING_TWO_SIDED)]
"""The covering cases, for what the matrix shows of every case and what depends on the family alone."""


@pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")
@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_every_scheme_keeps_its_claims(family: str, case: str) -> None:
    model, ids = swapped(family, case), token_ids(2, 14)
    expected = outputs(model, ids)
    assert expected.isfinite().all()
    if takes_sdpa(model):
        model.config._attn_implementation = "eager"
        assert difference(outputs(model, ids), expected) <= ROUNDING, "eager"
        model.config._attn_implementation = "sdpa"
    row, padding = ids[:1], torch.zeros(1, 5, dtype=torch.long)
    mask = torch.tensor([[0] * 5 + [1] * 14])
    first_id = holders_of(model)[0].first_id
    given = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0) + first_id}
    if "position_ids" in parameters_of(model) or "position_ids" in parameters_of(model.base_model):
        found = outputs(model, torch.cat((padding, row), dim=1), attention_mask=mask, **given)
        assert difference(found[0, 5:], outputs(model, row)[0]) <= ROUNDING, "padded"
    if looks_back_only(family) and case not in LENGTH_DEPENDENT:
        name = next(name for name in CACHE_ARGUMENTS if name in parameters_of(model))
        cache = DynamicCache(config=model.config)
        parts = [
            outputs(model, ids[:, start:stop], use_cache=True, **{name: cache})
            for start, stop in ((0, 7), (7, 10), (10, 11), (11, 14))
        ]
        assert difference(torch.cat(parts, dim=1), expected) <= ROUNDING, "cached"


@pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")
@pytest.mark.parametrize(("family", "case"), COVERED)
def test_copied_reloaded_and_restored(family: str, case: str, tmp_path: Path) -> None:
    model, ids = swapped(family, case), token_ids(2, 14)
    expected = outputs(model, ids)
    assert torch.equal(outputs(copy.deepcopy(model), ids), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(auto_class(family).from_pretrained(tmp_path).eval(), ids), expected)
    assert torch.equal(outputs(pe_swap.restore_positional(model), ids), outputs(tiny(family), ids))


@pytest.mark.parametrize("case", ["alibi", "fox", "rope", "rope-yarn", "t5", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_generation_from_left_padding_with_either_cache_is_generation_without(family: str, case: str) -> None:
    model = swapped(family, case)
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    settings: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    without = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), without)
    if case != "fox":  # its keys are wider than a static cache of the model's own sizes
        assert torch.equal(model.generate(ids, cache_implementation="static", **settings), without)
    beams = {**settings, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("llama", "rope-interleaved"),
        ("gemma3_text", "t5"),
        ("roberta", "sinusoidal"),
    ],
)
@pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")
def test_it_compiles_to_one_graph(family: str, case: str) -> None:
    model, ids = swapped(family, case), token_ids(2, 14)
    expected = outputs(model, ids)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert difference(compiled(ids).logits, expected) <= ROUNDING


@pytest.mark.parametrize("case", ["alibi-trained", "fox", "t5", "rope-yarn"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "t5"])
def test_checkpointed_gradients_are_the_gradients(family: str, case: str) -> None:
    if family == "t5" and case == "fox":
        pytest.skip("fox is for causal attention, and t5 has an encoder")

    def gradients(checkpointed: bool) -> list[Tensor]:
        model = swapped(family, case).train()
        if checkpointed:
            name = next(n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(model, n))
            getattr(model, name)({"use_reentrant": False})
        ids = token_ids(2, 12)
        more = {"decoder_input_ids": ids} if family == "t5" else {}
        model(ids, use_cache=False, **more).logits.square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert difference(found, expected) <= 3e-5  # an unswapped T5's, whose scores are not scaled, differ by 1.3e-5


def turned_by_nothing(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Hand a layer the rotation by no angle; a pre-hook."""
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_layers_that_are_not_named_keep_the_models_own_rotation_bit_for_bit(family: str) -> None:
    ids = token_ids(2, 20)
    reference = tiny(family)
    reference.base_model.layers[1].self_attn.register_forward_pre_hook(turned_by_nothing, with_kwargs=True)
    model = pe_swap.swap_positional(tiny(family), "none", layers=[1])
    assert torch.equal(outputs(model, ids), outputs(reference, ids))


def test_a_static_cache_beyond_a_window() -> None:
    model, ids = swapped("gemma3_text", "t5"), token_ids(1, 20)
    expected = outputs(model, ids, use_cache=False)
    cache = StaticCache(config=model.config, max_cache_len=20)
    name = next(name for name in CACHE_ARGUMENTS if name in parameters_of(model))
    parts = [outputs(model, ids[:, start:stop], use_cache=True, **{name: cache}) for start, stop in ((0, 11), (11, 12), (12, 20))]
    assert difference(torch.cat(parts, dim=1), expected) <= ROUNDING


def test_parts_of_an_encoder_decoder() -> None:
    model, ids = tiny("t5"), token_ids(2, 9)
    before = outputs(model, ids)
    pe_swap.swap_positional(model, "fox", part="decoder")
    assert set(model.config.pe_swap["stacks"]) == {"decoder"}
    both = outputs(pe_swap.swap_positional(model, "alibi", part="encoder"), ids)
    assert difference(both, before) > 1e-3
    pe_swap.restore_positional(model, part="encoder")
    assert set(model.config.pe_swap["stacks"]) == {"decoder"}
    assert torch.equal(outputs(pe_swap.restore_positional(model), ids), before)


def test_a_trained_length_given_with_the_swap() -> None:
    model = pe_swap.swap_positional(tiny("llama"), "fox", trained_length=64)
    assert model.config.pe_swap["trained_length"] == 64
    with pytest.raises(pe_swap.errors.OptionError, match="trained_length is 0"):
        pe_swap.swap_positional(tiny("llama"), "fox", trained_length=0)


def test_rope_as_transformers_spells_it() -> None:
    ids, parameters = (
        token_ids(2, 20),
        {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    )
    model = pe_swap.swap_positional(tiny("llama"), "rope", **parameters)
    assert torch.equal(outputs(model, ids), outputs(tiny("llama", rope_parameters=parameters), ids))
