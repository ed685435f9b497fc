"""Models by name: what a model is decides how it is measured; one that would be measured on random weights is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertModel,
    GPT2Model,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForMaskedLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

import pe_swap
from pe_swap.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from pe_swap.runs.models import SPLITS_WEIGHTS, device_of_process, is_causal, load_model, require_vocabulary, start_model
from tests.support.models import build
from tests.support.words import numbered_tokenizer, word_tokenizer

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}
ROBERTA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_encoder_decoder_is_refused(family: str, tmp_path: Path) -> None:
    name = saved(build(family), tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"'{family}' is an encoder with a decoder, .* swap_positional\(model"):
        load_model(name)


def test_an_adapter_without_its_base_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter of PEFT and no model\. Merge it"):
        load_model(str(tmp_path))


def test_an_encoder_without_its_head_is_refused(tmp_path: Path) -> None:
    name = saved(BertModel(build("bert").config), tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weights for cls\.predictions\..*Name a checkpoint .* language model head"):
        load_model(name)


def test_a_decoder_whose_head_is_its_token_table_needs_no_weights_for_it(tmp_path: Path) -> None:
    assert is_causal(load_model(saved(GPT2Model(build("gpt2").config), tmp_path)))


def test_positions_that_transformers_no_longer_reads_are_refused(tmp_path: Path) -> None:
    name = saved(build("bert"), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "position_embedding_type": "relative_key"}))
    with pytest.raises(UnsupportedModelError, match=r"position_embedding_type 'relative_key'.*load_relative_key_bert"):
        load_model(name)
    with pytest.raises(UnsupportedModelError, match="load_relative_key_bert"):
        pe_swap.swap_positional(BertForMaskedLM.from_pretrained(name), "rope")
    (tmp_path / "config.json").write_text(json.dumps({**content, "position_embedding_type": "absolute"}))
    assert not is_causal(load_model(name))


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_model_is_what_its_configuration_makes_it(is_decoder: bool, tmp_path: Path) -> None:
    config = RobertaConfig(**ROBERTA, is_decoder=is_decoder)
    head = RobertaForCausalLM if is_decoder else RobertaForMaskedLM
    model = load_model(saved(head(config), tmp_path))
    assert (type(model), is_causal(model)) == (head, is_decoder)
    assert is_causal(RobertaForCausalLM(config)) is is_decoder


def test_a_model_that_looks_ahead_is_not_measured_as_a_causal_one(tmp_path: Path) -> None:
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=16, initializer_range=1.0))
    with pytest.raises(UnsupportedModelError, match="its outputs follow later tokens"):
        load_model(saved(model, tmp_path))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("n_positons", r"no field 'n_positons'\. Did you mean 'n_positions'\?"),
        ("position_embedding_type", "no field 'position_embedding_type'"),
    ],
)
def test_a_field_that_a_model_has_not_is_refused(field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start_model({**GPT2, field: 32}, numbered_tokenizer())


def test_a_model_type_that_transformers_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no model_type 'gtp2'\. Did you mean 'gpt2'\?"):
        start_model({**GPT2, "model_type": "gtp2"}, numbered_tokenizer())


def test_fields_by_their_other_name_and_of_a_saved_configuration_are_taken(tmp_path: Path) -> None:
    assert start_model({**GPT2, "max_position_embeddings": 8}, numbered_tokenizer()).config.n_positions == 8
    saved_by_transformers = tmp_path / "config.json"
    saved_by_transformers.write_text(json.dumps({**GPT2, "n_ctx": 16, "transformers_version": "4.0.0"}))
    assert start_model(str(saved_by_transformers), numbered_tokenizer()).config.n_positions == 16


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    words = word_tokenizer("gpt2")
    require_vocabulary(build("gpt2", vocab_size=len(words)), words)
    with pytest.raises(DataError, match=rf"The tokenizer has {len(words)} tokens, but the model has rows for {len(words) - 1}"):
        require_vocabulary(build("gpt2", vocab_size=len(words) - 1), words)


@pytest.mark.parametrize(
    ("has_gpu", "variables", "expected"),
    [
        (False, {}, "cpu"),
        (True, {}, "cuda:0"),
        (True, {"LOCAL_RANK": "1"}, "cuda:1"),
        (True, {"LOCAL_RANK": "3"}, "cuda:1"),  # a launcher may show a process some of the GPUs
        (True, {"LOCAL_RANK": "1", "ACCELERATE_USE_FSDP": "true"}, "cpu"),
        (True, {"ACCELERATE_USE_DEEPSPEED": "true"}, "cpu"),
        (True, {"LOCAL_RANK": "1", "ACCELERATE_USE_CPU": "true"}, "cpu"),
    ],
)
def test_the_device_of_a_process(
    has_gpu: bool, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "ACCELERATE_USE_CPU", *SPLITS_WEIGHTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(device_of_process()) == expected
