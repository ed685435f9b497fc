"""Relative BERTs of transformers 4, against the logits that transformers 4.57 gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel, PreTrainedModel

import pe_swap
from pe_swap.errors import CheckpointError
from pe_swap.patching.install import holder_of
from pe_swap.saving.relative_key_bert import load_relative_key_bert
from tests.saving.make_relative_key_golden import CASES, CONFIG, GOLDEN, inputs, weight

EXPECTED = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]


def write_checkpoint(folder: Path, case: str, **changes: Any) -> Path:
    """Write a checkpoint as transformers 4.57 did."""
    settings = {**CASES[case], **changes}
    folder.mkdir(parents=True, exist_ok=True)
    architectures = [settings.pop("head")]
    (folder / "config.json").write_text(json.dumps({**CONFIG, **settings, "architectures": architectures}))
    weights = {name: weight(name, shape) for name, shape in EXPECTED[case]["shapes"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(model: PreTrainedModel, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(), **kwargs).logits


def seen(values: Tensor) -> Tensor:
    """Return the logits that do not stand on padding."""
    return values[inputs()["attention_mask"].bool()] if values.dim() == 3 else values


def golden(case: str, like: Tensor) -> Tensor:
    return torch.tensor(EXPECTED[case]["logits"]).reshape(like.shape)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_logits_are_those_of_transformers_4(case: str, backend: str, tmp_path: Path) -> None:
    model = load_relative_key_bert(write_checkpoint(tmp_path, case), attn_implementation=backend)
    assert type(model).__name__ == f"PESwap{CASES[case]['head']}"
    assert not model.training
    found = logits(model)
    torch.testing.assert_close(seen(found), seen(golden(case, found)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["key", "key_query"])
def test_transformers_5_alone_reads_them_as_something_else(case: str, tmp_path: Path) -> None:
    """What this module is for; should transformers learn to read them, it can go."""
    found = logits(BertForMaskedLM.from_pretrained(write_checkpoint(tmp_path, case)).eval())
    assert (seen(found) - seen(golden(case, found))).abs().max() > 0.1


def test_it_saves_and_loads_and_swaps_as_any_other(tmp_path: Path) -> None:
    model = load_relative_key_bert(write_checkpoint(tmp_path / "old", "key_query"))
    model.save_pretrained(tmp_path / "new")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(again), logits(model))
    assert "position_embedding_type" not in json.loads((tmp_path / "new" / "config.json").read_text())
    scheme = holder_of(again).scheme_at(0)
    assert (scheme.options.max_distance, scheme.options.variant) == (15, "key_query")
    long = torch.ones(1, 40, dtype=torch.long)
    with torch.no_grad():
        assert again(long).logits.isfinite().all()
        assert pe_swap.swap_positional(again, "rope")(long).logits.isfinite().all()
    assert pe_swap.check_positional(load_relative_key_bert(tmp_path / "old")).passed


def test_another_head_and_the_arguments_of_from_pretrained(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "key")
    base = load_relative_key_bert(tmp_path, BertModel, dtype=torch.bfloat16, add_pooling_layer=False)
    assert type(base).__name__ == "PESwapBertModel"
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}
    whole = load_relative_key_bert(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(base(**inputs()).last_hidden_state, whole.bert(**inputs()).last_hidden_state)


def test_a_head_of_no_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "key", head="BertForMaskedLn")
    with pytest.raises(CheckpointError, match=r"names 'BertForMaskedLn'.*Did you mean 'BertForMaskedLM'\? Give one as head"):
        load_relative_key_bert(tmp_path)
    assert isinstance(load_relative_key_bert(tmp_path, BertForMaskedLM), BertForMaskedLM)


@pytest.mark.parametrize("changes", [{"position_embedding_type": "absolute"}, {"model_type": "roberta"}])
def test_what_is_no_relative_bert(changes: dict[str, str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "key", **changes)
    with pytest.raises(
        CheckpointError, match=r"it must be a 'bert' with 'relative_key' or 'relative_key_query'\. Load it with an Auto"
    ):
        load_relative_key_bert(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("max_position_embeddings", "16"), ("num_hidden_layers", 0)])
def test_sizes_that_are_no_sizes(field: str, value: object, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "key")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(CheckpointError, match=rf"has the {field} {value!r} in its config\.json; it must be a positive integer"):
        load_relative_key_bert(folder)


def test_what_is_not_taken_or_not_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "key")
    with pytest.raises(CheckpointError, match=r"does not take 'output_loading_info' \(given: bool\): weights.*Leave it out\."):
        load_relative_key_bert(tmp_path, output_loading_info=True)
    with pytest.raises(
        CheckpointError, match=r"does not take 'config' \(given: BertConfig\): the configuration is the checkpoint's"
    ):
        load_relative_key_bert(tmp_path, config=BertConfig())
    missing = tmp_path / "nowhere"
    with pytest.raises(
        CheckpointError, match=r"nowhere' has no config\.json that can be read; it must be a folder.*Correct the path"
    ):
        load_relative_key_bert(missing)


def test_a_subfolder_has_its_own_configuration(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "key")
    write_checkpoint(tmp_path / "inner", "key_query")
    model = load_relative_key_bert(tmp_path, subfolder="inner")
    assert model.config.pe_swap["schemes"][0]["options"]["variant"] == "key_query"
    expected = load_relative_key_bert(tmp_path / "inner")
    assert torch.equal(logits(model), logits(expected))


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "key")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.attention.self.distance_embedding.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not fit .*schemes\.0\.key_tables\.1\)"):
        load_relative_key_bert(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "key")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"Pickled weights are not read.*safe_serialization=True"):
        load_relative_key_bert(tmp_path)


def test_a_base_checkpoint_without_a_head(tmp_path: Path) -> None:
    """Weights saved from `BertModel` have no prefix."""
    write_checkpoint(tmp_path / "old", "key", head="BertModel")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    bare = {name.removeprefix("bert."): value for name, value in weights.items() if name.startswith("bert.")}
    save_file(bare, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    base = load_relative_key_bert(tmp_path / "old", add_pooling_layer=False)
    whole = load_relative_key_bert(write_checkpoint(tmp_path / "whole", "key"))
    with torch.no_grad():
        assert torch.equal(base(**inputs()).last_hidden_state, whole.bert(**inputs()).last_hidden_state)
    base.save_pretrained(tmp_path / "new")
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path / "new", add_pooling_layer=False)
        .embeddings.position_embeddings.schemes[0]
        .key_tables["0"],
        base.embeddings.position_embeddings.schemes[0].key_tables["0"],
    )
