"""What tools do with a swapped model's configuration and folder: read the unswapped one, build anew, cut layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config, PreTrainedModel

import pe_swap
from pe_swap.errors import CheckpointError, SwapStateError
from pe_swap.patching.wrappers import acting_holders, inner_model
from tests.support.models import build, swapped, token_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own call
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # PEFT sets it for GPT-2's Conv1D, and says so
]

FAMILIES = {"gpt2": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}
LAYERS = {"gpt2": "h", "bert": "encoder.layer"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(token_ids(2, 12)).logits
    return found


# --- the folder that a model was swapped from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_swapped_configuration_class_reads_the_unswapped_folder(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = build(family)
    plain.save_pretrained(tmp_path)
    swapped_class = type(swapped(family, "rope").config)
    found = swapped_class.from_pretrained(tmp_path)
    assert type(found) is type(plain.config)
    assert found.max_position_embeddings == plain.config.max_position_embeddings
    assert "to instantiate a model of type" not in caplog.text
    assert type(swapped_class.from_dict(plain.config.to_dict())) is type(plain.config)


@pytest.mark.parametrize("modules_to_save", [None, ["wpe"]])
def test_an_adapter_on_a_model_swapped_after_loading(modules_to_save: list[str] | None, tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "plain")

    def base() -> PreTrainedModel:
        return pe_swap.swap_positional(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), "t5")

    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", modules_to_save=modules_to_save))
    ids = token_ids(2, 12)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert not torch.equal(expected, logits(base()))
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "adapter")), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=2e-5, rtol=1e-4)
    # The adapter does not name the folder of the unswapped model, on which it would run and be wrong.
    with pytest.raises(OSError):  # noqa: PT011  # transformers' own, for a name that is none
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_the_name_of_the_folder_comes_back_with_the_positions(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    pe_swap.swap_positional(model, "t5")
    assert (model.name_or_path, model.config.name_or_path) == ("", str(tmp_path))
    assert pe_swap.restore_positional(model).name_or_path == str(tmp_path)


def test_the_check_looks_into_wrappers() -> None:
    base = swapped("gpt2", "kerple")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["wpe"]))
    for wrapper in (model, torch.nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert inner_model(wrapper) is base
    report = pe_swap.check_positional(model)
    assert report.passed, str(report)
    # What acts is the copy that PEFT trains, so its schemes are those to call.
    assert acting_holders(base) == [model.base_model.model.transformer.wpe.modules_to_save["default"]]


def test_no_model_inside_is_left_as_it_is() -> None:
    for other in (torch.nn.DataParallel(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2), "gpt2"):
        assert inner_model(other) is other


# --- built again from a configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["alibi", "learned", "sinusoidal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_own_class_is_not_built_from_a_swapped_configuration(family: str, scheme: str, tmp_path: Path) -> None:
    model = swapped(family, scheme)
    for own in (type(model), type(model.base_model)):
        with pytest.raises(SwapStateError, match=own.__name__):
            own(model.config)
        with pytest.raises(SwapStateError, match=own.__name__):
            own._from_config(model.config)
    model.save_pretrained(tmp_path)
    with pytest.raises(SwapStateError, match=type(model).__name__):
        type(model).from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path))
    again = FAMILIES[family].from_config(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(SwapStateError, match=type(model).__name__):  # also after a swapped class was built
        type(model)(again.config)


# --- layers taken out ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_lost_a_layer_after_the_swap_is_not_saved(family: str, tmp_path: Path) -> None:
    model = swapped(family, "alibi")
    del model.base_model.get_submodule(LAYERS[family])[1]
    model.config.num_hidden_layers -= 1
    for refused in (lambda: model.save_pretrained(tmp_path), lambda: pe_swap.swap_positional(model, "rope", layers=[0])):
        with pytest.raises(SwapStateError, match="2 layers and has 1"):
            refused()
    assert not (tmp_path / "config.json").exists()
    model.set_attn_implementation("eager")
    assert torch.isfinite(logits(model)).all()
    pe_swap.swap_positional(model, "rope")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(FAMILIES[family].from_pretrained(tmp_path, attn_implementation="eager")), logits(model))
    assert len(pe_swap.restore_positional(model).base_model.get_submodule(LAYERS[family])) == 1


@pytest.mark.parametrize("name", ["n_layer", "num_hidden_layers"])
def test_another_number_of_layers_is_refused_as_an_argument(name: str, tmp_path: Path) -> None:
    swapped("gpt2", "t5").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"argument {name}=1"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **{name: 1})


def test_the_length_field_of_a_scheme_without_limit_is_no_training_length() -> None:
    model = pe_swap.swap_positional(build("gpt2"), "alibi")
    assert model.config.n_positions == 2**20
    assert model.config.pe_swap["trained_length"] == GPT2Config.from_dict(build("gpt2").config.to_dict()).n_positions
