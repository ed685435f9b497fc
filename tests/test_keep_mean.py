"""The mean row of a position table, kept as a constant beside another scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pe_swap
from pe_swap.errors import OptionError, SwapStateError
from pe_swap.families import FAMILIES, family_for
from pe_swap.patching.install import holders_of, positional_parameters
from pe_swap.schemes import SCHEMES
from tests.support.families import ROUNDING, config_of, described_alike, difference, outputs, tiny, token_ids

TURNING = ("hope", "rerope", "rope", "self_extend", "xpos")
"""What configs/README.md, "Keep the mean", says that it helps."""

WITH_TABLES = [
    name for name in described_alike() if any(s.native.kind == "table" for s in FAMILIES[name].stacks_of(config_of(name)))
]


@pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")
@pytest.mark.parametrize("family", WITH_TABLES)
def test_no_positions_beside_the_mean_are_a_table_of_equal_rows(family: str) -> None:
    model, reference, ids = tiny(family), tiny(family), token_ids(2, 7)
    before = outputs(model, ids)
    base = reference.base_model
    tables = [stack.native for stack in family_for(reference).stacks_in(base, reference.config) if stack.native.kind == "table"]
    with torch.no_grad():
        for table in tables:
            rows: Any = table.require_native(base).weight
            rows[table.first_row(config_of(family)) :] = table.table(config_of(family), table.require_native(base)).mean(0)
    without = outputs(pe_swap.swap_positional(model, "none"), ids)
    found = outputs(pe_swap.swap_positional(model, "none", keep_mean=True), ids)
    assert difference(found, outputs(reference, ids)) <= ROUNDING
    assert difference(found, without) > ROUNDING
    assert torch.equal(outputs(pe_swap.restore_positional(model), ids), before)


@pytest.mark.parametrize("scheme", ["t5", "sinusoidal"])
def test_the_mean_is_saved_and_neither_trained_nor_lost(tmp_path: Path, scheme: str) -> None:
    model, ids = tiny("gpt2"), token_ids(2, 12)
    table = model.transformer.wpe.weight.detach().clone()
    pe_swap.swap_positional(model, scheme, keep_mean=True)
    assert not any("mean" in name for name, _ in positional_parameters(model))
    assert model.config.pe_swap["keep_mean"] is True
    assert pe_swap.check_positional(model).passed
    model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["transformer.wpe.mean"], table.mean(0))
    assert "mean row" in (tmp_path / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))
    assert loaded.config.pe_swap["keep_mean"] is True

    pe_swap.swap_positional(loaded, "rope", layers=[0])
    assert loaded.config.pe_swap["keep_mean"] is True, "the input is shared by all layers, so some layers' swap leaves it"
    pe_swap.swap_positional(loaded, "alibi", keep_mean=True)
    assert torch.equal(outputs(loaded, ids), outputs(pe_swap.swap_positional(model, "alibi", keep_mean=True), ids))
    pe_swap.swap_positional(loaded, "alibi")
    assert "keep_mean" not in loaded.config.pe_swap
    assert holders_of(loaded)[0].mean is None
    assert torch.equal(pe_swap.restore_positional(model).transformer.wpe.weight, table)


@pytest.mark.parametrize(
    ("family", "scheme", "value", "message"),
    [
        ("llama", "rope", True, "are no table"),
        ("bloom", "alibi", True, "are no table"),
        ("gpt2", "learned", True, "other than concat and learned"),
        ("gpt2", "concat", True, "other than concat and learned"),
        ("gpt2", "rope", "yes", "it must be True, False or None"),
    ],
)
def test_a_mean_that_cannot_be_kept(family: str, scheme: str, value: Any, message: str) -> None:
    model, ids = tiny(family), token_ids(2, 7)
    before = outputs(model, ids)
    with pytest.raises(OptionError, match=message):
        pe_swap.swap_positional(model, scheme, keep_mean=value)
    assert not hasattr(model.config, "pe_swap")
    assert torch.equal(outputs(model, ids), before)


def test_the_mean_of_a_table_that_is_gone(tmp_path: Path) -> None:
    pe_swap.swap_positional(tiny("gpt2"), "rope", keep_mean=False).save_pretrained(tmp_path)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), token_ids(2, 7)
    before = outputs(model, ids)
    with pytest.raises(SwapStateError, match="loaded already swapped"):
        pe_swap.swap_positional(model, "alibi", keep_mean=True)
    assert torch.equal(outputs(model, ids), before)


def test_the_mean_stays_in_decoders_beside_schemes_that_turn_unless_a_swap_says_otherwise(tmp_path: Path) -> None:
    def kept(model: Any) -> bool:
        return holders_of(model)[0].mean is not None

    helped = {name for name in pe_swap.list_schemes() if kept(pe_swap.swap_positional(tiny("gpt2"), name))}
    assert helped == {name for name in SCHEMES.names() if SCHEMES[name].keeps_mean} == set(TURNING)
    assert not kept(pe_swap.swap_positional(tiny("gpt2"), "rope", keep_mean=False))
    assert not kept(pe_swap.swap_positional(tiny("bert"), "rope"))
    assert not kept(pe_swap.swap_positional(tiny("llama"), "xpos"))
    model = pe_swap.swap_positional(tiny("gpt2"), "alibi")
    assert not kept(pe_swap.swap_positional(model, "rope", layers=[0])), "the input is shared by all layers"
    assert kept(pe_swap.swap_positional(model, "rope"))
    assert kept(pe_swap.swap_positional(model, "alibi", layers=[0])), "it stays with the layers that stay"
    assert not kept(pe_swap.swap_positional(model, "alibi", layers=[0], keep_mean=False))
    deep, plan = tiny("gpt2", num_hidden_layers=4), {"plan": "rope_local_nope_global", "sliding_window": 4}
    again = pe_swap.swap_positional(pe_swap.swap_positional(tiny("gpt2", num_hidden_layers=4), "alibi"), **plan)
    assert kept(again) == kept(pe_swap.swap_positional(deep, **plan))
    pe_swap.swap_positional(model, "rope")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kept(pe_swap.swap_positional(loaded, "hope"))
    assert not kept(pe_swap.swap_positional(loaded, "rope", keep_mean=False))
    assert not kept(pe_swap.swap_positional(loaded, "rope")), "it is gone, and nobody asked for it"
