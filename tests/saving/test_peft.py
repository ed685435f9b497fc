"""PEFT on swapped models: families around the weights, and the positional weights trained beside them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import pe_swap
from pe_swap.errors import UnsupportedModelError
from pe_swap.families import FAMILIES
from pe_swap.patching.install import holder_of, positional_parameters
from tests.support.families import auto_class, is_causal
from tests.support.models import ROUNDING, VOCABULARY, build, swapped, token_ids

PLACE = {"gpt2": "wpe", "bert": "position_embeddings"}
"""Where the schemes stand: the name for `modules_to_save`."""

CASES = ["rope", "alibi-trained", "t5", "learned", "concat-learned", "shaw-all"]
TRAINED = [case for case in CASES if case != "rope"]
"""Schemes with parameters of their own."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own call
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # PEFT sets it for GPT-2's Conv1D, and says so
]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def disturb_adapter(model: nn.Module) -> None:
    """Move every trainable parameter: the B matrices of LoRA start at zero, where an adapter does nothing."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def lora(family: str, **kwargs: Any) -> LoraConfig:
    return LoraConfig(r=4, task_type="CAUSAL_LM" if is_causal(family) else None, **kwargs)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("method", [LoraConfig, IA3Config])
def test_default_target_modules_are_those_of_the_family(family: str, method: type) -> None:
    plain = get_peft_model(build(family), method())
    model = get_peft_model(swapped(family, "t5"), method())
    assert model.peft_config["default"].target_modules == plain.peft_config["default"].target_modules != set()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in plain.named_parameters() if parameter.requires_grad} != set()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_inside_a_wrapper_is_swapped_and_restored_and_stays_frozen(family: str) -> None:
    model, ids = build(family), token_ids(2, 12)
    wrapped = get_peft_model(model, lora(family))
    expected, trained = logits(wrapped, ids), [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    with pytest.raises(UnsupportedModelError, match=r"PeftModel\w*\. Give its model\.get_base_model\(\)"):
        pe_swap.swap_positional(wrapped, "alibi")
    pe_swap.swap_positional(wrapped.get_base_model(), "alibi")
    assert not torch.equal(logits(wrapped, ids), expected)
    pe_swap.restore_positional(wrapped.get_base_model())
    assert torch.equal(logits(wrapped, ids), expected)
    assert [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad] == trained
    swapped_first = get_peft_model(pe_swap.swap_positional(build(family), "alibi"), lora(family))
    pe_swap.restore_positional(swapped_first.get_base_model())
    assert [name for name, parameter in swapped_first.named_parameters() if parameter.requires_grad] == trained


def test_a_table_that_was_frozen_alone_stays_so() -> None:
    model = build("gpt2")
    model.transformer.wpe.requires_grad_(False)
    pe_swap.swap_positional(model, "alibi").requires_grad_(False)
    assert not pe_swap.restore_positional(model).transformer.wpe.weight.requires_grad
    pe_swap.swap_positional(model.requires_grad_(True), "alibi")
    model.requires_grad_(False)
    assert not pe_swap.restore_positional(model).transformer.wpe.weight.requires_grad
    model.requires_grad_(False).transformer.wpe.requires_grad_(True)
    pe_swap.swap_positional(model, "alibi").requires_grad_(True)
    assert pe_swap.restore_positional(model).transformer.wpe.weight.requires_grad
    model.transformer.wpe.requires_grad_(False)
    pe_swap.swap_positional(model, "alibi").requires_grad_(False)
    pe_swap.restore_positional(model.requires_grad_(True))
    assert not model.transformer.wpe.weight.requires_grad


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_frozen_positional_weights_beside_an_adapter_are_warned_about(family: str) -> None:
    adapter = get_peft_model(swapped(family, "t5"), lora(family))
    with pytest.warns(UserWarning, match=rf'parameters of t5 are frozen.*modules_to_save=\["{PLACE[family]}"\]'):
        adapter.train()
    told = get_peft_model(swapped(family, "t5"), lora(family, modules_to_save=[PLACE[family]]))
    without_any = get_peft_model(swapped(family, "rope"), lora(family))
    head_alone = swapped(family, "t5")
    head_alone.base_model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.eval()
        for model in (told, without_any, head_alone):
            model.train()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("case", CASES)
def test_merged_is_unmerged(family: str, case: str) -> None:
    model, ids = get_peft_model(swapped(family, case), lora(family)), token_ids(2, 20)
    before = logits(model, ids)
    disturb_adapter(model)
    unmerged = logits(model, ids)
    assert (unmerged - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), unmerged, **ROUNDING)
    assert holder_of(merged) is not None


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_comes_back_on_a_swapped_base(family: str, case: str, tmp_path: Path) -> None:
    base, ids = swapped(family, case), token_ids(2, 20)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(copy.deepcopy(base), lora(family))
    disturb_adapter(model)
    model.save_pretrained(tmp_path / "family")
    on_reloaded = PeftModel.from_pretrained(auto_class(family).from_pretrained(tmp_path / "base"), tmp_path / "family")
    assert torch.equal(logits(on_reloaded, ids), logits(model, ids))
    on_swapped = PeftModel.from_pretrained(base, tmp_path / "family")
    assert torch.equal(logits(on_swapped, ids), logits(model, ids))


def test_an_adapter_alone_names_its_base_and_loads_it(tmp_path: Path) -> None:
    swapped("gpt2", "t5").save_pretrained(tmp_path / "base")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), token_ids(2, 20)
    model = get_peft_model(model, lora("gpt2"))
    disturb_adapter(model)
    model.save_pretrained(tmp_path / "family")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "family"), ids), logits(model, ids))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "family"), ids), logits(model, ids))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("case", TRAINED)
def test_positional_weights_are_trained_saved_and_merged_through_modules_to_save(family: str, case: str, tmp_path: Path) -> None:
    base, ids = swapped(family, case), token_ids(2, 20)
    positional_names = [name for name, _ in positional_parameters(base)]
    before = {name: base.state_dict()[name].clone() for name in positional_names}
    model = get_peft_model(copy.deepcopy(base), lora(family, modules_to_save=[PLACE[family]]))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    ours = {name: parameter for name, parameter in trained.items() if f"{PLACE[family]}.modules_to_save" in name}
    assert len(ours) == len(positional_names)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in ours.values())
    disturb_adapter(model)
    found = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again, ids), found)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), found, **ROUNDING)
    assert all((merged.state_dict()[name] - value).abs().max() > 0 for name, value in before.items())
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(auto_class(family).from_pretrained(tmp_path / "merged"), ids), found, **ROUNDING)


def trainer(model: nn.Module, out: Path) -> Trainer:
    rows = token_ids(8, 40).tolist()
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_steps=1,
        dataloader_pin_memory=False,
    )
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return Trainer(model=model, args=arguments, train_dataset=dataset)


@pytest.mark.parametrize(("family", "case"), [("gpt2", "t5"), ("bert", "shaw-all")])
def test_the_trainer_trains_the_adapter_and_the_positional_weights_and_nothing_else(
    family: str, case: str, tmp_path: Path
) -> None:
    model = get_peft_model(swapped(family, case), lora(family, modules_to_save=[PLACE[family]]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = trainer(model, tmp_path).train()
    assert done.global_step == 1
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(f"{PLACE[family]}.modules_to_save" in name for name in moved)
    assert any("lora_B" in name for name in moved)
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / "adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(swapped(family, case), checkpoint)
    assert torch.equal(logits(again, token_ids(2, 20)), logits(model, token_ids(2, 20)))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_restore_after_merging_puts_the_own_table_back(family: str) -> None:
    plain = build(family)
    model: PreTrainedModel = pe_swap.swap_positional(copy.deepcopy(plain), "t5")
    merged = get_peft_model(model, lora(family)).merge_and_unload()
    pe_swap.restore_positional(merged)
    torch.testing.assert_close(logits(merged, token_ids(2, 20)), logits(plain, token_ids(2, 20)), **ROUNDING)
    table = FAMILIES[family].stacks[0].native.holder_path
    assert torch.equal(merged.base_model.get_submodule(table).weight, plain.base_model.get_submodule(table).weight)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_resized_vocabulary_beside_an_adapter(family: str) -> None:
    model = swapped(family, "rope")
    model.resize_token_embeddings(VOCABULARY + 3)
    model = get_peft_model(model, lora(family))
    ids = torch.full((1, 8), VOCABULARY + 2)
    assert logits(model, ids).shape[-1] == VOCABULARY + 3
