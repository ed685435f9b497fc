"""What every registered family has to keep; a family that is described wrongly cannot pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

import pe_swap
from pe_swap.errors import UnsupportedModelError
from pe_swap.families import FAMILIES, base_model_of
from pe_swap.families.base import WAITING, register
from pe_swap.families.classes import modeling_of
from pe_swap.families.native import GridBias
from pe_swap.patching.install import holders_of
from pe_swap.patching.layer_cache import CACHE_ARGUMENTS, parameters_of
from pe_swap.schemes import SCHEMES
from tests.support.covering import TWO_SIDED, covering, read, scheme_of, traits, ways_in
from tests.support.families import (
    IDS_ONLY,
    IMAGES,
    ROUNDING,
    TINY,
    auto_class,
    config_of,
    described_alike,
    difference,
    outputs,
    takes_sdpa,
    tiny,
    token_ids,
)
from tests.support.models import CASES
from tests.support.models import swapped_tiny as swapped

NAMES = FAMILIES.names()
TEXTS = [name for name in NAMES if not FAMILIES[name].takes_images]
ALONE = [name for name in TEXTS if len(FAMILIES[name].stacks_of(config_of(name))) == 1 and name != "whisper"]
CAUSAL = [name for name in ALONE if FAMILIES[name].is_causal(config_of(name))]
CACHED = [name for name in CAUSAL if FAMILIES[name].stacks[-1].has_cache]


def looks_back_only(family: str) -> bool:
    """Tell whether every stack of a family is causal."""
    config = config_of(family)
    return all(stack.is_causal(config) for stack in FAMILIES[family].stacks_of(config))


ALIKE = set(NAMES) - described_alike().keys()
"""Families that share a description with another one, which has the name of its file."""


def cases_of(family: str) -> list[str]:
    """Return the cases that a family takes."""
    if FAMILIES[family].takes_images:  # every scheme of a grid runs in tests/families/test_images.py
        return [case for case in TWO_SIDED if CASES[case][1] == {} and SCHEMES[CASES[case][0]].on_a_grid is not None]
    known = CASES if looks_back_only(family) else TWO_SIDED
    return [case for case in known if "embed" not in scheme_of(case).hooks or family not in IDS_ONLY]


def ways_into(family: str) -> list[str]:
    """Return few cases with every hook; of a family that is described as another one is, those that read every part of a model."""
    return covering(cases_of(family), of=read if family in ALIKE else ways_in)


WAYS_IN = [(family, case) for family in NAMES for case in ways_into(family)]


@contextmanager
def silent_rotation(family: str) -> Iterator[None]:
    """Let the family's own file turn nothing."""
    modeling = modeling_of(family)
    own = modeling.apply_rotary_pos_emb
    turns_one = family in ("gptj", "codegen")
    modeling.apply_rotary_pos_emb = lambda x, *rest, **_: x if turns_one else (x, rest[0])
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = own


HANDED_ALIBI = {"bloom": ("_get_alibi_slopes", "build_alibi_tensor"), "mpt": ("build_mpt_alibi_tensor",)}
"""Families whose model hands ALiBi's bias to its layers, and the function of their file that gives slopes or bias: the first there is."""


@contextmanager
def silent_alibi(family: str) -> Iterator[None]:
    """Let the family's own file give slopes of 0."""
    modeling = modeling_of(family)
    name = next(name for name in HANDED_ALIBI[family] if hasattr(modeling, name))
    own = getattr(modeling, name)
    setattr(modeling, name, lambda *args, **kwargs: own(*args, **kwargs) * 0)
    try:
        yield
    finally:
        setattr(modeling, name, own)


def silenced(family: str, model: PreTrainedModel) -> Any:
    """Return a context in which an unswapped model has no positions, by other means than ours."""
    kind = FAMILIES[family].stacks_of(model.config)[-1].native.kind
    if kind == "rotary":
        return silent_rotation(family)
    if family in HANDED_ALIBI:
        return silent_alibi(family)
    with torch.no_grad():
        for stack in FAMILIES[family].stacks_of(model.config):
            if isinstance(stack.native, GridBias):  # a table of biases in every layer
                for name, parameter in model.named_parameters():
                    parameter.mul_(0.0 if name.endswith("relative_position_bias_table") else 1.0)
                continue
            weight = stack.native.require_native(base_model_of(model)).weight
            rows = weight.view(-1, weight.shape[-1])
            rows[stack.native.prefix_rows if stack.native.kind == "grid" else 0 :].zero_()  # what stands nowhere has no position
    return silent_rotation("llama")  # nothing of these models is in it


