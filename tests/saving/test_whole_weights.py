"""Every weight of a saved model comes back: in the form its family writes, none missing, none too many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import pe_swap
from pe_swap.errors import CheckpointError
from pe_swap.families import FAMILIES
from tests.support import families
from tests.support.models import swapped, token_ids

CONVERTED = [
    name
    for name in FAMILIES.names()
    if get_checkpoint_conversion_mapping(name) or get_checkpoint_conversion_mapping(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name))
]
"""Families whose weights transformers writes in another form than it holds them."""


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "built"])
@pytest.mark.parametrize("family", CONVERTED)
def test_weights_that_are_written_in_another_form_come_back(family: str, loaded: bool, tmp_path: Path) -> None:
    model = families.tiny(family)
    if loaded:
        model.save_pretrained(tmp_path / "plain")
        model = type(model).from_pretrained(tmp_path / "plain")
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    pe_swap.swap_positional(model, "shaw")
    model.save_pretrained(tmp_path / "swapped")
    again = families.auto_class(family).from_pretrained(tmp_path / "swapped")
    found = again.state_dict()
    kept = [name for name in plain if name in found and found[name].shape == plain[name].shape]
    assert len(kept) >= len(plain) - 2
    assert [name for name in kept if not torch.equal(found[name], plain[name])] == []


@pytest.mark.parametrize("scheme", ["alibi", "t5"])  # without and with weights of its own
def test_a_head_with_another_name_for_its_base_model_is_refused_with_the_way_that_works(scheme: str, tmp_path: Path) -> None:
    saved = pe_swap.swap_positional(families.tiny("llama"), scheme)
    saved.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"has its base model as 'transformer'.*LlamaForCausalLM.* as 'model'.*from_config"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / "saved")
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.from_pretrained(tmp_path / "saved")).eval()
    model.transformer.load_state_dict(saved.model.state_dict())
    ids = token_ids(2, 20)
    with torch.no_grad():
        assert torch.equal(model.transformer(ids).last_hidden_state, saved.model(ids).last_hidden_state)
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "again").eval()
        assert torch.equal(again(ids).start_logits, model(ids).start_logits)
    with pytest.raises(CheckpointError, match=r"has its base model as 'model'.*QuestionAnswering.* as 'transformer'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the weights of a saved model."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


INSIDE = {"gpt2": "transformer.h.0.mlp.c_fc.weight", "bert": "bert.encoder.layer.0.output.dense.weight"}
AUTO = {"gpt2": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}


@pytest.mark.parametrize("other_head", [False, True])
@pytest.mark.parametrize("family", INSIDE)
def test_a_weight_missing_inside_the_base_model_is_an_error(family: str, other_head: bool, tmp_path: Path) -> None:
    swapped(family, "t5").save_pretrained(tmp_path)
    edit(tmp_path, lambda weights: weights.pop(INSIDE[family]))
    with pytest.raises(CheckpointError, match=r"lacks weights.*" + INSIDE[family].partition(".")[2]):
        (AutoModel if other_head else AUTO[family]).from_pretrained(tmp_path)


@pytest.mark.parametrize("other_head", [False, True])
@pytest.mark.parametrize("family", INSIDE)
def test_a_weight_that_no_class_has_is_an_error(family: str, other_head: bool, tmp_path: Path) -> None:
    swapped(family, "t5").save_pretrained(tmp_path)
    edit(tmp_path, lambda weights: weights.update({"one_more.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"has weights.*one_more\.weight"):
        (AutoModelForSequenceClassification if other_head else AUTO[family]).from_pretrained(tmp_path)


def test_a_weight_missing_in_the_head_that_was_saved_is_an_error(tmp_path: Path) -> None:
    swapped("bert", "t5").save_pretrained(tmp_path)
    edit(tmp_path, lambda weights: weights.pop("cls.predictions.transform.dense.weight"))
    with pytest.raises(CheckpointError, match=r"lacks weights.*transform\.dense\.weight"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path)  # which has another head


@pytest.mark.parametrize("family", INSIDE)
def test_another_head_on_the_same_base_model_loads(family: str, tmp_path: Path) -> None:
    model, ids = swapped(family, "t5"), token_ids(2, 12)
    model.save_pretrained(tmp_path / "language")
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        other = auto_class.from_pretrained(tmp_path / "language")
        with torch.no_grad():
            assert torch.equal(other.base_model(ids)[0], model.base_model(ids)[0])
    other.config.pad_token_id = 0
    other.save_pretrained(tmp_path / "classifier")
    back = AUTO[family].from_pretrained(tmp_path / "classifier")
    with torch.no_grad():
        assert torch.equal(back.base_model(ids)[0], model.base_model(ids)[0])
