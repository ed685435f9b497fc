"""Copies of a part of a swapped model: of an attention module, of a layer, of the whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import pe_swap
from pe_swap.patching.install import holder_of
from tests.support.covering import covering_pairs
from tests.support.models import MATRIX_FAMILIES, build, swapped, token_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own call
]

LAYERS = {"gpt2": "h", "bert": "encoder.layer", "bert-decoder": "encoder.layer"}
PLACE = {"gpt2": "wpe", "bert": "position_embeddings", "bert-decoder": "position_embeddings"}


def layers_of(model: Any, family: str) -> Any:
    return model.base_model.get_submodule(LAYERS[family])


@pytest.mark.parametrize(("case", "family"), covering_pairs(MATRIX_FAMILIES))
def test_a_copied_layer_uses_the_weights_of_the_model_it_stands_in(case: str, family: str) -> None:
    model, ids = swapped(family, case).eval(), token_ids(2, 12)
    names = dict(model.named_parameters()).keys()
    layers = layers_of(model, family)
    layers[1] = copy.deepcopy(layers[1])
    assert dict(model.named_parameters()).keys() == names
    holder = holder_of(model)
    assert holder is not None
    for weight in holder.parameters():
        with torch.no_grad():
            weight.add_(torch.randn_like(weight) * 0.1)
    fresh = copy.deepcopy(model)  # a whole model: every reference goes to the copy
    with torch.no_grad():
        expected = model(ids)[0]
        assert torch.equal(fresh(ids)[0], expected)
        for weight in holder.parameters():
            weight.add_(1.0)
        assert torch.equal(fresh(ids)[0], expected)
    referred = [held for layer in layers for held in layer.modules() if hasattr(held, "pe_swap_binding")]
    assert all(held.pe_swap_binding.holder_ref.holder is holder for held in referred)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["t5", "fox", "fire", "shaw", "cope"])
def test_attention_and_positional_weights_trained_in_full_by_peft(scheme: str, dtype: torch.dtype) -> None:
    base, ids = pe_swap.swap_positional(build("gpt2"), scheme).to(dtype), token_ids(2, 12)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["c_fc"], modules_to_save=["attn", "wpe"], fan_in_fan_out=True)
    model = get_peft_model(base, config).train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trained = {name: weight for name, weight in model.named_parameters() if ".wpe." in name and weight.requires_grad}
    assert trained
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in trained.values())


def test_replicated_layers_share_the_positional_weights() -> None:
    base, ids = swapped("bert-decoder", "t5"), token_ids(2, 12)
    config = LoraConfig(target_modules=["query"], layer_replication=[[0, 2], [1, 2]], modules_to_save=["position_embeddings"])
    model = get_peft_model(base, config).train()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {
        name: weight for name, weight in model.named_parameters() if "position_embeddings" in name and weight.requires_grad
    }
    assert len(trained) == 1
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in trained.values())