def test_every_family_has_a_tiny_configuration() -> None:
    known = (TINY.keys() | IMAGES.keys()) & configuration_auto.CONFIG_MAPPING_NAMES.keys()
    if Version(transformers.__version__) < Version("5.24"):
        known -= IMAGES.keys()
        known -= {"gptj", "codegen", "clip_text_model", "nomic_bert"}
        known -= {"bamba", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "qwen3_next"}
    assert sorted(known) == NAMES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [name for name in NAMES if FAMILIES[name].stacks_of(config_of(name))[-1].native.own_scheme])
def test_its_own_scheme_changes_nothing(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = tiny(family), token_ids(2, 20)
    if dtype != torch.float32:  # as users have it: from a folder, which keeps frequencies in float32
        model.save_pretrained(tmp_path)
        model = auto_class(family).from_pretrained(tmp_path, dtype=dtype).eval()
    expected = outputs(model, ids)
    native = FAMILIES[family].stacks_of(model.config)[-1].native
    pe_swap.swap_positional(model, native.own_scheme)
    found = outputs(model, ids)
    if native.kind == "bias" or family == "esm":  # added by another kernel; its queries come scaled
        assert difference(found.float(), expected.float()) <= (ROUNDING if dtype == torch.float32 else 0.05)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", NAMES)
def test_a_swap_moves_the_output_and_a_restore_gives_it_back_bit_for_bit(family: str) -> None:
    model, ids = tiny(family), token_ids(2, 20)
    expected, config = outputs(model, ids), model.config.to_dict()
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    pe_swap.swap_positional(model, "kerple" if family in HANDED_ALIBI else "alibi")
    assert difference(outputs(model, ids), expected) > 1e-3
    pe_swap.restore_positional(model)
    assert torch.equal(outputs(model, ids), expected)
    assert model.config.to_dict() == config
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks


def test_a_family_that_needs_a_later_transformers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that it is unknown; `register` files it apart, and nothing of it is swapped."""
    model = tiny("gpt2")
    monkeypatch.delitem(FAMILIES._entries, "gpt2")
    monkeypatch.setattr("pe_swap.families.base.WAITING", {})
    register("gpt2", since="99.1")
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' \(GPT2LMHeadModel\) is described for transformers 99\.1 or later"):
        pe_swap.swap_positional(model, "rope")
    assert not hasattr(model.config, "pe_swap")


LOOKS_LIKE_LLAMA = ("self.rotary_emb = ", "position_embeddings", "ALL_ATTENTION_FUNCTIONS", "self.self_attn = ", "embed_tokens")
"""What a modeling file has whose family is one line in `pe_swap/families/llama.py`."""

LEFT_OUT = {
    "keys and values of other widths, or a part of each head turned": "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 "
    "glm4_moe_lite glm_moe_dsa longcat_flash mimo_v2_flash minicpm3 youtu",
    "layers without attention in the stack, not run yet": "bailing_hybrid kolibri1 lfm3 minimax olmo_hybrid zamba2 zaya beam",
    "the same, and positions of three axes": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp qwen4_exp_text",
    "a text model inside another, or layers of another kind beside": "blt emu3 gemma3 gemma3n gemma4 gemma4_unified llama4 mllama moshi "
    "phi4_multimodal cohere_compass_text dots3_note dots3_note_text minimax_m3_vl_text",
    "keys shared between layers, or embeddings per layer": "gemma3n_text gemma4_text gemma4_unified_text",
    "attention that calls its function more than once, or by hand": "afmoe diffllama doge dory hrm_text inkling2_text lara_mini",
    "turned before the norms, in complex numbers, or the other way": "hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 llama4_text nanochat",
    "a rotation whose class reads the parameters of longrope whatever its type": "phimoe",
    "a list of rotations beside an unused one": "granite_swa granitemoe_swa flint",
}
"""Model types of transformers that look like Llama and are not described here, by reason."""


def test_every_type_that_looks_like_llama_is_described_or_left_out_for_a_reason() -> None:
    folder, found = Path(transformers.__file__).parent / "models", set()
    for model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = configuration_auto.model_type_to_module_name(model_type)
        file = folder / module / f"modeling_{module}.py"
        if file.exists() and all(sign in file.read_text(encoding="utf-8") for sign in LOOKS_LIKE_LLAMA):
            found.add(model_type)
    left_out = {name for names in LEFT_OUT.values() for name in names.split()}
    assert found - set(NAMES) - set(WAITING) <= left_out, (
        "write it into ALIKE of pe_swap/families/llama.py, or here with the reason"
    )
    assert not left_out & set(NAMES)


@pytest.mark.parametrize(
    "family", [name for name in ALONE if FAMILIES[name].stacks_of(config_of(name))[0].native.kind == "rotary"]
)
def test_a_rope_of_the_familys_own_form_acts_in_each_layer_alone(family: str) -> None:
    model, ids = tiny(family), token_ids(2, 20)
    expected = outputs(model, ids)
    for layer in range(3):
        found = outputs(pe_swap.swap_positional(tiny(family), "rope", rope_type="linear", factor=3.0, layers=[layer]), ids)
        assert difference(found, expected) > 1e-4, f"layer {layer}"


@pytest.mark.parametrize("family", NAMES)
def test_none_is_the_model_without_positions(family: str) -> None:
    ids = token_ids(2, 20)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The scheme 'none' on an encoder")
        model = pe_swap.swap_positional(tiny(family), "none")
    found = outputs(model, ids)
    reference = tiny(family)
    with silenced(family, reference):
        expected = outputs(reference, ids)
    assert difference(found, expected) <= ROUNDING


@pytest.mark.parametrize("family", [name for name in CAUSAL if name not in ("clip_text_model", *HANDED_ALIBI)])
def test_alibi_is_the_silenced_model_with_the_bias_in_its_mask(family: str) -> None:
    ids = token_ids(2, 6)  # no longer than any window: a mask given by the caller is that of every layer
    model = pe_swap.swap_positional(tiny(family, attn_implementation="eager"), "alibi")
    found = outputs(model, ids)
    slopes = torch.tensor(
        [2.0 ** -(8 * (head + 1) / 8) for head in range(8)] + [2.0 ** -(8 * (2 * head + 1) / 16) for head in range(4)]
    )
    distance = torch.arange(6)[None, :] - torch.arange(6)[:, None]
    mask = (
        (slopes[:, None, None] * distance).masked_fill(distance > 0, torch.finfo(torch.float32).min)[None].expand(2, -1, -1, -1)
    )
    reference = tiny(family, attn_implementation="eager")
    with silenced(family, reference):
        expected = outputs(reference, ids, attention_mask=mask, position_ids=torch.arange(6)[None])
    assert difference(found, expected) <= ROUNDING


@pytest.mark.parametrize(("family", "case"), WAYS_IN)
def test_every_way_in_is_the_same_in_every_form_of_a_call(family: str, case: str) -> None:
    """Under either backend, beside padding, and with a cache, beyond windows."""
    model, ids = swapped(family, case), token_ids(2, 16)
    expected = outputs(model, ids)
    if family in CACHED and scheme_of(case).cached_equals_uncached:
        assert difference(cached(model, ids), expected) <= ROUNDING, "cached"
    for side in ("left", "right") if family in ALONE and family != "clip_text_model" else ():
        assert difference(padded(model, ids[:1], side), expected[0]) <= ROUNDING, f"padded on the {side}"
    if takes_sdpa(model):
        model.config._attn_implementation = "eager"
        assert difference(outputs(model, ids), expected) <= ROUNDING, "eager"


def cached(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the outputs of a text in pieces, with a cache."""
    cache, parts = DynamicCache(config=model.config), []
    name = next(name for name in CACHE_ARGUMENTS if name in parameters_of(model))
    for start, stop in ((0, 7), (7, 10), (10, 11), (11, 12), (12, 16)):
        parts.append(outputs(model, ids[:, start:stop], use_cache=True, **{name: cache}))
    return torch.cat(parts, dim=1)


def padded(model: PreTrainedModel, row: Tensor, side: str) -> Tensor:
    """Return the outputs of a row beside padding, `[length, ...]`."""
    padding = torch.zeros(1, 5, dtype=torch.long)
    first_id = next(iter(holders_of(model))).first_id
    parts = (padding, row) if side == "left" else (row, padding)
    mask = torch.cat([torch.zeros_like(part) if part is padding else torch.ones_like(part) for part in parts], dim=1)
    ids = (mask.cumsum(-1) - 1).clamp(min=0) + first_id
    takes_ids = "position_ids" in parameters_of(model) or "position_ids" in parameters_of(model.base_model)
    given = {"position_ids": ids} if takes_ids else {}
    return outputs(model, torch.cat(parts, dim=1), attention_mask=mask, **given)[0, mask[0].bool()]


def saved_cases(family: str) -> list[str]:
    """Return a case that has weights, and one that has none."""
    return covering(cases_of(family), of=lambda case: traits(case) & {("weights", True), ("weights", False)})


@pytest.mark.parametrize(("family", "case"), [(family, case) for family in NAMES for case in saved_cases(family)])
def test_saved_and_reloaded_is_the_same_model(family: str, case: str, tmp_path: Path) -> None:
    model, ids = swapped(family, case), token_ids(2, 20)
    model.save_pretrained(tmp_path)
    again, info = auto_class(family).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(outputs(again.eval(), ids), outputs(model, ids))


@pytest.mark.parametrize("family", NAMES)
def test_its_own_class_refuses_a_swapped_folder(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    own_class = type(model)
    pe_swap.swap_positional(model, "alibi").save_pretrained(tmp_path)
    with pytest.raises(Exception, match="pe_swap") as raised:
        own_class.from_pretrained(tmp_path)
    assert "pip install pe-swap" in str(raised.value) or "pe_swap" in str(raised.value)
