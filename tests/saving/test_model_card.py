"""The model card: what a saved folder says of its positions, and what it leaves alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from transformers import AutoModelForCausalLM

import pe_swap
from pe_swap.errors import CheckpointError
from pe_swap.saving.model_card import BEGIN, END, record_evaluation, record_fine_tuning
from tests.support.covering import covering_pairs
from tests.support.families import auto_class
from tests.support.models import CASES, build, swapped, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("case", "family"), [*((case, "gpt2") for case in CASES), *covering_pairs(["bert", "bert-decoder"])])
def test_the_card_states_scheme_options_and_lengths(case: str, family: str, tmp_path: Path) -> None:
    model = swapped(family, case)
    model.save_pretrained(tmp_path)
    text = text_of(tmp_path)
    (scheme,) = model.config.pe_swap["schemes"]
    assert f"| {CASES[case][0]} | " in text
    assert all(f"`{name}={value!r}`" in text for name, value in scheme["options"].items())
    assert "- Trained length before the swap: 32 positions." in text
    limit = model.config.pe_swap["max_length"]
    assert f"- Longest input: {'no limit of the scheme' if limit is None else f'{limit} positions'}." in text
    assert "- Evaluated lengths: none recorded." in text
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["pe_swap"]


def test_the_lines_of_code_on_the_card_load_the_model(tmp_path: Path) -> None:
    for family in ("gpt2", "bert"):
        model, ids = swapped(family, "t5"), token_ids(1, 12)
        model.save_pretrained(tmp_path / family)
        (code,) = re.findall(r"```python\n(.*?)```", text_of(tmp_path / family), re.DOTALL)
        assert f"import {auto_class(family).__name__}" in code
        names: dict[str, object] = {}
        exec(code.replace("path/or/name", str(tmp_path / family)), names)
        with torch.no_grad():
            assert torch.equal(names["model"](ids).logits, model(ids).logits)  # type: ignore[operator]


def test_layers_of_different_schemes(tmp_path: Path) -> None:
    model = pe_swap.swap_positional(build("gpt2"), "sinusoidal")
    pe_swap.swap_positional(model, "rope", layers=[1], base=777.0)
    model.save_pretrained(tmp_path)
    text = text_of(tmp_path)
    assert re.search(r"\| sinusoidal \| .* \| layers 0, and the input \|", text)
    assert re.search(r"\| rope \| `base=777\.0`, .* \| layers 1 \|", text)


def test_a_card_that_is_there_keeps_all_that_is_not_ours(tmp_path: Path) -> None:
    before = "---\nlicense: mit\ntags:\n- poetry\nlibrary_name: peft\n---\n\n# My model\n\nIt writes poems.\n"
    (tmp_path / "README.md").write_text(before, encoding="utf-8")
    model = swapped("gpt2", "rope")
    model.save_pretrained(tmp_path)
    first = text_of(tmp_path)
    assert "# My model\n\nIt writes poems.\n" in first
    card = ModelCard(first)
    assert (card.data.license, card.data.library_name, card.data.tags) == ("mit", "peft", ["pe_swap", "poetry"])
    (tmp_path / "README.md").write_text(first + "\nA word after it.\n", encoding="utf-8")
    pe_swap.swap_positional(model, "alibi").save_pretrained(tmp_path)
    second = text_of(tmp_path)
    assert second.count(BEGIN) == second.count(END) == 1
    assert "It writes poems." in second
    assert "A word after it." in second
    assert "| alibi |" in second
    assert "| rope |" not in second
    model.save_pretrained(tmp_path)
    assert text_of(tmp_path) == second


def test_a_file_that_is_no_card_is_left_alone_with_a_warning_and_the_model_is_saved(tmp_path: Path) -> None:
    broken = "---\nlicense: [mit\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(broken, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"README\.md' cannot be read as a model card .*left as it is.*Correct the YAML"):
        swapped("gpt2", "rope").save_pretrained(tmp_path)
    assert text_of(tmp_path) == broken
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.pe_swap["schemes"][0]["name"] == "rope"


def test_measured_lengths_are_recorded_and_dropped_with_the_weights_they_belong_to(tmp_path: Path) -> None:
    model = swapped("gpt2", "rope")
    model.save_pretrained(tmp_path)
    record_evaluation(tmp_path, {4096: 31.25, 512: 24.0})
    assert re.search(r"\| 512 \| 24 \|\n\| 4,096 \| 31\.25 \|", text_of(tmp_path))
    assert "none recorded" not in text_of(tmp_path)
    record_evaluation(tmp_path, {512: 23.0})
    assert "24" not in text_of(tmp_path).split("Evaluated lengths")[1]
    model.save_pretrained(tmp_path)
    assert "- Evaluated lengths: none recorded." in text_of(tmp_path)


def test_a_folder_that_holds_no_swapped_model(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            CheckpointError, match=r"is not the configuration of a swapped model .*Name a folder that save_pretrained wrote"
        ):
            record_evaluation(folder, {512: 24.0})


def test_the_length_of_fine_tuning_stays_beside_what_is_measured(tmp_path: Path) -> None:
    model = swapped("gpt2", "rope")
    model.save_pretrained(tmp_path)
    record_fine_tuning(tmp_path, 2048)
    lengths = "- Trained length before the swap: 32 positions.\n- Fine-tuned after the swap at: 2,048 tokens.\n"
    assert lengths in text_of(tmp_path)
    record_evaluation(tmp_path, {4096: 31.25}, measured_on="sliding, 99 tokens scored.")
    assert lengths in text_of(tmp_path)
    assert "- Evaluated lengths: sliding, 99 tokens scored.\n\n| evaluated length" in text_of(tmp_path)
    assert "| 4,096 | 31.25 |" in text_of(tmp_path)
    model.save_pretrained(tmp_path)
    assert "Fine-tuned" not in text_of(tmp_path)


def test_measured_perplexities_are_in_the_model_index_beside_those_of_others(tmp_path: Path) -> None:
    model = swapped("gpt2", "rope")
    model.save_pretrained(tmp_path)
    assert ModelCard(text_of(tmp_path)).data.eval_results is None
    theirs = EvalResult("text-generation", "wiki", "Wiki", "perplexity", 9.5)
    card = ModelCard(text_of(tmp_path))
    card.data.eval_results, card.data.model_name = [theirs], "mine"
    card.save(tmp_path / "README.md")
    dataset = {"type": "sotu", "name": "Messages"}
    record_evaluation(tmp_path, {64: 30.0}, dataset=dataset)
    record_evaluation(tmp_path, {512: 24.0, 64: 31.25}, measured_on="sliding", dataset=dataset)
    found = ModelCard(text_of(tmp_path)).data
    assert found.model_name == "mine"
    assert [(one.dataset_name, one.metric_name, one.metric_value) for one in found.eval_results] == [
        ("Wiki", None, 9.5),
        ("Messages", "Perplexity at 64 tokens", 31.25),
        ("Messages", "Perplexity at 512 tokens", 24.0),
    ]
    model.save_pretrained(tmp_path)  # other weights, perhaps: what we measured is dropped
    assert [one.dataset_name for one in ModelCard(text_of(tmp_path)).data.eval_results] == ["Wiki"]
