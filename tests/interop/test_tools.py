"""transformers' own tools on swapped models: Trainer, pipelines, generation; and lm-evaluation-harness."""

from __future__ import annotations

import copy
import json
import logging
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    ContinuousBatchingManager,
    GenerationConfig,
    PreTrainedModel,
    pipeline,
)

import pe_swap
from pe_swap.patching.install import positional_parameters
from tests.support import training_run
from tests.support.models import TRAINED_LENGTH, VOCABULARY, build, checkpoint_activations, swapped, token_ids
from tests.support.processes import ROOT, environment
from tests.support.words import WORDS, word_tokenizer

LONG = 3 * TRAINED_LENGTH
"""Tokens: well beyond the trained length."""

CASES = ["rope", "alibi", "t5", "shaw-all", "concat"]


def saved(family: str, case: str, folder: Path) -> PreTrainedModel:
    """Save a swapped model with its tokenizer, and return it."""
    model = swapped(family, case)
    model.save_pretrained(folder)
    word_tokenizer(family).save_pretrained(folder)
    return model


def text_of(ids: Tensor) -> str:
    return " ".join(WORDS[index - 5] for index in ids.tolist())


# --- Trainer -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["t5"])
def test_a_killed_training_resumes_with_the_same_losses_bit_for_bit(case: str, tmp_path: Path) -> None:
    swapped("gpt2", case).save_pretrained(tmp_path / "model")
    whole, weights = training_run.train(tmp_path / "model", tmp_path / "whole")
    assert len(set(whole)) == training_run.STEPS

    kill_at = training_run.SAVE_AT + 1
    script = [sys.executable, "-m", "tests.support.training_run", str(tmp_path / "model"), str(tmp_path / "killed"), str(kill_at)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=120, env=environment(), cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == [f"checkpoint-{training_run.SAVE_AT}"]

    rest, resumed = training_run.train(tmp_path / "model", tmp_path / "killed", resume=True)
    assert rest == whole[training_run.SAVE_AT :]
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "killed" / f"checkpoint-{training_run.STEPS}")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_loaded_model_checkpoints_its_activations_both_ways(case: str, use_reentrant: bool, tmp_path: Path) -> None:
    swapped("gpt2", case).save_pretrained(tmp_path)
    ids, found = token_ids(2, 40), []
    for checkpointed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert {name for name, _ in positional_parameters(model)} <= found[0].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


# --- pipelines -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """Collect what transformers says at the level of warnings and above."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger("transformers").addHandler(listener)
    yield said
    logging.getLogger("transformers").removeHandler(listener)


@pytest.mark.parametrize("case", CASES)
def test_the_text_generation_pipeline_goes_beyond_the_trained_length(case: str, tmp_path: Path, complaints: list[str]) -> None:
    model = saved("gpt2", case, tmp_path)
    ids = token_ids(1, 25)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    settings = {"do_sample": False, "max_new_tokens": LONG - 25, "min_new_tokens": LONG - 25}
    found = generate(text_of(ids[0]), return_full_text=False, **settings)[0]["generated_text"]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=2, **settings)[0, 25:]
    assert found.split() == word_tokenizer("gpt2").decode(expected, skip_special_tokens=True).split()
    assert len(expected) == LONG - 25
    assert [text for text in complaints if "not supported" in text or "maximum length" in text] == []


@pytest.mark.parametrize("case", CASES)
def test_the_fill_mask_pipeline_goes_beyond_the_trained_length(case: str, tmp_path: Path, complaints: list[str]) -> None:
    model = saved("bert", case, tmp_path)
    ids = token_ids(1, LONG)
    text = text_of(ids[0, :40]) + " [MASK] " + text_of(ids[0, 40:])
    fill = pipeline("fill-mask", model=str(tmp_path), device="cpu")
    found = fill(text, top_k=3)
    tokens = torch.tensor([word_tokenizer("bert")(text)["input_ids"]])
    assert tokens.shape == (1, LONG + 3)
    with torch.no_grad():
        probabilities = model(tokens).logits[0, 41].softmax(-1)
    assert [entry["token"] for entry in found] == probabilities.topk(3).indices.tolist()
    assert [entry["score"] for entry in found] == pytest.approx(probabilities.topk(3).values.tolist(), rel=1e-5)
    assert [entry for entry in complaints if "not supported" in entry] == []


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_tokenizer_of_a_saved_folder_is_found(family: str, tmp_path: Path) -> None:
    saved(family, "rope", tmp_path)
    words = text_of(token_ids(1, 9)[0])
    assert AutoTokenizer.from_pretrained(tmp_path)(words)["input_ids"] == word_tokenizer(family)(words)["input_ids"]


# --- generation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}, {}], ids=["beams", "sampled", "greedy"])
def test_a_loaded_model_generates_what_the_saved_one_did(case: str, how: dict[str, Any], tmp_path: Path) -> None:
    model, ids = saved("gpt2", case, tmp_path), token_ids(2, 25)
    settings = {"max_new_tokens": 20, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **how}
    found = []
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.manual_seed(5)
        found.append(each.generate(ids, **settings))
    assert torch.equal(*found)


