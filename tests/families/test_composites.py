"""Models made of whole models: a part is swapped, and the whole saves, reloads, refuses and comes back like any other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

import pe_swap
from pe_swap.commands.evaluate import evaluate
from pe_swap.errors import CheckpointError, SwapStateError, UnsupportedModelError
from pe_swap.families import COMPOSITES, FAMILIES
from pe_swap.runs.config import DataSection, EvalConfig
from pe_swap.runs.models import load_model
from pe_swap.saving import class_names
from pe_swap.saving.auto_classes import CLASS_PREFIX
from tests.support.composites import IMAGE_TOKEN, config_of_composite, tiny_composite
from tests.support.families import images, token_ids

SCHEMES = {"modernvbert": "alibi", "clip": "rope", "siglip": "rope", "gemma3": "hope", "paligemma": "hope"}
"""The scheme that takes the place of a part's own; where it is left out, alibi."""

OWN = {"clip": "learned", "siglip": "learned", "encoder-decoder": "learned", "vision-encoder-decoder": "learned"}
"""The scheme that changes nothing; where it is left out, rope."""

HEADS = {"clip": "CLIPForImageClassification", "siglip": "SiglipForImageClassification"}

needs_later_families = pytest.mark.skipif(
    "clip_vision_model" not in FAMILIES,
    reason="this transformers is older than the families of images, whose files it has otherwise",
)


def built(name: str) -> PreTrainedModel:
    """Return a tiny model of a composite."""
    return tiny_composite(name, HEADS.get(name, ""))


def result(model: PreTrainedModel, length: int = 24, **kwargs: Any) -> Tensor:
    """Return the logits of rows of tokens, of images, or of both."""
    name = model.config.model_type.removeprefix("pe_swap_")
    ids = token_ids(2, length)
    given: dict[str, Any] = {"input_ids": ids}
    if name in HEADS:
        given = {"pixel_values": images(2, 32, 32)}
    elif name == "vision-encoder-decoder":
        given = {"pixel_values": images(2), "decoder_input_ids": ids}
    elif name == "encoder-decoder":
        given = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    with torch.no_grad():
        found: Tensor = model(**given, **kwargs).logits
    return found


def with_image(model: PreTrainedModel, **kwargs: Any) -> Tensor:
    """Return the logits of a LLaVA that is handed rows with an image in them."""
    ids = token_ids(2, 24)
    ids[:, 3:19] = IMAGE_TOKEN
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, pixel_values=images(2, 32, 32), **kwargs).logits
    return found


def loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the model saved and loaded again, by the class that its configuration names."""
    model.save_pretrained(folder)
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(class_names, name).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", COMPOSITES.names())
def test_a_composite_keeps_the_contract(name: str, tmp_path: Path) -> None:
    """Its own scheme changes nothing; another is saved and reloaded; its own class refuses the folder; a restore brings all back."""
    model = built(name)
    model.save_pretrained(tmp_path / "before")  # which writes the class and the dtype into the configuration
    fresh, before, said = copy.deepcopy(model), result(model), model.config.to_dict()
    assert torch.equal(result(pe_swap.swap_positional(model, OWN.get(name, "rope"))), before)
    assert result(pe_swap.swap_positional(model, SCHEMES.get(name, "alibi"))).sub(before).abs().max() > 1e-3
    swapped = result(model)
    assert torch.equal(result(copy.deepcopy(model)), swapped)
    again = loaded(model, tmp_path)
    assert type(again).__name__ == CLASS_PREFIX + type(model).__name__
    assert torch.equal(result(again), swapped)
    assert torch.equal(result(loaded(again, tmp_path / "twice")), swapped)
    with pytest.raises(Exception, match="pip install pe-swap"):
        type(model).from_pretrained(tmp_path)
    pe_swap.restore_positional(model)
    assert torch.equal(result(model), before)
    assert type(model.config) is COMPOSITES[name].config_class
    changed = {key for key, value in model.config.to_dict().items() if value != said[key]}
    assert changed <= {field.field for field in COMPOSITES[name].parts}  # transformers writes the attention's name into a part's
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_composite_whose_part_is_one_of_transformers_own_is_saved_as_its_own(tmp_path: Path) -> None:
    model = built("llava")
    pe_swap.swap_positional(model, "rope", rope_type="yarn", factor=4.0)
    swapped = with_image(model)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert type(plain.config) is COMPOSITES["llava"].config_class
    assert plain.config.text_config.rope_parameters["rope_type"] == "yarn"
    assert torch.equal(with_image(plain), swapped)
    assert "pe_swap is not needed" in (tmp_path / "README.md").read_text()


@needs_later_families
def test_the_parts_of_a_composite_are_swapped_one_by_one(tmp_path: Path) -> None:
    """The image encoder, then the text model; saved where one part is plain and the other is not; restored one by one."""
    model = built("llava")
    before = with_image(model)
    pe_swap.swap_positional(model, "learned", part="vision")
    assert torch.equal(with_image(model), before)
    pe_swap.swap_positional(model, "rope", part="vision", base=50.0)
    of_image = with_image(model)
    assert (of_image - before).abs().max() > 1e-3
    pe_swap.swap_positional(model, "rope", rope_type="linear", factor=2.0)  # the text model, by default; plain by itself
    of_both = with_image(model)
    again = loaded(model, tmp_path)
    assert torch.equal(with_image(again), of_both)
    assert again.config.pe_swap["parts"] == ["vision"]
    pe_swap.swap_positional(model, "t5")
    assert model.config.pe_swap["parts"] == ["text", "vision"]
    assert "every layer of the text" in loaded_card(model, tmp_path / "card")
    pe_swap.restore_positional(model, part="text")
    assert torch.equal(with_image(model), of_image)
    assert model.config.pe_swap["parts"] == ["vision"]
    pe_swap.restore_positional(model)
    assert torch.equal(with_image(model), before)


def loaded_card(model: PreTrainedModel, folder: Path) -> str:
    """Return the model card of the saved model."""
    model.save_pretrained(folder)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_swapped_composite_generates_as_it_does_without_a_cache(backend: str, tmp_path: Path) -> None:
    model = built("llava")
    pe_swap.swap_positional(model, "alibi")
    swapped = with_image(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=backend).eval()
    assert (with_image(again) - swapped).abs().max() < 1e-4
    ids = token_ids(2, 24)
    ids[:, 3:19] = IMAGE_TOKEN
    given = {"input_ids": ids, "pixel_values": images(2, 32, 32), "attention_mask": torch.ones_like(ids), "max_new_tokens": 12}
    wanted = again.generate(**given, do_sample=False, use_cache=False)
    assert torch.equal(again.generate(**given, do_sample=False), wanted)


def test_a_base_model_is_taken_out_of_a_composite_with_a_head(tmp_path: Path) -> None:
    model = pe_swap.swap_positional(built("llava"), "t5")
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    ids = token_ids(2, 24)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).last_hidden_state, model.model(input_ids=ids).last_hidden_state)


def test_a_composite_built_from_its_configuration_ties_what_the_model_does() -> None:
    config = config_of_composite("llava")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = pe_swap.swap_positional(AutoModelForImageTextToText.from_config(config), "t5")
    fresh = AutoModelForImageTextToText.from_config(model.config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert fresh.lm_head.weight is fresh.get_input_embeddings().weight


@needs_later_families
def test_an_image_classifier_is_taken_out_of_a_clip_whose_texts_keep_their_table(tmp_path: Path) -> None:
    model = pe_swap.swap_positional(tiny_composite("clip", "CLIPModel"), "alibi")
    model.save_pretrained(tmp_path)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found, expected = (of.vision_model(images(2, 32, 32)).last_hidden_state for of in (classifier, model))
    assert torch.equal(found, expected)


@needs_later_families
def test_an_encoder_decoder_is_swapped_as_a_whole_and_by_parts(tmp_path: Path) -> None:
    model = built("encoder-decoder")
    before = result(model)
    pe_swap.swap_positional(model, "alibi")
    assert model.config.pe_swap["parts"] == ["decoder", "encoder"]
    pe_swap.swap_positional(model, "rope", part="decoder")
    assert model.encoder.config.pe_swap["schemes"][0]["name"] == "alibi"
    swapped = result(model, 40)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert again.config.decoder is again.decoder.config
    assert torch.equal(result(again, 40), swapped)
    report = pe_swap.check_positional(model)
    assert report.passed, str(report)
    assert {check.part for check in report.checks} == {"encoder", "decoder"}
    assert str(report).startswith("EncoderDecoderModel with alibi (encoder), rope (decoder), sdpa: all claims hold")
    assert pe_swap.check_positional(model.encoder).passed
    assert torch.equal(result(pe_swap.restore_positional(model)), before)


@needs_later_families
def test_image_classifiers_come_back_by_their_auto_class(tmp_path: Path) -> None:
    for name in HEADS:
        model = pe_swap.swap_positional(built(name), "rope")
        assert pe_swap.check_positional(model).passed
        swapped = result(model)
        model.save_pretrained(tmp_path / name)
        again = AutoModelForImageClassification.from_pretrained(tmp_path / name).eval()
        assert type(again).__name__ == CLASS_PREFIX + HEADS[name]
        assert torch.equal(result(again), swapped)


@needs_later_families
def test_a_swap_that_fails_in_one_part_changes_none() -> None:
    model = built("encoder-decoder")
    before, config = result(model), model.config
    with pytest.raises(UnsupportedModelError, match="fox"):
        pe_swap.swap_positional(model, "fox")  # the decoder takes it, the encoder does not
    assert model.config is config
    assert not hasattr(model.decoder.config, "pe_swap")
    assert torch.equal(result(model), before)


@needs_later_families
def test_a_bias_is_refused_where_an_images_tokens_look_both_ways() -> None:
    for name in ("gemma3", "paligemma"):
        model = built(name)
        for scheme in ("alibi", "t5", "xpos"):
            with pytest.raises(UnsupportedModelError, match=f"'{scheme}'.*tokens of an image attend to later ones"):
                pe_swap.swap_positional(model, scheme)
        assert not hasattr(model.config, "pe_swap")


@needs_later_families
def test_rope_in_gemma_3_is_its_own_class_with_another_base_also_between_the_tokens_of_an_image() -> None:
    model = built("gemma3")
    ids = token_ids(2, 24)
    types = torch.zeros_like(ids)
    types[:, 3:9] = 1

    def both_ways(model: PreTrainedModel, types: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=ids, token_type_ids=types).logits
        return found

    assert (both_ways(model, types) - both_ways(model, types * 0)).abs().max() > 1e-3
    expected = copy.deepcopy(model)
    parameters = expected.config.text_config.rope_parameters
    for kind in parameters.values():
        kind["rope_theta"] = 500.0
    expected = type(model)(expected.config).eval()
    expected.load_state_dict(model.state_dict())
    pe_swap.swap_positional(model, "rope", base=500.0)
    assert torch.equal(both_ways(model, types), both_ways(expected, types))


@needs_later_families
def test_bad_parts_are_refused() -> None:
    model = built("llava")
    with pytest.raises(UnsupportedModelError, match=r"part is 'audio', and the parts .* are 'text' and 'vision'"):
        pe_swap.swap_positional(model, "rope", part="audio")
    with pytest.raises(UnsupportedModelError, match=r"No family 'pixtral' .* the vision part"):
        pe_swap.swap_positional(built("mistral3"), "rope", part="vision")
    with pytest.raises(UnsupportedModelError, match="fox"):
        pe_swap.swap_positional(model, "fox", part="vision")
    with pytest.raises(SwapStateError, match="LlavaForConditionalGeneration is not swapped"):
        pe_swap.check_positional(model)
    assert not hasattr(model.config, "pe_swap")


@pytest.mark.parametrize("parts", [None, [], ["audio"], "text", ["text", "vision"]])
def test_a_file_that_says_nothing_of_its_parts_is_refused(parts: object, tmp_path: Path) -> None:
    model = built("llava")
    pe_swap.swap_positional(model, "alibi").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["pe_swap"]["parts"] = parts
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config\.json.*Save the model again"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_missing_positional_weight_of_a_part_is_refused(tmp_path: Path) -> None:
    model = built("llava")
    pe_swap.swap_positional(model, "t5").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    left_out = [name for name in weights if "rotary_emb" in name]
    assert left_out
    save_file(
        {name: value for name, value in weights.items() if name not in left_out}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="positional weights do not fit"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_scripts_take_a_language_model_by_itself(tmp_path: Path) -> None:
    built("llava").save_pretrained(tmp_path / "llava")
    with pytest.raises(UnsupportedModelError, match="A model of type 'llava' is made of several models"):
        load_model(str(tmp_path / "llava"))
    config = EvalConfig(models=[str(tmp_path / "llava")], lengths=[8], data=DataSection(sotu=True), out=str(tmp_path / "out"))
    with pytest.raises(UnsupportedModelError, match="A model of type 'llava' is made of several models"):
        evaluate(config)
    assert not (tmp_path / "out").exists()