@pytest.mark.parametrize("case", CASES)
def test_assisted_decoding_is_greedy_decoding(case: str, tmp_path: Path) -> None:
    model, ids = saved("gpt2", case, tmp_path), token_ids(1, 25)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    poor = pe_swap.swap_positional(copy.deepcopy(model), "none")  # an assistant that is wrong at times
    for assistant in (AutoModelForCausalLM.from_pretrained(tmp_path), poor):
        assert torch.equal(loaded.generate(ids, assistant_model=assistant, **settings), expected)


@pytest.mark.parametrize("case", ["rope", "t5"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # PyTorch's own import
def test_a_static_cache_under_compilation_generates_the_same(case: str, tmp_path: Path) -> None:
    """`generate` compiles its decoding steps by itself for a static cache; on the CPU where told to."""
    saved("gpt2", case, tmp_path)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), token_ids(2, 25)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    found = model.generate(ids, cache_implementation="static", compile_config=compiled, **settings)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]


# --- files ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_safetensors_say_what_they_are(case: str, tmp_path: Path) -> None:
    saved("gpt2", case, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        assert weights.metadata()["format"] == "pt"
        assert weights.get_tensor("transformer.wpe.weight").shape == (2**20, 0)  # no table: what stands for it


# --- lm-evaluation-harness -----------------------------------------------------------------------------------------------------

TASK = {
    "task": "local_perplexity",
    "dataset_path": "json",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    "metadata": {"version": 1.0},
}


def test_lm_evaluation_harness_measures_beyond_the_trained_length(tmp_path: Path) -> None:
    """The command line as its users type it, without an import of pe_swap anywhere: `trust_remote_code=True` loads the stub."""
    model = saved("gpt2", "t5", tmp_path / "model")
    lines = [text_of(token_ids(1, LONG - 1, seed=seed)[0]) for seed in (1, 2)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_perplexity.yaml").write_text(yaml.safe_dump(task))
    arguments = f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32,max_length={LONG}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", "local_perplexity", "--include_path", str(tmp_path / "tasks"), "--batch_size", "1"]
    command += ["--output_path", str(tmp_path / "results")]
    home = environment(HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, env=home, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (report,) = (tmp_path / "results").rglob("results_*.json")
    measured = json.loads(report.read_text())["results"]["local_perplexity"]

    total = 0.0
    for line in lines:
        ids = torch.tensor([[1, *word_tokenizer("gpt2")(line)["input_ids"]]])  # the harness puts the start of text before it
        assert ids.shape == (1, LONG)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total -= float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert measured["word_perplexity,none"] == pytest.approx(
        math.exp(-total / sum(len(line.split()) for line in lines)), rel=1e-5
    )


def test_the_unswapped_model_ends_where_it_was_trained_to() -> None:
    """What the tests above would find without a swap."""
    with pytest.raises(IndexError, match="index out of range"):
        build("gpt2")(torch.randint(5, VOCABULARY, (1, LONG)))


# --- continuous batching -------------------------------------------------------------------------------------------------------

BATCHED = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def batched_equals_generated(model: PreTrainedModel) -> bool:
    prompts = [token_ids(1, length, seed=length) for length in (9, 5)]
    settings = GenerationConfig(**BATCHED)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # its cache would take most of the memory there is
    given = {"generation_config": settings, "continuous_batching_config": small, "progress_bar": False}
    found = model.generate_batch([prompt[0].tolist() for prompt in prompts], **given)
    alone = {**BATCHED, "eos_token_id": None}
    expected = [
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **alone)[0, prompt.shape[1] :] for prompt in prompts
    ]
    return [output.generated_tokens for output in found.values()] == [tokens.tolist() for tokens in expected]


def test_continuous_batching_takes_schemes_that_act_on_the_input() -> None:
    if not batched_equals_generated(build("gpt2")):
        pytest.skip("this transformers' continuous batching gives wrong tokens for an unswapped GPT-2 too (5.8 does)")
    assert batched_equals_generated(swapped("gpt2", "sinusoidal"))


def test_continuous_batching_refuses_schemes_that_act_inside_attention() -> None:
    """The error is the library's own: its paged attention takes neither a rotation of ours nor a bias."""
    model = swapped("gpt2", "rope")
    with pytest.raises(ValueError, match=r"pe_swap_sdpa\W* is not supported"):
        model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(**BATCHED), progress_bar=False)


def test_continuous_batching_that_chooses_a_backend_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With flash attention at hand its manager changes the implementation to one of ours, and asks no more."""
    monkeypatch.setattr(ContinuousBatchingManager, "switch_to_cb_friendly_attn", lambda *given: None)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    given = {"generation_config": GenerationConfig(**BATCHED), "continuous_batching_config": small, "progress_bar": False}
    (output,) = swapped("gpt2", "rope").generate_batch([[5, 6, 7]], **given).values()
    assert "PagedAttentionCache, which does not say where the keys of a row stand" in output.error
